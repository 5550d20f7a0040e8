"""What the planner makes of units of small experts that the runtime computes by grouped products."""

from dataclasses import replace

import pytest

from cost_model.hardware.hardware import Hardware
from cost_model.model.weight_units import GROUPED_TOKENS, are_grouped, experts_per_unit
from cost_model.planner.constraints import Choice, Fixed
from cost_model.planner.lp import Programme
from cost_model.simulation.replay import Replayer
from cost_model.timing.evaluate import evaluate
from cost_model.timing.problem import Problem
from cost_model.timing.sweep_bounds import sweep_time
from policies import Workload
from tests.support.sweeps import MANY_EXPERTS, MIXTRAL, RESIDENT, costs_of, decoding

#: Mean tokens of an expert are an eighth of the block's.
MOST = GROUPED_TOKENS * MANY_EXPERTS.num_experts // MANY_EXPERTS.top_k
#: Links that hide behind the experts.
FAST_LINKS = {"disk_read_bytes_per_s": 1e12, "disk_read_core_s_per_byte": 0.0, "h2d_core_s_per_byte": 0.0}
HOST, DISK, HALF_ON_DISK = (0, 100, 100, 0, 100, 0), (0, 0, 100, 0, 100, 0), (50, 0, 100, 0, 100, 0)


def twice(curve):
    return replace(curve, flops_per_s=tuple(tuple(2 * rate for rate in row) for row in curve.flops_per_s))


def machine(device):
    """A preset, and the same where grouped products are twice as fast as one expert at a time."""
    plain = Hardware.preset("cpu" if device == "cpu" else "rtx4090")
    curves = {number: twice(curve) for number, curve in plain.gpu.experts.items()}
    return plain, replace(plain, gpus=(replace(plain.gpu, grouped_experts=curves),))


def both(percent, device="cpu", arch=MANY_EXPERTS, **rest):
    """Costs without and with a curve of grouped products."""
    plain, grouped = machine(device)
    name, curves = plain.name, {"grouped_experts": grouped.gpu.grouped_experts}
    return costs_of(percent, arch=arch, machine=name, **rest), costs_of(
        percent, arch=arch, machine=name, gpu=curves, **rest
    )


def test_units_of_several_experts_with_few_tokens_and_whole_rows_are_grouped():
    assert experts_per_unit(MANY_EXPERTS) > 1 and are_grouped(MANY_EXPERTS, 2, MOST)
    assert not are_grouped(MANY_EXPERTS, 2, MOST + 1)
    assert not are_grouped(MANY_EXPERTS.grouped(1), 2, 8)
    assert not are_grouped(MIXTRAL, 2, 8)
    odd = replace(MANY_EXPERTS, ffn=MANY_EXPERTS.ffn + 4)
    assert not are_grouped(odd, 2, 8) and are_grouped(odd, 4, 8), "rows of a multiple of 16 bytes"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("percent", [RESIDENT, HOST])
def test_stacked_experts_with_few_tokens_take_what_grouped_products_take(device, percent):
    (plain, _), (grouped, _) = both(percent, device)
    for tokens in (1, 64, MOST):
        assert grouped.reached_expert_s(tokens) == pytest.approx(plain.reached_expert_s(tokens) / 2)


@pytest.mark.parametrize(
    ("arch", "tokens"),
    [(MANY_EXPERTS, MOST + 1), (MANY_EXPERTS.grouped(1), 64), (MIXTRAL, 64)],
    ids=["many", "one", "large"],
)
def test_many_tokens_and_units_of_one_expert_take_exactly_what_they_took(arch, tokens):
    (plain, policy), (grouped, _) = both(RESIDENT, arch=arch)
    assert grouped.reached_expert_s(tokens) == plain.reached_expert_s(tokens)
    load = decoding(tokens)
    assert sweep_time(grouped, load, policy.gpu_batch_size) == sweep_time(plain, load, policy.gpu_batch_size)


def test_without_a_curve_of_the_compute_dtype_one_expert_at_a_time_is_charged():
    plain, grouped = machine("cpu")
    other = {"grouped_experts": {4: grouped.gpu.grouped_experts[4]}}
    costs, _ = costs_of(RESIDENT, arch=MANY_EXPERTS, machine=plain.name, gpu=other)
    (before, _), _ = both(RESIDENT)
    assert costs.reached_expert_s(64) == before.reached_expert_s(64)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("percent", [RESIDENT, HALF_ON_DISK, DISK])
def test_a_unit_is_grouped_wherever_it_comes_from(percent, device):
    (plain, _), (grouped, _) = both(percent, device)
    assert grouped.reached_expert_s(64) == pytest.approx(plain.reached_expert_s(64) / 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_experts_that_come_on_demand_are_computed_together_on_the_cpu_and_one_by_one_on_a_gpu(device):
    (plain, _), (grouped, _) = both(HALF_ON_DISK, device)
    demand = plain.routing.on_demand(2)
    before, now = plain.demanded(demand, 2), grouped.demanded(grouped.routing.on_demand(2), 2)
    assert now.read_s == before.read_s and now.unit_s == pytest.approx(before.unit_s / 2)
    if device == "cuda":
        assert (now.ahead_s, now.last_s) == (before.ahead_s, before.last_s)
    else:
        assert now.last_s == pytest.approx(before.last_s / 2) and now.ahead_s < before.ahead_s


@pytest.mark.parametrize("percent", [RESIDENT, HALF_ON_DISK])
@pytest.mark.parametrize("rows", [96, 256])
def test_closed_form_and_walk_agree_on_grouped_units(percent, rows):
    (plain, _), (grouped, _) = both(percent, rows=rows, batches=1, hardware=FAST_LINKS)
    load = decoding(rows)
    replayed_s, _ = Replayer(grouped, rows).steady(load)
    closed_s = sweep_time(grouped, load, rows).total_s
    assert replayed_s == pytest.approx(closed_s, rel=0.05)
    assert closed_s < 0.95 * sweep_time(plain, load, rows).total_s


@pytest.mark.parametrize("percent", [RESIDENT, DISK])
def test_the_programme_agrees_with_the_closed_form_on_grouped_units(percent):
    """A block that is decided, where experts take the longest."""
    job, found, predicted = Workload(prompt_len=16, gen_len=64, num_requests=64), [], []
    for hardware in (replace(each, **FAST_LINKS) for each in machine("cpu")):
        problem = Problem(arch=MANY_EXPERTS, hardware=hardware, workload=job, dtype_bytes=2)
        choice = Choice(
            schedule="static",
            fill_sweeps=1,
            gpu_batch_size=64,
            modes=("gpu",),
            rows=64,
            most_rows=64,
            streams=percent is DISK,
        )
        fixed = Fixed(w_gpu_percent=percent[0], w_cpu_percent=0)
        found.append(Programme(problem, choice, fixed).solve().tokens_per_s)
        policy = replace(choice.policy(job, 64, "gpu"), w_gpu_percent=percent[0], w_cpu_percent=0)
        predicted.append(evaluate(MANY_EXPERTS, hardware, job, policy, on_demand=False).tokens_per_s)
    assert found == pytest.approx(predicted, rel=0.05)
    assert found[1] > 1.3 * found[0]
