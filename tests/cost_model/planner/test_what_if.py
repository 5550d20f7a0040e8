"""What a change would give: other machines, and fewer bytes, which are chosen only where they gain."""

from dataclasses import replace

import pytest

from cost_model import Fixed, Hardware, ModelArch, Workload, solve
from cost_model.model.weight_units import experts_per_unit
from cost_model.planner.what_if import Advice, compressed, most_gaining
from cost_model.timing.problem import Problem
from policies.common.errors import InfeasibleError
from tests.support.sweeps import SMALL as SIX_LAYERS

SMALL = replace(SIX_LAYERS, num_layers=2)
JOB = Workload(prompt_len=64, gen_len=16, num_requests=200)
QUICK = 0.01
#: What is decided already, so that the search is short.
GIVEN = {"schedule": "rolling", "gpu_batch_size": 16}


def machine(*, memory, disk_bytes_per_s=5e8, unpack_s=1e-13):
    """A CPU whose host memory holds so many GiB of what is placed, and whose disk and unpacking are so fast."""
    cpu = replace(Hardware.preset("cpu"), process_bytes=0, disk_read_bytes_per_s=disk_bytes_per_s, disk_read_curve=())
    gpu = replace(cpu.gpu, unpack_s=dict.fromkeys(("int4", "int8", "fp8", "mxfp4"), unpack_s))
    return replace(cpu, gpus=(gpu,)).with_budgets(memory_limit=memory)


#: The weights are on disk, or all of them in memory where unpacking takes longer than anything else.
ON_DISK, RESIDENT = machine(memory=0.1), machine(memory=8, unpack_s=1e-8)


def found(hardware, *, fixed=None, **options):
    return solve(SMALL, hardware, JOB, fixed=Fixed(**GIVEN | (fixed or {})), effort=QUICK, **options)


@pytest.fixture(scope="module")
def plain():
    """The plan on the machine whose weights are on disk, with advice."""
    return found(ON_DISK, advice=True)


def test_weights_are_packed_where_that_gains_and_it_is_allowed(plain):
    packed = found(ON_DISK, allow_compression=True)
    assert plain.policy.compress_weight is None and not plain.policy.compress_cache
    assert packed.policy.compress_weight in ("int4", "mxfp4")
    assert packed.prediction.tokens_per_s > 1.5 * plain.prediction.tokens_per_s


@pytest.mark.slow
def test_nothing_is_compressed_that_loses():
    kept = found(RESIDENT, allow_compression=True, advice=True)
    assert kept.policy.compress_weight is None
    assert not [each for each in kept.explanation.advice if "weights" in each.change]


@pytest.mark.slow
def test_what_is_asked_for_is_not_chosen_otherwise(plain):
    plan = found(ON_DISK, fixed={"compress_weight": "int8"}, allow_compression=True, advice=True)
    assert plan.policy.compress_weight == "int8" and plan.prediction.tokens_per_s > plain.prediction.tokens_per_s
    assert not [each for each in plan.explanation.advice if "weights" in each.change]


def test_where_nothing_fits_what_changes_numbers_least_makes_it_fit():
    small = replace(ON_DISK, disk_bytes=int(0.8 * SMALL.total_bytes))
    assert found(small, allow_compression=True).policy.compress_weight == "int8"
    with pytest.raises(InfeasibleError):
        found(small)


def test_advice_says_what_is_gained_and_how_to_ask_for_it(plain):
    told = {each.change: each for each in plain.explanation.advice}
    assert told["int4 weights"].gain > told["int8 weights"].gain > 0.3
    assert told["int4 weights"].describe(10.0).startswith("int4 weights: at least ")
    assert told["int4 weights"].describe(10.0).endswith("; ask by compress_weight='int4'")


def test_speed_is_told_of_what_can_be_asked_for_alone():
    asked = Advice(change="int8 KV", tokens_per_s=1.0, gain=0.5, ask="compress_cache=True")
    assert asked.describe(20.0) == "int8 KV: at least 30 tokens/s, +50 %; ask by compress_cache=True"
    assert replace(asked, ask="", gain=1.5).describe(20.0) == "int8 KV: 2.5x"


def test_a_packed_model_is_not_packed_again(plain):
    problem = Problem.of(SMALL, ON_DISK, JOB)
    changes = [each.change for each in compressed(problem, Fixed())]
    assert changes == ["int8 KV", "int8 weights", "fp8 weights", "int4 weights", "mxfp4 weights", *["int8 KV"] * 4]
    packed = next(compressed(problem, Fixed(compress_cache=True))).problem
    assert [each.change for each in compressed(packed, Fixed())] == ["int8 KV"]
    assert not list(compressed(packed, Fixed(compress_cache=True)))
    assert most_gaining(packed, Fixed(compress_cache=True), plain.policy) is None


def test_units_of_packed_weights_have_the_size_that_suits_them():
    qwen = ModelArch.from_name("qwen3-30b-a3b")
    problem = Problem.of(qwen, Hardware.preset("rtx4090"), JOB)
    own, kept = Fixed(compress_cache=True), Fixed(compress_cache=True, expert_order=((0,),))
    sizes = {each.change: experts_per_unit(each.problem.arch) for each in compressed(problem, own)}
    assert sizes["int4 weights"] > sizes["int8 weights"] > experts_per_unit(qwen)
    assert {experts_per_unit(each.problem.arch) for each in compressed(problem, kept)} == {experts_per_unit(qwen)}
