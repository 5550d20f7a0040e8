"""Two half-blocks: the slots that they hold, their bytes, and how long a sweep of them takes."""

import random
import statistics
from dataclasses import replace

import pytest

from cost_model.memory.allocation import allocate, residency
from cost_model.memory.memory_plan import plan_memory
from cost_model.model.weight_units import head_chunks
from cost_model.simulation.replay import Replayer
from cost_model.timing.sweep_bounds import sweep_time
from policies import Policy, Workload
from policies.schedule import SweepUnits
from tests.support.sweeps import MANY_EXPERTS, MIXTRAL, RESIDENT, SMALL, costs_of, decoding, random_sweep

STREAMED = (20, 80, 0, 100, 100, 0)


@pytest.mark.parametrize(
    "arch, sweeps", [(MIXTRAL, 20), (SMALL, 60), (MANY_EXPERTS, 60)], ids=["8x7b", "small", "many"]
)
def test_closed_form_agrees_with_the_walk(arch, sweeps):
    """The tolerance of blocks that march as one."""
    rng, ratios = random.Random(3), []
    for _ in range(sweeps):
        costs, policy, load = random_sweep(rng, arch=arch, half_blocks=2)
        replayed_s, _ = Replayer(costs, policy.gpu_batch_size).steady(load)
        ratios.append(replayed_s / sweep_time(costs, load, policy.gpu_batch_size).total_s)
    apart = sorted(abs(ratio - 1) for ratio in ratios)
    assert statistics.median(apart) <= 0.01
    assert apart[int(0.8 * len(apart))] <= 0.08
    assert sorted(ratios)[len(ratios) // 20] >= 0.98


def test_two_halves_hide_cpu_attention_behind_experts():
    """All that is left beside the slower lane is the work of the host between sweeps, and the ends of a sweep of few layers."""
    load, arch = decoding(4096, context=100, cpu=4096), replace(MIXTRAL, num_layers=8)
    percent = (100, 0, 0, 100, 100, 0)
    (one, policy), (two, _) = (
        costs_of(percent, arch=arch, rows=512, batches=8, half_blocks=halves, cpu_attention_percent=100)
        for halves in (1, 2)
    )
    lanes = sweep_time(one, load, policy.gpu_batch_size).lanes_s
    assert 0.7 < lanes["gpu"] / lanes["cpu"] < 1
    seconds = [Replayer(costs, policy.gpu_batch_size).steady(load)[0] for costs in (one, two)]
    assert seconds[0] > 0.95 * (lanes["gpu"] + lanes["cpu"])
    assert seconds[1] < 1.07 * lanes["cpu"] + two.host_s(4096)


def fetching(machine, percent, fetched):
    """A sweep of two half-blocks of four batches each, of which the first ones have rows whose KV is fetched."""
    load, arch = decoding(4096, context=400, fetch=fetched, cpu=4096 - fetched), replace(MIXTRAL, num_layers=6)
    cpu_percent = 100 * (4096 - fetched) / 4096
    costs, policy = costs_of(
        percent, arch=arch, machine=machine, rows=512, batches=8, half_blocks=2, cpu_attention_percent=cpu_percent
    )
    closed = sweep_time(costs, load, policy.gpu_batch_size)
    return costs, closed, Replayer(costs, policy.gpu_batch_size).steady(load)[0]


def test_fetched_kv_comes_while_the_cpu_attends_other_batches_of_two_halves():
    """Neither waits for the other, though few batches fetch: the slower one, the CPU, is all that is left beside the host's work."""
    costs, closed, replayed_s = fetching("rtx4090", (100, 0, 0, 100, 100, 0), 800)
    lanes = closed.bounds_s
    assert 0.6 < lanes["kv loads"] / lanes["cpu"] < 1
    assert closed.total_s < 1.1 * (lanes["cpu"] + costs.host_s(4096))
    assert replayed_s < 1.1 * (lanes["cpu"] + costs.host_s(4096))


def test_kv_is_fetched_more_slowly_while_weights_are_moved():
    """The thread that fetches it is busy all the time, the link is not."""
    costs, closed, replayed_s = fetching("a5000", (60, 40, 0, 100, 100, 0), 2400)
    alone_s = fetching("a5000", (100, 0, 0, 100, 100, 0), 2400)[1].bounds_s["kv loads"]
    assert closed.bounds_s["kv loads"] > 1.1 * alone_s > 1.1 * closed.bounds_s["pcie"]
    assert closed.total_s <= replayed_s < 1.05 * closed.total_s


def test_weights_cross_the_link_once_a_sweep_whether_the_block_is_cut_or_not():
    load = decoding(96, cpu=96)
    for halves in (1, 2):
        costs, policy = costs_of((0, 100, 0, 100, 100, 0), rows=16, batches=6, half_blocks=halves)
        spans = Replayer(costs, policy.gpu_batch_size).replay([load], keep_spans=True).spans
        copied = [name for track, name, *_ in spans if track == "h2d"]
        assert len(copied) >= len(set(copied)) == sum(costs.streamed("cpu")[at][0] for at in range(3))


def test_a_sweep_marches_as_one_where_nothing_can_be_hidden():
    """As `policies.schedule` has it."""
    streamed, _ = costs_of((5, 95, 100, 0, 100, 0), arch=MANY_EXPERTS, half_blocks=2)
    resident, _ = costs_of(RESIDENT, arch=MANY_EXPERTS, half_blocks=2)
    demand = streamed.routing.on_demand(2)
    assert demand is not None
    for costs, load, on_demand, halves in (
        (streamed, decoding(24), None, 2),
        (streamed, decoding(8), None, 1),  # one GPU batch
        (streamed, decoding(24), demand, 1),
        (resident, decoding(24), None, 1),
        (resident, decoding(24, cpu=12, gpu=12), None, 2),
    ):
        assert len(costs.cut(load, 8, on_demand)) == halves


def test_on_the_cpu_a_sweep_of_few_tokens_marches_as_one():
    """Experts are bound by their weights there, so over two halves they would take twice as long."""
    costs, policy = costs_of((5, 95, 100, 0, 100, 0), machine="cpu", rows=512, batches=8, half_blocks=2)
    few, many = decoding(1000), decoding(1024)  # of 8 experts, 2 for each token
    assert [len(costs.cut(load, policy.gpu_batch_size, None)) for load in (few, many)] == [1, 2]
    alone, _ = costs_of((5, 95, 100, 0, 100, 0), machine="cpu", rows=512, batches=8)
    took = [Replayer(each, policy.gpu_batch_size).steady(few)[0] for each in (costs, alone)]
    assert took[0] == pytest.approx(took[1])


def test_the_host_books_the_first_half_while_the_second_one_computes():
    """In closed form and in the walk: what is left at the end of a sweep is less by the part of its rows."""
    load = decoding(4096, context=100, cpu=4096)
    costs, policy = costs_of(
        (100, 0, 0, 100, 100, 0),
        arch=replace(MIXTRAL, num_layers=8),
        rows=512,
        batches=8,
        half_blocks=2,
        cpu_attention_percent=100,
        hardware={"row_s": 2e-5},
    )
    seconds = {}
    for within in (True, False):
        costs.booked_s = lambda rows, within=within: 0.3 * rows * 2e-5 * within
        closed_s = sweep_time(costs, load, policy.gpu_batch_size).total_s
        seconds[within] = closed_s, Replayer(costs, policy.gpu_batch_size).steady(load)[0]
    (closed_s, walked_s), (closed_before_s, walked_before_s) = seconds[True], seconds[False]
    booked_s = 0.3 * 2048 * 2e-5
    assert closed_before_s - closed_s == pytest.approx(booked_s, rel=0.01)
    assert walked_before_s - walked_s == pytest.approx(booked_s, rel=0.1)


def test_the_head_is_computed_for_each_half_where_it_is_not_streamed():
    """Twice over half of the rows; a streamed one once, over all."""
    load = decoding(4096, cpu=4096)
    for percent, parts in ((0, 1), (100, 2)):
        costs, policy = costs_of(
            (percent, 100 - percent, 0, 100, 100, 0), arch=MANY_EXPERTS, rows=1024, batches=4, half_blocks=2
        )
        head = head_chunks(MANY_EXPERTS)
        assert head > 2
        assert costs.allocation.head_in_halves == (parts == 2)
        halves = costs.cut(load, policy.gpu_batch_size, None)
        assert costs.part_shares(halves) == ([0.5, 0.5] if parts == 2 else [1.0])
        spans = Replayer(costs, policy.gpu_batch_size).replay([load], keep_spans=True).spans
        names = [name for track, name, *_ in spans if track == "gpu"]
        assert sum(name.startswith("head") for name in names) == parts * head
        assert sum(name.startswith("sample") for name in names) == parts


def random_policy(rng, halves):
    w_gpu = rng.choice([0.0, rng.uniform(0, 100)])
    return Policy.from_percent(
        (w_gpu, rng.uniform(0, 100 - w_gpu), 100, 0, 100, 0),
        gpu_batch_size=8,
        num_gpu_batches=4,
        prompt_len=64,
        gen_len=32,
        half_blocks=halves,
        weight_slots=rng.choice([None, 2, 5]),
    )


@pytest.mark.parametrize("dense", [(), (0,), (1, 4)], ids=str)
def test_slots_hold_every_layer_and_what_comes_ahead(dense):
    rng, arch = random.Random(1), replace(SMALL, dense_layers=dense, dense_ffn=3584 if dense else 0)
    for _ in range(40):
        policy = random_policy(rng, 2)
        allocation = allocate(arch, policy, Workload(prompt_len=64, gen_len=32), device="cuda")
        alone = allocate(arch, replace(policy, half_blocks=1), Workload(prompt_len=64, gen_len=32), device="cuda")
        units = SweepUnits.of(allocation.placement.tier_of)
        away = [sum(step.tier != "gpu" for step in experts) for experts in units.experts]
        attention = [step.tier != "gpu" for step in units.attention] + [False]
        most = max(count + attention[at] for at, count in enumerate(away))
        needed = max(count + attention[at] + attention[at + 1] for at, count in enumerate(away))
        streamed = len(units.streamed())
        assert most <= allocation.held_slots <= most + 1 and allocation.slots >= min(streamed, needed)
        assert allocation.slots == min(streamed, allocation.held_slots + alone.slots) or allocation.slots == streamed
        assert alone.held_slots == 0


def test_the_plan_counts_the_slots_of_a_layer_and_what_waits_beside_the_experts():
    workload, arch = Workload(prompt_len=64, gen_len=32), replace(MIXTRAL, vocab_size=512)
    plans = []
    for halves in (1, 2):
        policy = Policy.from_percent(
            STREAMED,
            gpu_batch_size=64,
            num_gpu_batches=32,
            prompt_len=64,
            gen_len=32,
            prefill_tokens=64,
            half_blocks=halves,
        )
        allocation = allocate(arch, policy, workload, device="cuda", longest_row=96)
        plans.append(plan_memory(arch, policy, allocation, device="cuda", compute_bytes=2).parts["gpu"])
    one, two = plans
    unit = residency(arch).largest_streamed_bytes(100)
    assert two["slots"] - one["slots"] >= 6 * unit
    assert two["workspace"] > one["workspace"]
    assert {name: size for name, size in two.items() if name not in ("slots", "workspace")} == {
        name: size for name, size in one.items() if name not in ("slots", "workspace")
    }
