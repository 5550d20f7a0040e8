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


def test_it_is_what_the_planner_finds():
    machine = Hardware.preset("rtx4090").with_budgets(cpu_mem=100)
    expected = solve(ModelArch.from_name("mixtral-8x7b"), machine, JOB, fixed=QUICK)
    found = plan("mixtral-8x7b", "rtx4090", JOB, cpu_mem=100, fixed=QUICK, advice=False)
    assert (found.policy, found.prediction) == (expected.policy, expected.prediction)


def test_models_and_machines_are_taken_in_every_form(tmp_path):
    (tmp_path / "config.json").write_bytes((ROOT / "cost_model/model/shapes/mixtral-8x7b.json").read_bytes())
    machine, path = Hardware.preset("t4"), tmp_path / "machine.json"
    machine.save(path)
    about = {"fixed": QUICK, "advice": False}
    policies = {
        plan(model, hardware, JOB, **about).policy
        for model, hardware in (
            ("mixtral-8x7b", "t4"),
            ("mistralai/Mixtral-8x7B-v0.1", machine),
            (tmp_path, path),
            (ModelArch.from_name("mixtral-8x7b"), str(path)),
        )
    }
    assert len(policies) == 1
    [policy] = policies
    assert (policy.schedule, policy.gpu_batch_size, policy.num_gpu_batches) == ("static", 4, 2)


def test_without_a_machine_this_one_is_taken_as_it_was_measured(tmp_path, monkeypatch):
    asked = []

    def measured(device, directory):
        asked.append((device, directory))
        return Hardware.preset("cpu")

    monkeypatch.setattr("flexmoe.probing.cache.cached_probe", measured)
    found = plan("mixtral-8x7b", workload=JOB, device="cpu", offload_dir=tmp_path, cpu_mem=4, fixed=QUICK, advice=False)
    assert asked == [("cpu", tmp_path)]
    assert found.prediction.memory.total("cpu") <= 4 * GIB


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
        "import sys, flexmoe; flexmoe.plan('mixtral-8x7b', 't4', flexmoe.Workload(prompt_len=64, gen_len=16), "
        "gpu_mem=15, advice=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
