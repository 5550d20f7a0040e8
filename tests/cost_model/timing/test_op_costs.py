"""Seconds of single operations: transfers by the size of each, and the head over prompts that are scored."""

from dataclasses import replace

import pytest

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import allocate, single_expert_bytes
from cost_model.memory.memory_plan import SCORED_LOGIT_BYTES, scored_at_once
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import head_chunks, units_of
from cost_model.planner.constraints import Choice
from cost_model.planner.linearize import Slopes
from cost_model.planner.solve import solve
from cost_model.routing.demand import Demand
from cost_model.simulation.replay import Replayer
from cost_model.simulation.simulate import simulate
from cost_model.timing.op_costs import Costs
from cost_model.timing.problem import Problem
from cost_model.timing.sweep_bounds import sweep_time
from cost_model.timing.sweep_load import BatchLoad
from policies import Policy, Workload
from tests.support.sweeps import MANY_EXPERTS, SMALL, costs_of, decoding

MIB = 1 << 20
#: Small transfers are slow, a tenth and a fifth of the best.
UP, READ = ((MIB, 2e9), (64 * MIB, 20e9)), ((MIB, 1e9), (64 * MIB, 5e9))
BY_SIZE = {
    "gpu": {"h2d_curve": UP, "h2d_bytes_per_s": 20e9, "h2d_busy_latency_s": 0.0},
    "hardware": {"disk_read_curve": READ},
}
ONE = MANY_EXPERTS.grouped(1)


def seconds_of(costs, seconds, tier):
    """Every unit of a tier that passes through a slot, moved by itself."""
    homes = costs.allocation.placement.tier_of
    moved = [unit for unit in units_of(costs.arch) if homes[unit.id] == tier and unit.kind != "embed"]
    return sum(seconds(unit.stored_bytes) for unit in moved)


def test_a_transfer_takes_the_rate_of_its_size():
    costs, _ = costs_of((0, 50, 100, 0, 100, 0), **BY_SIZE)
    assert costs.copy_s(MIB) == MIB / 2e9 and costs.copy_s(64 * MIB) == 64 * MIB / 20e9
    assert costs.copy_s(8 * MIB) == pytest.approx(8 * MIB / 11e9)  # half-way between the two in the logarithm
    assert costs.read_s(MIB) == MIB / 1e9 and costs.read_s(10 * MIB, 10) == pytest.approx(10 * MIB / 1e9)
    batch = BatchLoad(tokens=MIB / costs.arch.hidden / costs.arch.dtype_bytes)
    assert costs.load_act_s(batch) == pytest.approx(costs.hardware.handoff_s + MIB / 2e9)
    assert costs.read_act_s(batch) == pytest.approx(costs.disk_wait_s + MIB / 1e9)


def test_small_copies_up_wait_for_weights_that_are_under_way_and_only_for_those():
    waits, none = ({"gpu": {"h2d_busy_latency_s": seconds}} for seconds in (1e-3, 0.0))
    batch = BatchLoad(tokens=8, new={"gpu": 0, "fetch": 0, "disk": 0, "cpu": 8})
    for weights_on_gpu, waited_s in ((40, 1e-3), (100, 0.0)):
        placed = (weights_on_gpu, 100 - weights_on_gpu, 0, 100, 0, 100)
        (slow, _), (quick, _) = (costs_of(placed, cpu_attention_percent=100, **more) for more in (waits, none))
        for name in ("attended_s", "load_act_s"):
            assert getattr(slow, name)(batch) - getattr(quick, name)(batch) == pytest.approx(waited_s), name
        assert slow.attended_s(BatchLoad(tokens=8)) == 0


@pytest.mark.parametrize("machine", ["rtx4090", "cpu"])
@pytest.mark.parametrize("arch", [SMALL, ONE])
def test_a_sweep_moves_every_streamed_unit_at_the_rate_of_its_size(machine, arch):
    costs, policy = costs_of((10, 40, 100, 0, 100, 0), arch=arch, machine=machine, **BY_SIZE)
    closed = sweep_time(costs, decoding(500), policy.gpu_batch_size)
    copied = [seconds_of(costs, costs.copy_s, tier) for tier in ("cpu", "disk")][: 2 if machine != "cpu" else 1]
    assert closed.bounds_s["disk_read"] == pytest.approx(seconds_of(costs, costs.read_s, "disk"))
    slower = closed.bounds_s["h2d"] / sum(copied)  # on device cpu, for a core that is shared
    assert slower == pytest.approx(1) if machine != "cpu" else slower >= 1 - 1e-9
    _, lanes_s = Replayer(costs, policy.gpu_batch_size).steady(decoding(500))
    assert lanes_s["disk_read"] >= 0.999 * seconds_of(costs, costs.read_s, "disk")


def test_experts_on_demand_are_moved_one_at_a_time():
    costs, _ = costs_of((0, 50, 100, 0, 100, 0), arch=MANY_EXPERTS, machine="cpu", **BY_SIZE)
    each = single_expert_bytes(MANY_EXPERTS)
    assert 8 * MIB < each < 10 * MIB
    layers = frozenset(range(5))
    demand = Demand(
        layers=layers,
        disk_layers=5,
        host_bytes=20 * each,
        disk_bytes=10 * each,
        missed=30,
        streamed=30,
        resident=0,
        resident_units=0,
    )
    own = costs.demanded(demand, 1.0)
    assert own.read_s == pytest.approx(2 * costs.read_s(each)) and own.copy_s == pytest.approx(4 * costs.copy_s(each))


def test_cores_pay_for_bytes_and_not_for_the_wait_of_small_units():
    slow = {**BY_SIZE["hardware"], "disk_read_core_s_per_byte": 1e-10}
    costs, _ = costs_of((50, 0, 100, 0, 100, 0), arch=ONE, machine="cpu", hardware=slow)
    nbytes = costs.allocation.placement.bytes_of("disk", "attention", "expert", "head")
    core_s = costs.lane_share["disk_read"] * costs.hardware.cores * seconds_of(costs, costs.read_s, "disk")
    assert core_s == pytest.approx(1e-10 * nbytes)


@pytest.mark.slow
def test_the_linear_programme_streams_at_the_rate_of_a_mean_unit():
    machine = Hardware.preset("rtx4090")
    machine = replace(machine, gpus=(replace(machine.gpu, memory_bytes=8 << 30, h2d_curve=UP, op_s=0.0),))
    job = Workload(prompt_len=64, gen_len=32)
    flat = replace(machine, gpus=(replace(machine.gpu, h2d_curve=()),))
    fast, slow = (
        solve(ModelArch.from_name("mixtral-8x7b"), hw, job, effort=0.05).explanation for hw in (flat, machine)
    )
    assert slow.lp_tokens_per_s != fast.lp_tokens_per_s
    policy = Policy.from_percent((5, 0, 100, 0, 100, 0), gpu_batch_size=8, num_gpu_batches=1, prompt_len=64, gen_len=32)
    allocation = allocate(SMALL, policy, job, device="cuda", longest_row=job.longest_row)
    costs = Costs(SMALL, machine, policy, allocation, 2)
    moved = [
        u.stored_bytes for u in units_of(SMALL) if allocation.placement.tier_of[u.id] != "gpu" and u.kind != "embed"
    ]
    assert costs.stream_bytes_per_s["h2d"] == pytest.approx(sum(moved) / sum(map(costs.copy_s, moved)), rel=0.01)


# Prompts that are scored.


def scoring(scored, score_s=2e-9):
    """A block of eight prompts of 64 tokens, one sweep."""
    machine = Hardware.preset("cpu")
    machine = replace(machine, gpus=(replace(machine.gpu, score_s=score_s),))
    job = Workload(prompt_len=64, gen_len=1, num_requests=8, scored_tokens=scored)
    policy = Policy.from_percent(
        (100, 0, 100, 0, 100, 0), gpu_batch_size=8, num_gpu_batches=1, prompt_len=64, gen_len=1
    )
    return Problem.of(SMALL, machine, job), policy


def test_scored_positions_pass_the_head_and_are_reduced_to_a_number_each():
    problem, policy = scoring(64)
    plain, _ = scoring(0)
    costs = problem.costs(policy, problem.allocate(policy))
    chunks = head_chunks(SMALL)
    each = SMALL.embed_params / chunks
    extra = chunks * costs.head_s(0, each, 8 * 64)
    assert extra == pytest.approx(chunks * costs.expert_s(512, each) + 512 * SMALL.vocab_size * 2e-9)
    took = [simulate(p.arch, p.hardware, p.workload, policy, full=True).job_s for p in (problem, plain)]
    assert took[0] - took[1] == pytest.approx(extra, rel=1e-3) and took[0] > 1.1 * took[1]


def test_scored_positions_take_the_rate_of_as_many_as_are_computed_at_a_time():
    problem, policy = scoring(64)
    policy = replace(policy, prefill_tokens=16)
    allocation = problem.allocate(policy)
    at_once = scored_at_once(SMALL, policy, allocation, device="cpu", compute_bytes=2)
    costs, each = problem.costs(policy, allocation), SMALL.embed_params / head_chunks(SMALL)
    positions = 16 * at_once
    products_s = costs.head_s(0, each, positions) - positions * each / SMALL.head_row_params * 2e-9
    assert products_s == pytest.approx(16 * costs.expert_s(at_once, each))
    assert products_s > 1.01 * costs.expert_s(positions, each)


def test_scoring_takes_the_room_that_attention_and_experts_leave():
    problem, policy = scoring(64)
    allocation = problem.allocate(policy)
    at_once = scored_at_once(SMALL, policy, allocation, device="cpu", compute_bytes=2)
    plan = problem.memory(policy, allocation)
    beside = policy.block_size * (SMALL.vocab_size + 2 * SMALL.hidden) * 2
    room = plan.parts["gpu"]["workspace"] - beside
    assert 16 <= at_once <= room // (SCORED_LOGIT_BYTES * SMALL.vocab_size // head_chunks(SMALL))


def test_half_of_the_prompt_scored_takes_half_as_long():
    half, whole = (scoring(count) for count in (32, 64))
    found = [p.costs(q, p.allocate(q)).head_s(0, 1e6, 10_000) for p, q in (half, whole)]
    assert found[0] == pytest.approx(found[1] / 2, rel=1e-6)


def test_the_linear_programme_counts_scored_positions():
    choice = Choice(schedule="static", fill_sweeps=1.0, gpu_batch_size=8, modes=("gpu",), rows=8, streams=False)
    heads = []
    for count in (0, 64):
        problem, _ = scoring(count)
        slopes = Slopes(problem, choice)
        heads.append(max(line.fixed + 8 * line.per_row for line in slopes.phases[0].head_s))
        costs = slopes.costs
    chunks = head_chunks(SMALL)
    assert heads[1] - heads[0] == pytest.approx(chunks * costs.head_s(0, SMALL.embed_params / chunks, 512), rel=1e-6)


# Host weights that are not pinned.


@pytest.mark.parametrize("pinned", [True, False])
def test_without_overlap_a_sweep_takes_all_copies_in_turn(pinned):
    costs, policy = costs_of((10, 60, 100, 0, 100, 0), overlap=False, pin_weight=pinned)
    closed = sweep_time(costs, decoding(24), policy.gpu_batch_size)
    replayed_s, _ = Replayer(costs, policy.gpu_batch_size).steady(decoding(24))
    assert closed.total_s == pytest.approx(replayed_s, rel=0.02)


def test_copies_to_pinned_buffers_take_their_part_of_host_memory():
    slow = {"hardware": {"host_bytes_per_s": 60e9}}
    bounds = {}
    for pinned in (True, False):
        costs, policy = costs_of((0, 100, 100, 0, 100, 0), pin_weight=pinned, **slow)
        bounds[pinned] = sweep_time(costs, decoding(24), policy.gpu_batch_size).bounds_s["host memory"]
    copied_s, rate = seconds_of(costs, costs.copy_s, "cpu"), costs.hardware.gpu.h2d_bytes_per_s
    assert bounds[True] == pytest.approx(copied_s * rate / 60e9)
    assert bounds[False] == pytest.approx(
        copied_s * (rate / 60e9 + min(1.0, 3 * rate / 60e9))
    )  # read, written and read
