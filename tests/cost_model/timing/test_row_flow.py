"""Rows that are followed from event to event take as many sweeps as the admission that they stand for gives them."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cost_model.memory.allocation import PAGE_TOKENS, allocate, common_tokens
from cost_model.simulation.job_sweeps import job_sweeps
from cost_model.simulation.replay import Replayer
from cost_model.simulation.simulate import simulate
from cost_model.timing.evaluate import evaluate
from cost_model.timing.job_phases import job_phases
from cost_model.timing.job_rows import followed_rows, waiting_rows
from cost_model.timing.op_costs import Costs
from cost_model.timing.row_flow import flow
from cost_model.timing.sweep_bounds import sweep_time
from cost_model.timing.sweep_load import COPY_LANES, RowGroup, SweepLoad
from policies import Workload
from policies.admission.order import WINDOW_BLOCKS
from tests.support.small_jobs import MACHINE, SMALL, policy_of

SHORT_AND_LONG = Workload.of_lengths([(8, 1)] * 100 + [(32, 96)] * 20)


def followed(workload, policy, allocation):
    return flow(
        [(s, n, 1) for s, n in waiting_rows(workload, WINDOW_BLOCKS * policy.block_size, 0)],
        block=policy.block_size,
        pace=policy.prefill_tokens,
        room=sum(allocation.kv_pages.values()),
        static=policy.schedule == "static",
    )


def policy_and_allocation(workload, rows, schedule, prefill_tokens=None, percent=(100, 0, 100, 0, 100, 0)):
    policy = policy_of(
        percent,
        rows=rows,
        batches=1,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        schedule=schedule,
    )
    policy = replace(policy, prefill_tokens=prefill_tokens or policy.prefill_tokens)
    return policy, allocate(SMALL, policy, workload, device="cuda", longest_row=workload.longest_row)


@pytest.mark.parametrize("schedule", ["rolling", "static"])
@pytest.mark.parametrize("rows", [2, 3, 8, 44])
def test_rows_that_do_not_fit_side_by_side_take_the_sweeps_of_the_admission(rows, schedule):
    """Few long rows among short ones, KV for rows of the mean length: a mean knows nothing of who waits for whom."""
    policy, allocation = policy_and_allocation(SHORT_AND_LONG, rows, schedule, prefill_tokens=200)
    found, whole = (
        followed(SHORT_AND_LONG, policy, allocation),
        job_sweeps(policy, allocation, SHORT_AND_LONG, whole=True),
    )
    assert sum(each.sweeps for each in found) == pytest.approx(len(whole.logits), rel=0.01)
    assert sum(each.sweeps * (each.decode_rows + each.entered) for each in found) == pytest.approx(
        100 + 20 * 96, rel=0.002
    )
    assert sum(each.sweeps * each.prompt_tokens for each in found) == 100 * 8 + 20 * 32


@pytest.mark.parametrize("schedule", ["rolling", pytest.param("static", marks=pytest.mark.slow)])
def test_drawn_jobs_take_the_sweeps_of_the_admission(schedule):
    """Stated tolerance: eight of ten within 0.1 %, all within 5 %; tokens that are decoded within 2 %."""
    rng, apart = random.Random(7), []
    for _ in range(40):
        s, n = rng.choice([32, 64, 200]), rng.choice([8, 32, 100])
        draw = rng.choice([lambda n: rng.randint(1, 2 * n), lambda n: rng.choice([1, 1, 1, 4 * n])])
        lengths = [(int(s * rng.uniform(0.3, 2)), draw(n)) for _ in range(rng.choice([5, 40, 150]))]
        workload = Workload.of_lengths(lengths)
        policy, allocation = policy_and_allocation(workload, rng.choice([3, 8, 40]), schedule)
        policy = replace(policy, prefill_tokens=max(s, int(policy.prefill_tokens * rng.choice([0.3, 1, 3]))))
        found, whole = followed(workload, policy, allocation), job_sweeps(policy, allocation, workload, whole=True)
        apart.append(abs(sum(each.sweeps for each in found) / len(whole.logits) - 1))
        tokens = sum(each.sweeps * (each.decode_rows + each.entered) for each in found)
        assert tokens == pytest.approx(sum(n for _, n in lengths), rel=0.02)
        context = whole.groups[:, :, 1].sum()
        assert sum(each.sweeps * each.decode_context for each in found) == pytest.approx(context, rel=0.02, abs=10)
    apart.sort()
    assert apart[int(0.8 * len(apart)) - 1] <= 0.001
    assert apart[-1] <= 0.05


def test_a_static_block_takes_no_row_after_the_first_end():
    """Prompts of 10 tokens at a pace of 20 a sweep, one token each: a block is the two that enter its first sweep."""
    found = flow([(10, 1, 6)], block=6, pace=20, room=100, static=True)
    assert [(each.sweeps, each.entered, each.block) for each in found] == [(1, 2, 1), (1, 2, 2), (1, 2, 3)]


def test_a_row_waits_for_room_and_those_behind_it_wait_too():
    """One page more than a long row needs: the second one enters with the last sweep of the first, the short one after it."""
    long = (PAGE_TOKENS, 2 * PAGE_TOKENS, 1)
    found = flow([long, long, (1, 1, 1)], block=3, pace=1000, room=4, static=False)
    assert sum(each.sweeps for each in found) == 4 * PAGE_TOKENS - 1
    assert [each.entered for each in found if each.entered] == [1, 1, 1]


def test_a_prompt_longer_than_the_pace_enters_in_chunks():
    found = flow([(100, 5, 1)], block=1, pace=40, room=100, static=False)
    assert [(each.sweeps, each.prompt_tokens) for each in found if each.prompt_tokens] == [(1, 40), (1, 40), (1, 20)]
    assert sum(each.sweeps for each in found) == 3 + 4


def test_what_is_followed_has_the_rows_of_the_job_those_of_each_window_that_generate_most_first():
    rng = random.Random(3)
    workload = Workload.of_lengths([(rng.randint(1, 999), rng.randint(1, 300)) for _ in range(3000)])
    for window, windows in ((24, 6), (200, 2), (2000, 0), (5000, 0)):
        bundles, found = followed_rows(workload, window)
        followed = sum(count for *_, count in bundles)
        assert found == windows and len(bundles) <= 250
        assert followed == (windows * window + 2999 % window + 1 if windows else 3000)
        assert sum(s * count for s, _, count in bundles) / followed == pytest.approx(workload.prompt_len, rel=0.03)
        assert sum(n * count for _, n, count in bundles) / followed == pytest.approx(workload.gen_len, rel=0.05)
        rows = [n for _, n, count in bundles for _ in range(count)][:window]
        eighth = len(rows) // 8
        assert sum(rows[:eighth]) > sum(rows[3 * eighth : 4 * eighth]) > 1.5 * sum(rows[-eighth:])


def test_a_sweep_that_ends_within_a_prompt_has_a_piece_of_it_as_the_next_one_has():
    """Ten prompts of 10 tokens, 25 a sweep: two and a half of them, so three pieces each."""
    found = flow([(10, 50, 10)], block=10, pace=25, room=100, static=False)
    prompts = [(each.sweeps, each.prompt_rows) for each in found if each.prompt_tokens]
    assert sum(sweeps * pieces for sweeps, pieces in prompts) == 10 + 3


def test_the_longest_rows_are_bundles_of_their_own_where_they_differ():
    """How few are in flight in the end decides whether experts come on demand."""
    workload = Workload.of_lengths([(32, n) for n in (900, 800, 800, 700, *[5] * 1600)])
    bundles, _ = followed_rows(workload, 2000)
    assert [(n, count) for _, n, count in bundles[:3]] == [(900, 1), (800, 2), (700, 1)]


@pytest.mark.parametrize("rows, window", [(2400, 1000), (1900, 1000), (1300, 1000)])
def test_no_row_is_rounded_away_where_all_windows_are_followed(rows, window):
    """One row that generates far more than all others is in flight alone for most of the job's sweeps."""
    workload = Workload.of_lengths([(8, 500), *[(8, 4)] * (rows - 1)])
    bundles, windows = followed_rows(workload, window)
    assert windows == 0 and sum(count for *_, count in bundles) == rows
    assert [(n, count) for _, n, count in bundles if n > 4] == [(500, 1)]


@pytest.mark.parametrize(
    "window, longest, found", [(20, 40_000, True), (20, 5000, False), (1000, 5000, True), (1000, 100, False)]
)
def test_a_long_row_that_outlasts_a_job_of_many_windows_is_among_the_last_ones(window, longest, found):
    """It was rounded away. In blocks of an eighth of a window the job takes 640 sweeps, or 32,000."""
    workload = Workload.of_lengths([(8, longest), *[(8, 4)] * 19_999])
    bundles, windows = followed_rows(workload, window)
    assert windows >= 2 and [(n, count) for _, n, count in bundles if n > 4] == ([(longest, 1)] if found else [])


def test_few_rows_are_followed_one_by_one_as_they_wait():
    workload = Workload.of_lengths([(s, n) for s in range(1, 11) for n in range(1, 11)])
    bundles, windows = followed_rows(workload, 16)
    assert windows == 0 and [row[:2] for row in bundles] == list(waiting_rows(workload, 16, 0))


@pytest.mark.parametrize("schedule", ["rolling", "static"])
def test_predicted_job_of_short_and_long_rows_is_the_simulated_one(schedule):
    """The mean length said 38 times the speed of the static one."""
    for rows in (3, 44):
        policy, _ = policy_and_allocation(SHORT_AND_LONG, rows, schedule)
        predicted = evaluate(SMALL, MACHINE, SHORT_AND_LONG, policy).tokens_per_s
        simulated = simulate(SMALL, MACHINE, SHORT_AND_LONG, policy, full=True).tokens_per_s
        assert predicted == pytest.approx(simulated, rel=0.05)


@pytest.mark.slow
def test_a_long_job_is_followed_in_part():
    rng = random.Random(5)
    workload = Workload.of_lengths([(rng.randint(1, 99), rng.randint(1, 64)) for _ in range(3000)])
    for schedule in ("rolling", "static"):
        policy, _ = policy_and_allocation(workload, 24, schedule)
        predicted = evaluate(SMALL, MACHINE, workload, policy).job_s
        simulated = simulate(SMALL, MACHINE, workload, policy, full=True).job_s
        assert predicted == pytest.approx(simulated, rel=0.05)


@pytest.mark.parametrize("schedule", ["rolling", "static"])
@pytest.mark.parametrize("samples", [2.0, 2.5, 6.0])
def test_samples_of_a_prompt_compute_its_pages_once(samples, schedule):
    """As many prompt tokens as the admission gives them, in about as many sweeps."""
    workload = replace(
        Workload.of_lengths([(s, 12) for s in (40, 100, 170, 260) for _ in range(30)]), rows_per_prompt=samples
    )
    policy, allocation = policy_and_allocation(workload, 24, schedule, prefill_tokens=500)
    rows = [(s, n, 1) for s, n in waiting_rows(workload, WINDOW_BLOCKS * policy.block_size, 0)]
    limits = {"block": policy.block_size, "pace": policy.prefill_tokens, "room": sum(allocation.kv_pages.values())}
    own = 1 - common_tokens(workload, policy.block_size) / (workload.prompt_len + workload.gen_len)
    found = flow(rows, **limits, static=schedule == "static", rows_per_prompt=samples, held_share=own)
    whole = job_sweeps(policy, allocation, workload, whole=True)
    assert sum(each.sweeps * each.prompt_tokens for each in found) == pytest.approx(
        (whole.tokens.sum() - whole.groups[:, :, 0].sum()), rel=0.03
    )
    assert sum(each.sweeps for each in found) == pytest.approx(len(whole.logits), rel=0.25)
    assert sum(each.sweeps * (each.decode_rows + each.entered) for each in found) == pytest.approx(120 * 12, rel=0.01)


@pytest.mark.parametrize("schedule", ["rolling", "static"])
@pytest.mark.parametrize("prefix, rows", [(64, 8.0), (32, 120.0), (0, 1.0)])
def test_prompts_that_begin_alike_compute_their_beginning_once(prefix, rows, schedule):
    workload = replace(
        Workload.of_lengths([(s, 12) for s in (80, 100, 170, 260) for _ in range(30)]),
        prefix_len=prefix,
        rows_per_prefix=rows,
    )
    policy, allocation = policy_and_allocation(workload, 24, schedule, prefill_tokens=500)
    whole = job_sweeps(policy, allocation, workload, whole=True)
    computed = 30 * (80 + 100 + 170 + 260) - prefix * (120 - 120 / rows)
    assert whole.tokens.sum() - whole.groups[:, :, 0].sum() == pytest.approx(computed, rel=0.03)
    assert whole.groups[:, :, 1].min() >= 0 and whole.groups[:, :, 4].min() >= 0
    predicted = evaluate(SMALL, MACHINE, workload, policy).job_s
    assert predicted == pytest.approx(simulate(SMALL, MACHINE, workload, policy, full=True).job_s, rel=0.2)


@pytest.mark.parametrize("samples, prefix, prompts", [(4.0, 0, 1.0), (1.0, 64, 8.0), (1.0, 64, 24.0)])
def test_prefixes_are_copied_to_the_tiers_of_their_rows(samples, prefix, prompts):
    """Of about as many pages as the admission copies; a prompt without company is copied nowhere."""
    workload = replace(
        Workload.of_lengths([(s, 12) for s in (80, 100, 170, 260) for _ in range(60)]),
        rows_per_prompt=samples,
        prefix_len=prefix,
        rows_per_prefix=prompts,
    )
    tiers = (100, 0, 30, 30, 100, 0)
    policy, allocation = policy_and_allocation(workload, 24, "rolling", prefill_tokens=500, percent=tiers)
    whole = job_sweeps(policy, allocation, workload, whole=True)
    phases = job_phases(policy, allocation, workload).phases
    predicted = {lane: sum(p.sweeps * p.load.copied.get(lane, 0.0) for p in phases) for lane in COPY_LANES}
    assert sum(predicted.values()) == pytest.approx(whole.copied.sum(), rel=0.5) != 0
    alone = replace(workload, rows_per_prompt=1.0, rows_per_prefix=1.0)
    assert not job_sweeps(policy, allocation, alone, whole=True).copied.any()
    assert not any(phase.load.copied for phase in job_phases(policy, allocation, alone).phases)


def test_copies_take_their_time_on_their_lanes():
    policy, allocation = policy_and_allocation(SHORT_AND_LONG, 24, "rolling")
    costs = Costs(SMALL, MACHINE, policy, allocation, SMALL.dtype_bytes)
    load = SweepLoad(groups={"gpu": RowGroup(decode_rows=24, decode_context=2400)}, logits=24)
    moving = replace(load, copied={"h2d": 5000.0, "disk_read": 100.0})
    own_s = costs.copied_s(moving)
    assert own_s["h2d"] == pytest.approx(
        5000 * SMALL.kv_page_bytes(16, SMALL.dtype_bytes) / MACHINE.gpu.h2d_bytes_per_s
    )
    for seconds in (
        [sweep_time(costs, each, 8) for each in (load, moving)],
        [
            SimpleNamespace(total_s=s, lanes_s=lanes)
            for s, lanes in (Replayer(costs, 8).steady(x) for x in (load, moving))
        ],
    ):
        without, beside = seconds
        assert beside.total_s - without.total_s == pytest.approx(sum(own_s.values()), rel=0.05)
        for lane in ("h2d", "disk_read"):
            assert beside.lanes_s[lane] - without.lanes_s[lane] == pytest.approx(own_s[lane], rel=0.05)
