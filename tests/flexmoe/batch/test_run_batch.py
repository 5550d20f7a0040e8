"""`run_batch` does what the command line does, from Python: the same bytes, errors that are raised, and nothing printed."""

import json
import signal

import pytest
import torch

from flexmoe.batch.run_batch import run_batch
from flexmoe.cli.run import main
from flexmoe.engine.engine import Engine
from flexmoe.errors import DataError, FlexMoEError, InfeasibleError, InputMissingError, StorageError, UsageError
from tests.support.command_lines import ROWS, THREE_TIERS

pytestmark = pytest.mark.usefixtures("one_thread")
RESIDENT = {"percent": (100, 0, 100, 0, 100, 0)}
TIERS = {"percent": (20, 30, 30, 30, 50, 0), "gpu_batch_size": 3, "num_gpu_batches": 2}
SMALL = RESIDENT | {"gpu_batch_size": 2, "num_gpu_batches": 1, "prefill_tokens": 400}


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture
def batch(job):
    """Runs the job from Python, with more options."""

    def call(**options):
        given = {"model": job.model, "device": "cpu", "offload_dir": job.directory / "offload"}
        given |= {} if "policy" in options else RESIDENT
        return run_batch(job.directory / "in.jsonl", job.output, **given | options)

    return call


@pytest.fixture
def fails_at(monkeypatch):
    """Has the engine raise in its n-th sweep; returns what ends that."""
    real = Engine.step

    def at(sweep, error):
        counter = iter(range(10**9))

        def step(engine):
            if next(counter) == sweep:
                raise error
            return real(engine)

        monkeypatch.setattr(Engine, "step", step)
        return lambda: monkeypatch.setattr(Engine, "step", real)

    return at


def test_it_writes_the_bytes_of_the_command_line_and_prints_nothing(job, batch, capfd):
    job.write(
        [json.loads(line) for line in (job.directory / "in.jsonl").read_text().splitlines()] + [{"prompt": [999]}]
    )
    assert main(job.args("-o", str(job.directory / "whole.jsonl"), *THREE_TIERS)) == 3
    capfd.readouterr()
    result = batch(**TIERS)
    assert capfd.readouterr() == ("", "")
    assert job.output.read_bytes() == (job.directory / "whole.jsonl").read_bytes()
    assert job.errors.read_bytes() == (job.directory / "whole.errors.jsonl").read_bytes()
    assert (result.rows_ok, result.rows_failed, result.rows_resumed) == (len(ROWS), 1, 0)
    assert (result.output_path, result.error_path, result.was_finished) == (job.output, job.errors, False)


def test_what_was_measured_is_in_the_result_and_in_the_files(job, batch):
    metrics, trace, stats = (job.directory / name for name in ("m.json", "t.json", "s.json"))
    result = batch(metrics_json=metrics, trace=trace, router_stats=str(stats))
    assert json.loads(metrics.read_text()) == json.loads(json.dumps(result.metrics))
    assert result.metrics["generated_tokens"] == result.generated_tokens > 0 and result.error_path is None
    assert json.loads(trace.read_text())["traceEvents"]
    assert json.loads(stats.read_text())["tokens"] == result.metrics["run_tokens"]


def test_a_policy_is_planned_for_the_job_by_default(job, batch, machine):
    result = batch(policy="auto", hardware=machine, gpu_mem=0.004, cpu_mem=0.004, nvme_mem=0.1)
    assert result.rows_ok == len(ROWS) and result.metrics["predicted"]["wall_s"] > 0
    assert result.metrics["memory"]["gpu"]["planned_bytes"] <= 0.004 * 2**30


@pytest.mark.parametrize(
    "stop, raised",
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (torch.OutOfMemoryError("CUDA out of memory"), InfeasibleError),
        (OSError(28, "No space left on device"), StorageError),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_call_that_was_stopped_is_resumed_by_the_same_call(job, batch, fails_at, stop, raised):
    assert main(job.args("-o", str(job.directory / "whole.jsonl"))) == 0
    repair = fails_at(12, stop)
    with pytest.raises(raised):
        batch(**SMALL)
    assert not job.output.exists() and (job.directory / "out.jsonl.flexmoe" / "journal").stat().st_size > 100
    repair()
    result = batch(**TIERS)
    assert job.output.read_bytes() == (job.directory / "whole.jsonl").read_bytes()
    assert 0 < result.rows_resumed < len(ROWS) == result.rows_ok
    assert result.metrics["num_requests"] == len(ROWS) - result.rows_resumed


def test_a_job_that_is_finished_returns_what_it_is_without_loading_weights(job, batch, monkeypatch):
    first = batch()
    monkeypatch.setattr("flexmoe.engine.build.WeightStore", lambda *_: pytest.fail("weights were loaded"))
    again = batch()
    assert again.was_finished and (again.rows_ok, again.rows_resumed) == (first.rows_ok, first.rows_ok)
    assert again.metrics.keys() == first.metrics.keys() and again.metrics["sweeps"] == 0


def test_signals_are_left_to_the_caller(batch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    batch()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"model": "/no/such/model"}, InputMissingError, "/no/such/model"),
        ({"gpu_mem": 0.0001}, InfeasibleError, "are missing"),
        ({"policy": "/no/such/policy.json"}, InputMissingError, "/no/such/policy.json"),
        ({"trace": "/no/such/t.json"}, StorageError, "/no/such"),
        ({"chat_template": "{% for %}"}, DataError, "chat template"),
        ({"device": "tpu"}, UsageError, "tpu"),
        ({"no_such_option": 1}, UsageError, "no_such_option"),
        ({"policy": "auto", "percent": [100, 0] * 3}, UsageError, "percent"),
    ],
)
def test_errors_are_raised_and_leave_nothing(job, batch, capfd, options, error, words):
    with pytest.raises(error, match=words) as caught:
        batch(**options)
    assert isinstance(caught.value, FlexMoEError) and capfd.readouterr() == ("", "")
    assert sorted(path.name for path in job.directory.iterdir()) == ["in.jsonl"]


def test_a_job_with_other_options_is_refused_and_overwrite_replaces_it(job, batch):
    batch()
    with pytest.raises(UsageError, match="seed was 0 and is 3"):
        batch(seed=3)
    assert batch(seed=3, overwrite=True).rows_ok == len(ROWS)
