"""A job is planned for the rows that have room; those that no memory has room for are error rows."""

import json

import pytest

from cost_model.model.arch import ModelArch
from flexmoe.batch import plan as plan_module
from flexmoe.batch.options import RunOptions
from flexmoe.batch.plan import RunPlan, last_that_holds, plan_run
from flexmoe.models.loader import load_model
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.planning.configure import RESIDENT
from flexmoe.preflight.lengths import Lengths, RowLength
from policies.policy import Policy
from policies.units import UnitId
from tests.support.command_lines import assert_one_sentence, body
from tests.support.usage import skewed

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes", "planned_soon")
SHORT = {"prompt": [5] * 10, "max_tokens": 4}
LONG = {"prompt": [5] * 100, "max_tokens": 400}
#: Budgets that hold the weights and short rows, and no long one.
FLAGS = ["--gpu-batch-size", "2", "--gpu-mem", "0.00232"]
AUTO = ["--policy", "auto", "--gpu-mem", "0.001", "--cpu-mem", "0.00221", "--nvme-mem", "0"]


def refusals(caplog):
    return [record.getMessage() for record in caplog.records if "no memory has room for" in record.getMessage()]


@pytest.mark.parametrize(
    "flags", [pytest.param(FLAGS, id="flags"), pytest.param(AUTO, id="auto", marks=pytest.mark.slow)]
)
def test_a_row_that_no_memory_has_room_for_is_an_error_row_and_the_others_run(job, main, machine, flags, caplog):
    job.write([SHORT, LONG, SHORT, SHORT])
    code, _, err = main(job.args(*flags, "--hardware", str(machine)))
    assert code == 3, err
    assert [line["custom_id"] for line in job.lines()] == ["row-1", "row-3", "row-4"]
    [failed] = [json.loads(line) for line in job.errors.read_text().splitlines()]
    error = body(failed)["error"]
    assert failed["custom_id"] == "row-2" and error["code"] == "cannot_run"
    assert "may reach 500 tokens" in error["message"] and "lower max_tokens" in error["message"]
    [told] = refusals(caplog)
    assert told.startswith("rows that no memory has room for: 1 (the longest may reach 500 tokens)")


def test_the_plan_is_made_without_the_rows_that_are_left_out(job, main, machine, tmp_path):
    for name, rows in (("with", [SHORT, LONG, SHORT, SHORT]), ("without", [SHORT, SHORT, SHORT])):
        job.write(rows)
        assert main(job.args(*FLAGS, "--overwrite", "--metrics-json", str(tmp_path / name)))[0] in (0, 3)
    records = [json.loads((tmp_path / name).read_text()) for name in ("with", "without")]
    for key in ("workload", "policy"):
        assert records[0][key] == records[1][key]


def test_a_dry_run_with_rows_that_have_no_room_says_3(job, main, machine, caplog):
    job.write([SHORT, LONG, SHORT, SHORT])
    code, out, err = main(job.args(*FLAGS, "--hardware", str(machine), "--dry-run"))
    assert (code, err) == (3, "") and "lengths of 3 completions" in out and len(refusals(caplog)) == 1


@pytest.mark.parametrize("rows", [[SHORT] * 3, [LONG], [SHORT, LONG]])
def test_weights_that_do_not_fit_are_no_fault_of_a_row(job, main, rows, caplog):
    job.write(rows)
    code, _, err = main(job.args("--gpu-mem", "0.001"))
    assert code == 4 and refusals(caplog) == []
    assert_one_sentence(err, "gpu memory needs", "weights")


def test_rows_that_fit_by_themselves_are_not_left_out_for_a_block_that_does_not(job, main, caplog):
    longer = {"prompt": [5] * 100, "max_tokens": 100}
    unlike = [longer | {"prompt": [5 + i] * 100} for i in range(16)]  # what rows begin with alike counts once
    flags = ["--gpu-batch-size", "16", "--gpu-mem", "0.0027", "--prefill-tokens", "20", "--overwrite"]
    for rows, code in (([SHORT] * 16, 0), ([longer], 0), ([SHORT] * 16 + unlike, 4), ([SHORT] * 16 + [longer] * 16, 0)):
        job.write(rows)
        assert main(job.args(*flags))[0] == code
    assert refusals(caplog) == []


@pytest.mark.parametrize(
    "rows, code",
    [([{"prompt": [5], "tools": [{}]}] * 3, 3), ([{"prompt": [5], "tools": [{}]}, SHORT], 3), ([SHORT], 0)],
)
def test_a_dry_run_says_3_where_rows_cannot_run_and_plans_for_none(job, main, machine, rows, code):
    job.write(rows)
    got, out, err = main(job.args("--dry-run", "--hardware", str(machine)))
    assert (got, err) == (code, "")
    assert ("predicted: " in out) == ("lengths of 1 completions" in out) == (SHORT in rows)


def test_fewer_kv_tokens_than_the_longest_row_needs_are_told_of(job, main, caplog):
    job.write([SHORT, LONG])
    assert main(job.args("--kv-tokens", "40"))[0] == 0
    assert [m for m in (r.getMessage() for r in caplog.records) if "--kv-tokens is 40" in m and "500 tokens" in m]


def test_lengths_are_measured_without_the_longest_rows():
    lengths = Lengths(4)
    for row, (prompt, new) in enumerate([(10, 4), (100, 400), (20, 8)]):
        lengths[row] = RowLength(prompts=1, samples=1, prompt_tokens=prompt, new_tokens=new, longest=prompt + new)
    measured = lengths.measured(1000, 28)
    assert (measured.rows, measured.longest_row, measured.workload.longest_row) == (2, 28, 28)
    assert lengths.measured(1000).longest_row == 500


@pytest.mark.parametrize("holds", range(6))
def test_the_last_value_that_holds_is_found(holds):
    values = [2, 3, 5, 7, 11]
    assert last_that_holds(values, lambda value: value in values[:holds]) == (values[holds - 1] if holds else None)


# Rows that name no limit.


@pytest.mark.parametrize(
    "flags, room", [({}, 512), ({"kv_tokens": 192}, 192), ({"gpu_mem": 0.0024}, 256), ({"gpu_mem": 0.0023}, 176)]
)
def test_open_rows_get_the_room_that_memory_has_and_are_no_error_rows(tiny, tmp_path, flags, room):
    """The context has 512 tokens; the plan is made for 64 new ones, and what memory is left lets a row be longer."""
    model = load_model(str(tiny().directory))
    lengths = Lengths(3, open_tokens=64)
    for row, prompt in enumerate((10, 30, 100)):
        request = EngineRequest(request_id="", prompt_token_ids=(5,) * prompt, params=SamplingParams())
        lengths[row] = RowLength.of([request], model.arch.max_position)
    flags = {"percent": RESIDENT, "gpu_batch_size": 2, "prefill_tokens": 8} | flags
    options = RunOptions(model=str(tiny().directory), device="cpu", offload_dir=tmp_path, **flags)
    plan = plan_run(options, model, lengths.measured(model.arch.max_position), lengths)
    assert plan.rows_without_room == 0 and plan.measured.rows == plan.measured.open_rows == 3
    assert plan.measured.workload.lengths == ((10, 64, 1), (30, 64, 1), (100, 64, 1))
    assert plan.engine.largest_row_tokens == room


# Usage of experts.


@pytest.fixture
def usage(tiny, tmp_path):
    arch = ModelArch.from_dir(tiny().directory)
    usage = skewed(arch)
    usage.save(tmp_path / "usage.json")
    return usage, arch


@pytest.mark.parametrize("flags", [["--percent", "40", "60", "100", "0", "100", "0"], AUTO[:2]], ids=["flags", "auto"])
def test_experts_that_another_run_used_most_are_on_the_device(job, main, machine, usage, tmp_path, flags, monkeypatch):
    known, arch = usage
    plans = []
    monkeypatch.setattr(plan_module, "RunPlan", lambda **about: plans.append(RunPlan(**about)) or plans[-1])
    job.write([SHORT])
    flags = [*flags, "--hardware", str(machine), "--expert-usage", str(tmp_path / "usage.json")]
    code, out, err = main(job.args(*flags, "--metrics-json", str(tmp_path / "metrics.json")))
    assert (code, err) == (0, "") and "most used experts first" in out
    policy = Policy(**json.loads((tmp_path / "metrics.json").read_text())["policy"])
    assert policy.expert_order == known.unit_order(arch.grouped(policy.experts_per_unit))
    tiers = plans[0].engine.allocation.placement.tier_of
    for layer, order in enumerate(policy.expert_order):
        on_gpu = [tiers[UnitId("expert", layer, number)] == "gpu" for number in order]
        assert on_gpu == sorted(on_gpu, reverse=True)


def test_usage_of_another_model_is_refused_before_anything_is_planned(job, main, tmp_path):
    skewed().save(tmp_path / "usage.json")
    code, _, err = main(job.args("--expert-usage", str(tmp_path / "usage.json")))
    assert code == 4
    assert_one_sentence(err, "expert usage is of another model")
