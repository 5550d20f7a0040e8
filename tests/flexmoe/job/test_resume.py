"""Whatever ends a job, the same command goes on with it, and the output is that of a job that nothing disturbed."""

import contextlib
import errno
import json
import os
import random
import re
import signal

import pytest

from flexmoe.errors import DataError, StorageError, UsageError
from flexmoe.inputs.options import InputOptions
from flexmoe.job.job import Job
from flexmoe.job.journal import Journal
from flexmoe.params import InFlight
from flexmoe.preflight.prepare import Preparer
from flexmoe.system.interrupts import Interrupted, Interrupts, Terminated
from policies.common import file_io
from tests.support.fake_engine import FakeEngine
from tests.support.jobs import Clock, Runner, make_setup

pytestmark = pytest.mark.usefixtures("quick_disk", "fixed_time")


class Killed(BaseException):
    """The end of the process, as far as this process can play it: nothing more is written."""


def mixed_rows(count, rng):
    rows = []
    for i in range(count):
        prompt = [3 + rng.randrange(300) for _ in range(1 + rng.randrange(30))]
        row = {"prompt": prompt, "custom_id": f"c{i}", "max_tokens": 1 + rng.randrange(25)}
        row |= rng.choice(
            [{}, {}, {"n": 3}, {"logprobs": 2}, {"prompt": [prompt, prompt[:3]]}, {"max_tokens": -1}, {"n": 10**9}]
        )
        rows.append(row)
    return rows


def undisturbed(bare, rows):
    """The bytes of the output and of the error file of a job that nothing disturbs."""
    directory = bare.directory / "undisturbed"
    directory.mkdir()
    other = Runner(directory, bare.setup)
    other.write(rows)
    other.run(FakeEngine(window=5))
    return other.output.read_bytes(), other.errors.read_bytes()


def crash_until_done(bare, crash, rng, options):
    """Starts the job again and again, each time with an engine that ends in a crash some sweeps later."""
    crashes = 0
    while True:
        engine = FakeEngine(window=rng.randrange(1, 9), crash_at=[rng.randrange(1, 12)], crash=crash)
        clock = Clock()
        engine.on_sweep_start = clock.tick
        try:
            return bare.run(engine, clock=clock, **options), crashes
        except type(crash):
            crashes += 1
            assert not bare.output.exists()


@pytest.mark.parametrize(
    "crash", [Killed(), RuntimeError("engine crashed"), StorageError("the disk tier failed")], ids=repr
)
@pytest.mark.parametrize("interval_s", [1.0, 4.0], ids=lambda s: f"every {s:.0f} s")
def test_a_job_that_is_killed_again_and_again_writes_the_same_bytes(bare, crash, interval_s):
    rng = random.Random(7)
    rows = mixed_rows(60, rng)
    expected = undisturbed(bare, rows)
    bare.write(rows)
    report, crashes = crash_until_done(bare, crash, rng, {"interval_s": interval_s})
    assert crashes >= 5 and report.rows_resumed > 0
    assert (bare.output.read_bytes(), bare.errors.read_bytes()) == expected


def test_a_resume_says_what_it_resumes_and_a_first_start_nothing(bare, caplog):
    bare.write([{"prompt": [9 + i], "custom_id": f"c{i}", "max_tokens": 4 + 9 * i} for i in range(6)])
    with caplog.at_level("INFO", "flexmoe.progress"):
        with pytest.raises(RuntimeError):
            bare.run(FakeEngine(window=2, crash_at=[3], crash=RuntimeError("engine crashed")))
        assert "resuming" not in caplog.text
        bare.run()
    [told] = [message for message in caplog.messages if message.startswith("resuming")]
    found = re.fullmatch(r"resuming (.+): (\d+) of 6 rows are done, and (\d+) are begun, with (\d+) tokens", told)
    assert found[1] == str(bare.output) and int(found[2]) + int(found[3]) > 0


def test_a_row_is_done_once_however_often_the_job_is_killed(bare):
    bare.write([{"prompt": [9 + i], "custom_id": f"c{i}"} for i in range(30)])
    finished = []

    class Counting(FakeEngine):
        def stream(self, requests, on_sweep=None):
            for result in super().stream(requests, on_sweep):
                finished.append(result.request_id)
                yield result

    for kill_at in (2, 4, 5, 3, 8):
        with pytest.raises(Killed):
            bare.run(Counting(window=2, crash_at=[kill_at], crash=Killed()))
    bare.run(Counting(window=4))
    assert sorted(finished, key=lambda name: int(name.split("/")[0])) == [f"{row}/0" for row in range(30)]


def test_a_kill_costs_at_most_the_interval_and_a_sweep_of_tokens(bare):
    """Also where all rows end together, so that no row is finished before the kill."""
    bare.write([{"prompt": list(range(5, 105)), "max_tokens": 90} for _ in range(4)])
    clock = Clock()
    with pytest.raises(Killed):
        bare.run(
            FakeEngine(window=4, crash_at=[58], crash=Killed(), on_sweep_start=clock.tick), clock=clock, interval_s=10
        )
    engine = FakeEngine(window=4)
    report = bare.run(engine)
    assert report.rows_resumed == 0
    assert engine.sweeps == 90 - 50, "50 of the 58 tokens of each row had been kept"


def test_a_failure_costs_nothing_where_the_disk_still_takes_what_was_in_flight(bare):
    bare.write([{"prompt": list(range(5, 105)), "max_tokens": 90} for _ in range(4)])
    with pytest.raises(MemoryError):
        bare.run(FakeEngine(window=4, crash_at=[58], crash=MemoryError("no memory")))
    engine = FakeEngine(window=4)
    bare.run(engine)
    assert engine.sweeps == 90 - 58


def test_a_prompt_that_is_back_before_the_others_of_its_row_is_not_done_again(bare):
    bare.write([{"prompt": [[5, 6], list(range(5, 105))], "max_tokens": 90, "logprobs": 1}])
    with pytest.raises(RuntimeError):
        bare.run(FakeEngine(window=2, crash_at=[50]))
    engine = FakeEngine(window=2)
    bare.run(engine)
    assert [[len(state.token_ids) for state in request.resumed] for request in engine.pulled] == [[3], [50]]


def test_rows_that_had_been_begun_go_first(bare):
    bare.write([{"prompt": [5 + i] * (1 + i), "max_tokens": 60, "ignore_eos": True} for i in range(20)])
    with pytest.raises(RuntimeError):
        bare.run(FakeEngine(window=2, crash_at=[5]))
    engine = FakeEngine(window=2)
    bare.run(engine)
    assert [request.request_id for request in engine.pulled[:3]] == ["19/0", "18/0", "17/0"]
    assert [len(r.token_ids) for request in engine.pulled[:3] for r in request.resumed] == [5, 5]


def test_finished_rows_are_not_tokenized_again(tmp_path, tokenizer_directory, monkeypatch):
    bare = Runner(tmp_path, make_setup(tokenizer_directory))
    bare.write([{"prompt": "a" * (1 + i)} for i in range(12)])
    with pytest.raises(Killed):
        bare.run(FakeEngine(window=12, crash_at=[6], crash=Killed()))
    with contextlib.closing(Journal(bare.work / "journal", 12, manifest(bare))) as journal:
        left = [row for row in range(12) if row not in journal]
    prepared, real = [], Preparer.prepare_each

    def prepare_each(preparer, rows):
        prepared.extend(row for row, _ in rows)
        return real(preparer, rows)

    monkeypatch.setattr(Preparer, "prepare_each", prepare_each)
    bare.run()
    assert 0 < len(left) < 12 and sorted(prepared) == sorted([*left, *left]), "once to measure it and once to run it"


def manifest(bare):
    document = json.loads((bare.work / "manifest.json").read_text())
    return f"{document['fingerprint']}/0/1"


def test_a_job_whose_rows_are_all_done_is_published_without_an_engine(bare, monkeypatch):
    bare.write([{"prompt": [9]}])
    real = os.replace

    def replace(old, new):
        if str(new).endswith("out.jsonl"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(file_io.os, "replace", replace)
    with pytest.raises(StorageError, match="Input/output error"):
        bare.run()
    monkeypatch.undo()
    engine = FakeEngine()
    report = bare.run(engine)
    assert engine.pulled == [] and (report.rows_ok, report.rows_resumed) == (1, 1) and len(bare.lines()) == 1


@pytest.mark.parametrize(
    "files, rows, kind, told",
    [
        ({}, [{"prompt": [8]}], DataError, "the input file has changed"),
        ({"options": InputOptions(on_invalid="record")}, None, UsageError, "on_invalid was fail and is record"),
    ],
)
def test_another_job_is_refused_and_overwrite_starts_it(bare, files, rows, kind, told):
    bare.write([{"prompt": [9]}])
    with pytest.raises(RuntimeError):
        bare.run(FakeEngine(crash_at=[1]))
    if rows:
        bare.write(rows)
    with pytest.raises(kind, match=told):
        bare.run(files=files)
    assert bare.run(files={**files, "overwrite": True}).rows_ok == 1


def test_another_identity_is_refused(bare):
    bare.write([{"prompt": [9]}])
    with pytest.raises(RuntimeError):
        bare.run(FakeEngine(crash_at=[1]), identity={"seed": 1})
    with pytest.raises(UsageError, match="seed was 1 and is 2"):
        bare.run(identity={"seed": 2})


def test_the_time_and_the_name_are_those_of_the_first_start(bare, monkeypatch):
    bare.write([{"prompt": [9]}])
    with pytest.raises(RuntimeError):
        bare.run(FakeEngine(crash_at=[1]), model_name="first")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")
    bare.run(model_name="second")
    answer = bare.lines()[0]["response"]["body"]
    assert (answer["created"], answer["model"]) == (1700000000, "first")


# Being asked to stop.


class Stopping(FakeEngine):
    """A sweep during which the process gets a signal."""

    def __init__(self, number, at, **options):
        super().__init__(on_sweep_start=lambda sweep: os.kill(os.getpid(), number) if sweep in at else None, **options)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_the_job_after_its_sweep_with_all_tokens_kept(bare, capsys, number, code):
    bare.write([{"prompt": list(range(5, 105)), "max_tokens": 90} for _ in range(4)])
    engine = Stopping(number, [58], window=4)
    with Interrupts() as interrupts, pytest.raises(Interrupted, match="0 of 4 rows are done") as caught:
        bare.run(engine, interrupts=interrupts)
    assert caught.value.exit_code == code and engine.sweeps == 59
    assert "once more stops at once" in capsys.readouterr().err
    engine = FakeEngine(window=4)
    bare.run(engine)
    assert engine.sweeps == 90 - 59


def test_rows_that_finish_in_the_last_sweep_are_kept(bare):
    bare.write([{"prompt": [5] * 3, "ignore_eos": True, "max_tokens": 4}, {"prompt": [5] * 9, "max_tokens": 9}])
    with Interrupts() as interrupts, pytest.raises(Interrupted, match="1 of 2 rows are done"):
        bare.run(Stopping(signal.SIGTERM, [3], window=2), interrupts=interrupts)


def test_a_job_that_is_done_with_that_sweep_is_finished(bare):
    bare.write([{"prompt": [5] * 3, "max_tokens": 4}])
    with Interrupts() as interrupts:
        report = bare.run(Stopping(signal.SIGTERM, [3], window=2), interrupts=interrupts)
    assert report.rows_ok == 1 and len(bare.lines()) == 1


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_second_signal_ends_it_at_once(bare, number, kind):
    def twice(_):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    bare.write([{"prompt": [5] * 3}])
    engine = FakeEngine(on_sweep_start=twice)
    with Interrupts() as interrupts, pytest.raises(kind):
        bare.run(engine, interrupts=interrupts)
    assert engine.sweeps == 0
    bare.run()


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_before_the_first_sweep_a_signal_ends_it_at_once(number, kind):
    before = signal.getsignal(number)
    with pytest.raises(kind), Interrupts():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_journal_that_is_cut_anywhere_gives_the_same_output(bare):
    """The torn tail of a crash, followed to the end: whatever was kept is used, and the rest is done again."""
    rows = mixed_rows(12, random.Random(3))
    expected = undisturbed(bare, rows)
    bare.write(rows)
    with pytest.raises(Killed):
        clock = Clock()
        engine = FakeEngine(window=4, crash_at=[14], crash=Killed(), on_sweep_start=clock.tick)
        bare.run(engine, clock=clock, interval_s=3)
    journal = (bare.work / "journal").read_bytes()
    kept = (bare.work / "manifest.json").read_bytes()
    for cut in random.Random(4).sample(range(len(journal)), 40):
        (bare.work / "manifest.json").write_bytes(kept)
        (bare.work / "journal").write_bytes(journal[:cut])
        bare.run(FakeEngine(window=4))
        assert (bare.output.read_bytes(), bare.errors.read_bytes()) == expected, cut
        bare.output.unlink()
        bare.errors.unlink()


def test_what_cannot_be_kept_does_not_hide_the_failure(bare, caplog):
    """What cannot be kept on the way out of a failure does not hide the failure."""
    bare.write([{"prompt": [9]}])
    stray = InFlight(request_id="x", index=0, token_ids=[1], logprobs=None)
    engine = FakeEngine(crash_at=[1], crash=RuntimeError("first"))
    engine._states = lambda: [stray]
    with pytest.raises(RuntimeError, match="first"):
        bare.run(engine)
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize("finished, expected", [(63, 256), (64, 4), (200, 4)])
def test_a_resumed_job_expects_of_rows_without_a_limit_what_finished_ones_took(
    finished, expected, tmp_path, tokenizer_directory
):
    runner = Runner(tmp_path, make_setup(tokenizer_directory, default_max_tokens=None, context=2000))
    chat = {"messages": [{"role": "user", "content": "hello world"}], "n": 2}
    limited = {"prompt": [5] * 30, "max_tokens": 100}
    runner.write([chat if row % 2 else limited for row in range(500)])
    with Job(runner.files(), runner.setup) as job:
        assert job.look().open_tokens == 256
        journal = job._workspace.journal
        for row in range(2 * finished):
            journal.finish(row, b"{}\n", prompt_tokens=9, generated_tokens=7 if row % 2 else 31)
        journal.finish(2 * finished, b"{}\n", failed=True)
    with Job(runner.files(), runner.setup) as job:
        measured = job.look()
        assert measured.open_tokens == expected and measured.open_rows == 2 * (250 - finished)
        assert {new for _, new, _ in measured.workload.lengths} == {100, expected}
