"""`flexmoe.plan`: the planner from Python."""

import subprocess
import sys

import pytest

from cost_model.model.arch import ModelArch
from cost_model.planner.constraints import Fixed
from cost_model.planner.solve import solve
from flexmoe import FlexMoEError, Hardware, Workload, plan
from flexmoe.errors import InfeasibleError
from policies.common.memory_units import GIB
from tests.support.paths import ROOT

JOB = Workload(prompt_len=64, gen_len=16, num_requests=40)
QUICK = Fixed(schedule="static", gpu_batch_size=4, num_gpu_batches=2)


@pytest.fixture
def asked(monkeypatch):
    """What reaches the planner, instead of planning: (shape, machine, workload, its options) of every call."""
    calls = []
    monkeypatch.setattr("flexmoe.planning.plan.solve", lambda *about, **options: calls.append((*about, options)))
    return calls


def test_it_is_what_the_planner_finds(planned_soon):
    machine = Hardware.preset("rtx4090").with_budgets(cpu_mem=100)
    expected = solve(ModelArch.from_name("mixtral-8x7b"), machine, JOB, fixed=QUICK)
    found = plan("mixtral-8x7b", "rtx4090", JOB, cpu_mem=100, fixed=QUICK, advice=False)
    assert (found.policy, found.prediction) == (expected.policy, expected.prediction)
    assert (found.policy.schedule, found.policy.gpu_batch_size, found.policy.num_gpu_batches) == ("static", 4, 2)


def test_models_and_machines_are_taken_in_every_form(asked, tmp_path):
    (tmp_path / "config.json").write_bytes((ROOT / "cost_model/model/shapes/mixtral-8x7b.json").read_bytes())
    machine, path = Hardware.preset("t4"), tmp_path / "machine.json"
    machine.save(path)
    for model, hardware in (
        ("mixtral-8x7b", "t4"),
        ("mistralai/Mixtral-8x7B-v0.1", machine),
        (tmp_path, path),
        (ModelArch.from_name("mixtral-8x7b"), str(path)),
    ):
        plan(model, hardware, JOB, cpu_mem=100, dtype="float32", kv_tokens=640, fixed=QUICK)
    for arch, given, workload, options in asked:
        assert arch.fingerprint() == ModelArch.from_name("mixtral-8x7b").fingerprint()
        assert given == machine.with_budgets(cpu_mem=100) and workload == JOB
        assert options == {
            "fixed": QUICK,
            "dtype_bytes": 4,
            "kv_tokens": 640,
            "advice": True,
            "allow_compression": False,
        }
    assert len(asked) == 4


def test_without_a_machine_this_one_is_taken_as_it_was_measured(asked, tmp_path, monkeypatch):
    probed = []

    def measured(device, directory):
        probed.append((device, directory))
        return Hardware.preset("cpu")

    monkeypatch.setattr("flexmoe.probing.cache.cached_probe", measured)
    plan("mixtral-8x7b", workload=JOB, device="cpu", offload_dir=tmp_path, cpu_mem=4)
    [(_, machine, *_)] = asked
    assert probed == [("cpu", tmp_path)] and machine.cpu_budget_bytes == 4 * GIB
    assert machine.host_memory_bytes < Hardware.preset("cpu").host_memory_bytes  # some is left to others


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("no-such-model", "t4"), "no-such-model"),
        (("mixtral-8x7b", "no-such-machine"), "no-such-machine"),
        (("mixtral-8x7b", "missing.json"), "missing.json"),
    ],
)
def test_what_is_not_known_is_named(arguments, said):
    with pytest.raises(FlexMoEError, match=said):
        plan(*arguments)


def test_other_arguments_that_cannot_be_used_are_named():
    with pytest.raises(FlexMoEError, match="int3"):
        plan("mixtral-8x7b", "t4", dtype="int3")
    with pytest.raises(InfeasibleError, match="gpu"):
        plan("mixtral-8x7b", "t4", JOB, gpu_mem=0.1)


def test_planning_for_a_given_machine_loads_no_torch():
    code = (
        "import sys, flexmoe; from cost_model.planner import search; search.KICKS_EFFORT, search.ROUNDS = 0, (); "
        "flexmoe.plan('mixtral-8x7b', 't4', flexmoe.Workload(prompt_len=64, gen_len=16), "
        "gpu_mem=15, advice=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
