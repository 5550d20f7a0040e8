"""Admission, restarts and places, with a KV cache of one number per token and no model."""

import random

import pytest

from cost_model.memory.allocation import PAGE_TOKENS, kv_pages_per_tier, kv_tokens_wanted
from cost_model.model.arch import LayerGroup
from policies import Policy, Workload
from policies.admission.row_state import AttentionMode
from policies.placement import TIERS
from tests.support.scheduling import CPU_KV, DISK_KV, GPU_KV, MIXED_KV, Simulation, pages, policy

FETCH, CPU = AttentionMode.FETCH, AttentionMode.CPU


def test_a_finished_row_is_replaced_in_the_next_sweep_and_its_pages_are_free():
    sim = Simulation(policy(rows=2, prefill_tokens=64), pages(gpu=6))
    first, second, third = sim.submit(32, 2), sim.submit(32, 9), sim.submit(32, 3)
    assert [run.owner for run in sim.sweep()] == [first, second]
    assert [run.owner for run in sim.sweep()] == [first, second]
    assert sim.done == [first] and first.kv is None
    runs = sim.sweep()
    assert [run.owner for run in runs] == [second, third]
    assert [len(run.tokens) for run in runs] == [1, 32], "prefill and decode share the sweep"


def test_no_more_than_prefill_tokens_prompt_tokens_enter_a_sweep():
    rng = random.Random(0)
    sim = Simulation(policy(rows=16, prefill_tokens=40), pages(gpu=400))
    rows = [sim.submit(rng.choice((1, 2, 39, 40, 41, 81, 100, 200)), rng.randint(1, 20)) for _ in range(150)]
    sim.run()
    assert max(s["prompt"] for s in sim.sweeps) <= 40
    assert sum(s["prompt"] for s in sim.sweeps) == sum(len(r.request.prompt_token_ids) for r in rows)


def test_a_prompt_longer_than_the_pace_enters_in_chunks_and_only_the_last_one_wants_logits():
    sim = Simulation(policy(prefill_tokens=40), pages(gpu=20))
    sim.submit(100, 2)
    seen = [[(len(run.tokens), run.logits) for run in sim.sweep()] for _ in range(4)]
    assert seen == [[(40, 0)], [(40, 0)], [(20, 1)], [(1, 1)]]


def test_rows_enter_in_the_order_in_which_they_were_submitted():
    rng = random.Random(1)
    sim = Simulation(policy(rows=5, prefill_tokens=50), pages(gpu=30))
    rows = [sim.submit(rng.randint(1, 90), rng.randint(1, 20)) for _ in range(40)]
    sim.run()
    entered = list(dict.fromkeys(run.owner for s in sim.sweeps for run in s["runs"]))
    assert entered == rows


def test_a_static_block_starts_and_ends_together():
    sim = Simulation(policy(rows=4, schedule="static"), pages(gpu=40))
    rows = [sim.submit(32, 5) for _ in range(10)]
    sim.run()
    assert [s["rows"] for s in sim.sweeps] == [4] * 5 + [4] * 5 + [2] * 5
    assert sim.done == rows


def test_a_static_block_takes_no_new_rows_once_a_row_has_ended():
    sim = Simulation(policy(rows=3, schedule="static"), pages(gpu=40))
    for gen in (2, 6, 6, 6):
        sim.submit(32, gen)
    sim.run()
    assert [s["rows"] for s in sim.sweeps] == [3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("schedule", ("rolling", "static"))
@pytest.mark.parametrize(
    "percent, tiers",
    [
        (GPU_KV, pages(gpu=60)),
        (CPU_KV, pages(cpu=60)),
        (DISK_KV, pages(disk=60)),
        (MIXED_KV, pages(gpu=20, cpu=24, disk=26)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_known_ends_never_exhaust_a_tier_nor_exceed_the_projected_peak(percent, tiers, schedule, seed, tmp_path):
    rng = random.Random(seed)
    sim = Simulation(
        policy(percent, rows=12, schedule=schedule, prefill_tokens=rng.choice((17, 48, 300))),
        tiers,
        tails=5,
        tmp_path=tmp_path,
    )
    longest = max(tiers.values()) * PAGE_TOKENS
    for _ in range(120):
        prompt = rng.choice((1, 2, 15, 16, 17, rng.randint(1, 150)))
        gen = rng.randint(1, 60)
        sim.submit(prompt, min(gen, longest - prompt), ends=rng.choice((None, rng.randint(1, gen))))
    while sim.scheduler.running or sim.scheduler.waiting:
        runs = sim.scheduler.plan_sweep()
        for tier in TIERS:
            assert sim.used(tier) <= sim.scheduler.admission.projected_peak(tier) <= sim.cache.total(tier)
        for run in runs:
            sim.scheduler.commit(run.owner, 2 if run.logits else None)
        for run in runs:
            if run.logits and run.owner.generated >= min(
                sim.ends[run.owner], run.owner.limit - len(run.owner.request.prompt_token_ids)
            ):
                sim.scheduler.finish(run.owner)
        sim.scheduler.end_sweep()
    assert sim.scheduler.restarts == 0
    assert all(sim.used(tier) == 0 for tier in TIERS)


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_outgrow_their_expected_end_all_finish_and_keep_their_tokens(seed, tmp_path):
    rng = random.Random(seed)
    sim = Simulation(
        policy(MIXED_KV, rows=10, prefill_tokens=60),
        pages(gpu=9, cpu=10, disk=11),
        tails=4,
        expected_end=lambda row: 0,
        tmp_path=tmp_path,
    )
    rows = [sim.submit(rng.randint(1, 100), rng.randint(1, 70)) for _ in range(40)]
    sim.run()
    assert sim.scheduler.restarts > 0
    assert sorted(map(id, sim.done)) == sorted(map(id, rows))
    assert all(len(row.tokens) == row.limit for row in rows)
    assert sum(s["prompt"] for s in sim.sweeps) == sum(len(r.request.prompt_token_ids) for r in rows)


def test_a_row_preempted_for_want_of_room_does_not_bounce_within_the_sweep():
    sim = Simulation(policy(rows=2, prefill_tokens=64), pages(gpu=3), expected_end=lambda row: 0)
    sim.submit(16, 32)
    sim.submit(16, 32)
    sim.sweep()
    sim.sweep()  # both now want a second page, and there is one
    assert sim.scheduler.restarts == 1
    assert len(sim.scheduler.running) == 1 and len(sim.scheduler.waiting) == 1


def test_kv_that_somebody_else_holds_is_an_error_and_not_a_wait():
    sim = Simulation(policy(prefill_tokens=64), pages(gpu=4))
    sim.cache.reserve(sim.cache.open("gpu"), 3 * PAGE_TOKENS)
    sim.submit(32, 2)
    with pytest.raises(RuntimeError, match="counts 2 pages of the gpu tier for a row, and the KV cache, with 1 free"):
        sim.scheduler.plan_sweep()


def test_the_youngest_row_goes_back_and_comes_in_again_first_with_its_tokens():
    sim = Simulation(policy(rows=3, prefill_tokens=64), pages(gpu=20))
    old, young, later = sim.submit(16, 9), sim.submit(16, 9), sim.submit(16, 9)
    sim.sweep()
    sim.sweep()
    assert young.generated_ids == [2, 2]
    sim.scheduler.preempt(young)
    assert young.kv is None and sim.scheduler.waiting[0] is young
    runs = {run.owner: run for run in sim.sweep()}
    assert len(runs[young].tokens) == 18 and runs[young].logits == 1
    assert len(runs[old].tokens) == len(runs[later].tokens) == 1
    assert young.generated_ids == [2, 2, 2]


def test_rows_go_to_the_tiers_that_the_policy_asks_for_and_to_any_with_room_when_those_are_full(tmp_path):
    sim = Simulation(policy((100, 0, 25, 75, 100, 0), rows=8, prefill_tokens=1000), pages(gpu=20, cpu=20))
    for _ in range(8):
        sim.submit(16, 4)
    sim.sweep()
    assert sorted(row.kv.tier for row in sim.scheduler.running) == ["cpu"] * 6 + ["gpu"] * 2
    sim = Simulation(policy((100, 0, 25, 75, 100, 0), rows=8, prefill_tokens=1000), pages(gpu=20, cpu=4))
    for _ in range(8):
        sim.submit(16, 4)
    sim.sweep()
    assert sorted(row.kv.tier for row in sim.scheduler.running) == ["cpu"] * 2 + ["gpu"] * 6


@pytest.mark.parametrize("percent, modes", [(0, {FETCH}), (50, {FETCH, CPU}), (100, {CPU})])
def test_the_share_of_host_rows_that_the_policy_asks_for_is_attended_on_the_cpu(percent, modes):
    sim = Simulation(policy(CPU_KV, rows=8, prefill_tokens=1000, cpu_attention_percent=percent), pages(cpu=40))
    for _ in range(8):
        sim.submit(16, 4)
    runs = sim.sweep()
    assert {run.mode for run in runs} == modes
    assert sum(run.mode is CPU for run in runs) == 8 * percent // 100


def mean_rows_in_flight(sim, prompt, gen, rows):
    """Mean over the sweeps of the steady state: after the first block has left, before the queue is empty."""
    for _ in range(rows):
        sim.submit(prompt, gen)
    counts, life = [], gen + -(-prompt // sim.policy.prefill_tokens)
    while sim.scheduler.waiting:
        counts.append(len(sim.sweep()))
    steady = counts[2 * life : -life] or counts[life:]
    return sum(steady) / len(steady)


LENGTHS = [(512, 32), (512, 256), (128, 32), (128, 128), (77, 128), (100, 30), (300, 7), (64, 64), (256, 512)]
# A row wastes half a page of 16 tokens, and the sum over the rows swings by the growth between two departures: rows of
# under a hundred tokens, or so few rows, may stay below.
BLOCKS_OF_ROWS = (
    [(64, s, n) for s, n in LENGTHS] + [(16, s, n) for s, n in LENGTHS if (s, n) != (77, 128)] + [(256, 32, 100)]
)


#: Cases that take seconds.
LARGE = {(64, 512, 256), (64, 256, 512), (256, 32, 100)}


@pytest.mark.parametrize(
    "rows, prompt, gen",
    [pytest.param(*case, marks=pytest.mark.slow if case in LARGE else ()) for case in BLOCKS_OF_ROWS],
    ids=str,
)
def test_rows_in_flight_are_nine_tenths_of_what_the_kv_cache_holds(rows, prompt, gen):
    """A job of equal rows ten pages long; the capacity is what the command line plans for the policy."""
    chosen = policy(rows=rows, prompt_len=prompt, gen_len=gen)
    workload = Workload(prompt_len=prompt, gen_len=gen)
    counts = kv_pages_per_tier(
        chosen, kv_tokens_wanted(chosen, workload) / PAGE_TOKENS, -(-(prompt + gen) // PAGE_TOKENS)
    )
    mean = mean_rows_in_flight(Simulation(chosen, counts), prompt, gen, 10 * rows)
    capacity = counts["gpu"] * PAGE_TOKENS
    assert mean >= 0.9 * capacity / (prompt + gen / 2), f"{mean:.1f} rows, limit {capacity / (prompt + gen / 2):.1f}"


@pytest.mark.parametrize(
    "prompt, gen",
    [pytest.param(*case, marks=pytest.mark.slow if (64, *case) in LARGE else ()) for case in LENGTHS[:6]],
    ids=str,
)
def test_rows_in_flight_are_nine_tenths_where_only_the_kv_cache_limits_them(prompt, gen):
    rows = 64
    capacity = rows * (prompt + gen // 2) // PAGE_TOKENS
    chosen = policy(rows=rows, prompt_len=prompt, gen_len=gen)
    roomy = Policy(**{f: getattr(chosen, f) for f in chosen.__dataclass_fields__} | {"num_gpu_batches": 2})
    mean = mean_rows_in_flight(Simulation(roomy, pages(gpu=capacity)), prompt, gen, 10 * rows)
    limit = capacity * PAGE_TOKENS / (prompt + gen / 2)
    assert mean >= 0.9 * limit, f"{mean:.1f} rows, limit {limit:.1f}"


@pytest.mark.parametrize("percent", [GPU_KV, CPU_KV, DISK_KV, MIXED_KV], ids=str)
@pytest.mark.parametrize("window", [1, 17, 40])
def test_admission_and_cache_count_alike_where_layers_have_windows(percent, window, tmp_path):
    """The cache refuses what admission has not counted, and `Simulation.run` finds what either of them forgets."""
    groups = LayerGroup(None, (1,)), LayerGroup(window, (0,))
    chosen = policy(percent, rows=6, prefill_tokens=50)
    sim = Simulation(chosen, pages(60, 60, 60), tails=6, tmp_path=tmp_path, groups=groups)
    rng = random.Random(window)
    for _ in range(40):
        sim.submit(rng.randint(1, 150), rng.randint(1, 40))
    while sim.scheduler.running or sim.scheduler.waiting:
        sim.sweep()
        admission = sim.scheduler.admission
        assert all(admission.held(tier) == sim.used(tier) for tier in TIERS)
        for row in sim.scheduler.running:
            assert row.pages == len(row.held_kv().pages) == sim.cache.layout.held(row.cached)
    sim.run()
    assert len(sim.done) == 40


def test_an_urgent_request_computes_in_the_next_sweep_and_all_rows_end():
    sim = Simulation(policy(rows=3, prefill_tokens=40), pages(gpu=30))
    rows = [sim.submit(30, 9) for _ in range(8)]
    sim.sweep(), sim.sweep()
    now = sim.submit(30, 4)
    sim.scheduler.waiting.remove(now)
    sim.scheduler.submit([now], urgent=True)
    assert now in [run.owner for run in sim.sweep()]
    sim.run()
    assert set(sim.done) == {*rows, now} and all(row.generated == sim.ends[row] for row in sim.done)
