"""The policies that ship with the package: valid, feasible by the executor's own check, and what the planner finds."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

import policies
from cost_model.cli.report import Report
from cost_model.memory.allocation import allocate
from cost_model.memory.memory_plan import plan_memory
from cost_model.model.arch import ModelArch
from cost_model.timing.evaluate import evaluate
from policies.common.errors import InfeasibleError
from policies.policy import PolicyFile
from scripts.make_policies import HOST_SHARE, MACHINES, POLICIES, all_ready

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(policies.__file__).parent / "policy.schema.json").read_text("utf-8"))
READY = all_ready()
NAMES = [str(ready.path) for ready in READY]
#: What a plan on another processor, whose sums are rounded differently, may differ by.
TOLERANCE = 0.01
#: Planning one takes some ten seconds; `make test-all` plans them all.
SAMPLE = random.Random(3).sample(READY, 1)


@pytest.fixture(params=READY, ids=NAMES)
def ready(request):
    return request.param


@pytest.fixture
def file(ready):
    return PolicyFile.load(POLICIES / ready.path)


def sized(ready, policy):
    arch, hardware = ModelArch.from_name(ready.model), ready.machine.hardware()
    counts = allocate(arch, policy, ready.workload, device=hardware.device, longest_row=ready.workload.longest_row)
    return arch, hardware, counts


def planned(ready):
    """Tokens per second of the stored policy, and of the one that is planned now."""
    return PolicyFile.load(POLICIES / ready.path).predicted["tokens_per_s"], ready.plan().prediction.tokens_per_s


def test_there_is_a_file_for_every_machine_and_job_and_no_other():
    shipped = {str(path.relative_to(POLICIES)) for path in POLICIES.glob("*/*.json")}
    assert shipped == set(NAMES) and len(NAMES) == 26


def test_file_satisfies_the_schema(ready):
    document = json.loads((POLICIES / ready.path).read_text("utf-8"))
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert all(document[section] for section in ("model", "hardware", "workload", "predicted"))


@pytest.mark.parametrize(
    "section, changes",
    [
        ("model", {"num_experts": 0}),
        ("hardware", {"device": "tpu"}),
        ("hardware", {"disk_bytes": -1}),
        ("workload", {"lengths": [[3, 4]]}),
        ("workload", {"rows": 3}),
        ("predicted", {"tokens_per_s": "fast"}),
        ("predicted", {"memory_bytes": {"gpu": 1.5}}),
    ],
)
def test_schema_refuses_sections_that_no_planner_writes(section, changes):
    document = json.loads((POLICIES / NAMES[0]).read_text("utf-8"))
    document[section] |= changes
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(document)


def test_file_says_what_it_was_made_for(ready, file):
    file.check_model(ModelArch.from_name(ready.model).fingerprint())
    assert file.hardware == ready.machine.hardware().fingerprint()
    assert file.planned_workload() == ready.workload


def test_policy_passes_the_byte_check_of_the_executor(ready, file):
    arch, hardware, counts = sized(ready, file.policy)
    memory = plan_memory(
        arch,
        file.policy,
        counts,
        device=hardware.device,
        compute_bytes=arch.dtype_bytes,
        process_bytes=hardware.process_bytes,
    )
    memory.check(hardware.budgets(), {})
    assert file.predicted["memory_bytes"] == {tier: memory.total(tier) for tier in memory.parts}


def test_placing_the_achieved_percents_gives_them_again(ready, file):
    arch, hardware, counts = sized(ready, file.policy)
    report = Report(
        arch=arch,
        hardware=hardware,
        workload=ready.workload,
        dtype_bytes=arch.dtype_bytes,
        origin="",
        policy=file.policy,
        prediction=evaluate(arch, hardware, ready.workload, file.policy),
    )
    assert report.policy_file().policy == file.policy
    assert sized(ready, report.policy_file().policy)[2] == counts


def test_stored_prediction_is_that_of_the_cost_model(ready, file):
    arch, hardware, _ = sized(ready, file.policy)
    now = evaluate(arch, hardware, ready.workload, file.policy)
    assert file.predicted["tokens_per_s"] == pytest.approx(now.tokens_per_s, rel=TOLERANCE)


def test_policy_is_refused_on_a_machine_with_half_the_memory(ready, file):
    arch, hardware, _ = sized(ready, file.policy)
    half = replace(hardware, host_memory_bytes=hardware.host_memory_bytes // 2)
    if file.predicted["memory_bytes"]["cpu"] <= half.host_memory_bytes and hardware.device == "cuda":
        half = replace(half, gpus=(replace(half.gpu, memory_bytes=half.gpu.memory_bytes // 2),))
    with pytest.raises(InfeasibleError, match="are missing"):
        evaluate(arch, half, ready.workload, file.policy)


@pytest.mark.parametrize("sampled", SAMPLE, ids=lambda ready: str(ready.path))
def test_planner_finds_nothing_better_and_nothing_worse(sampled):
    stored, now = planned(sampled)
    assert now == pytest.approx(stored, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("other", [r for r in READY if r not in SAMPLE], ids=lambda ready: str(ready.path))
def test_planner_finds_nothing_better_and_nothing_worse_for_the_others(other):
    stored, now = planned(other)
    assert now == pytest.approx(stored, rel=TOLERANCE)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_part_of_the_nominal_host_memory_is_left_to_the_system(machine):
    hardware = machine.hardware()
    nominal = machine.host_gib << 30
    assert hardware.host_memory_bytes == int(HOST_SHARE * nominal) < 0.95 * nominal
    if hardware.device == "cpu":
        assert hardware.budgets() == {
            "gpu": None,
            "cpu": None,
            "gpu+cpu": hardware.host_memory_bytes,
            "disk": hardware.disk_bytes,
        }


@pytest.mark.slow
def test_same_arguments_give_the_same_file(tmp_path):
    ready = READY[-1]
    for name in ("a.json", "b.json"):
        ready.file(ready.plan()).save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
