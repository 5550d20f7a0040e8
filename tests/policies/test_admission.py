"""Admission from lengths alone: who enters, where, how it is attended, what it holds, and who has to leave."""

import random

import pytest

from policies import Policy
from policies.admission.admission import Admission
from policies.admission.kv_pages import KVPages
from policies.admission.row_state import AttentionMode, RowLengths
from policies.placement import TIERS
from tests.support.scheduling import Simulation

GPU, CPU, DISK = (100, 0), (0, 100), (0, 0)
BLOCK = 16


def policy_of(kv=GPU, rows=8, prefill_tokens=64, **rest):
    return Policy.from_percent(
        (100, 0, *kv, 100, 0),
        gpu_batch_size=rows,
        num_gpu_batches=1,
        prompt_len=32,
        gen_len=16,
        prefill_tokens=prefill_tokens,
        **rest,
    )


def admission_of(
    kv=GPU, *, gpu=0, cpu=0, disk=0, tails=0, expected_end=None, recompute_past=None, most_fetched=None, **policy
):
    return Admission(
        policy_of(kv, **policy),
        pages={"gpu": gpu, "cpu": cpu, "disk": disk},
        tails=tails,
        layout=KVPages(page_tokens=BLOCK),
        expected_end=expected_end,
        recompute_past=recompute_past,
        most_fetched=most_fetched,
    )


def wait(admission, *lengths):
    """Rows of the given (prompt, generation) lengths join the queue."""
    rows = [RowLengths(prompt=prompt, limit=prompt + gen) for prompt, gen in lengths]
    admission.waiting.extend(rows)
    return rows


def sweep(admission):
    """One sweep; rows end at their limit. Returns (run, logits) of each row that had a run."""
    seen = {}
    for row in admission.plan_sweep():
        seen[row] = row.run, row.logits
        admission.commit(row, generated=row.logits)
    for row in seen:
        if row.length == row.limit:
            admission.finish(row)
    admission.end_sweep()
    return seen


def held(admission, tier):
    return admission.held(tier)


# What a row holds.


@pytest.mark.parametrize("kv, tier", [(GPU, "gpu"), (CPU, "cpu"), (DISK, "disk")])
def test_row_holds_the_pages_of_its_tokens_and_on_disk_a_tail(kv, tier):
    admission = admission_of(kv, **{tier: 10}, tails=2)
    (row,) = wait(admission, (30, 5))
    used = []
    while admission.unfinished:
        admission.plan_sweep()
        used.append((row.cached + row.run, row.pages, held(admission, tier), 2 - admission.free_tails))
        admission.commit(row, generated=True)
        if row.length == row.limit:
            admission.finish(row)
        admission.end_sweep()
    tail = int(tier == "disk")
    assert used == [(30, 2, 2, tail), (31, 2, 2, tail), (32, 2, 2, tail), (33, 3, 3, tail), (34, 3, 3, tail)]
    assert (admission.free(tier), admission.free_tails, admission.projected_peak(tier)) == (10, 2, 0)


def test_disk_takes_no_more_rows_than_it_has_tails():
    admission = admission_of(DISK, disk=40, tails=3, prefill_tokens=1000)
    wait(admission, *[(16, 4)] * 5)
    assert len(admission.plan_sweep()) == 3 and len(admission.waiting) == 2


def test_largest_row_is_what_the_largest_tier_holds():
    assert admission_of(gpu=3, cpu=7, disk=5).largest_row_tokens() == 7 * BLOCK


# Who gets which run.


def test_prompt_enters_in_chunks_and_only_the_last_run_of_a_prompt_ends_with_a_token():
    admission = admission_of(gpu=20, prefill_tokens=40)
    (row,) = wait(admission, (100, 2))
    assert [sweep(admission)[row] for _ in range(4)] == [(40, False), (40, False), (20, True), (1, True)]
    assert admission.unfinished == 0


def test_decoding_rows_take_nothing_of_the_pace_of_prompts():
    admission = admission_of(gpu=40, prefill_tokens=32)
    old, young, late = wait(admission, (32, 9), (22, 9), (31, 9))
    assert sweep(admission) == {old: (32, True)}
    assert sweep(admission) == {old: (1, True), young: (22, True), late: (10, False)}
    assert sweep(admission) == {old: (1, True), young: (1, True), late: (21, True)}


def test_last_token_of_a_prompt_takes_of_the_pace_although_it_is_a_run_of_one():
    admission = admission_of(gpu=40, prefill_tokens=32)
    first, second = wait(admission, (33, 9), (40, 9))
    assert sweep(admission) == {first: (32, False)}
    assert sweep(admission) == {first: (1, True), second: (31, False)}


@pytest.mark.parametrize(
    "prompt, runs", [(29, [29, 1, 1, 1, 33, 1]), (32, [32, 33, 1, 1, 1, 1]), (33, [33, 1, 1, 1, 1, 1])]
)
def test_a_row_that_grows_past_the_bound_is_computed_anew_as_one_run(prompt, runs):
    admission = admission_of(gpu=20, prefill_tokens=40, recompute_past=32)
    (row,) = wait(admission, (prompt, 6))
    assert [sweep(admission)[row] for _ in runs] == [(run, True) for run in runs]
    assert admission.unfinished == 0 and admission.restarts == (33 in runs[1:])


def test_a_row_that_is_computed_anew_in_chunks_is_so_once():
    admission = admission_of(gpu=20, prefill_tokens=16, recompute_past=32)
    (row,) = wait(admission, (32, 4))
    runs = [(16, False), (16, True), (16, False), (16, False), (1, True), (1, True), (1, True)]
    assert [sweep(admission)[row] for _ in runs] == runs
    assert admission.restarts == 1 and admission.unfinished == 0


def test_a_row_that_ends_at_the_bound_is_not_computed_anew():
    admission = admission_of(gpu=20, recompute_past=32)
    wait(admission, (30, 3))
    while admission.unfinished:
        sweep(admission)
    assert admission.restarts == 0


@pytest.mark.parametrize("restart_after, counts", [(2, [40, 40, 0, 0, 20, 0]), (4, [40, 40, 20, 0, 0, 0])])
def test_every_prompt_token_counts_once_although_a_restart_computes_it_again(restart_after, counts):
    admission = admission_of(gpu=20, prefill_tokens=40)
    (row,) = wait(admission, (100, 9))
    counted = []
    for number in range(1, 7):
        (planned,) = admission.plan_sweep()
        counted.append(admission.commit(planned, generated=planned.logits))
        if number == restart_after:
            admission.preempt(row)
        admission.end_sweep()
    assert counted == counts


def test_run_of_one_token_that_completes_a_restarted_row_ends_with_a_token():
    admission = admission_of(gpu=20, prefill_tokens=40)
    (row,) = wait(admission, (40, 9))
    sweep(admission)
    admission.preempt(row)
    assert row.length == 41
    assert [sweep(admission)[row] for _ in range(3)] == [(40, False), (1, True), (1, True)]


# Who enters, and where.


def test_row_waits_until_the_projected_peak_of_all_rows_fits():
    admission = admission_of(gpu=4, prefill_tokens=100)
    first, second = wait(admission, (16, 18), (16, 18))
    assert list(sweep(admission)) == [first], "both would need three pages at the end, of four"
    runs = [list(sweep(admission)) for _ in range(17)]
    assert runs == [[first]] * 16 + [[first, second]], "the first one's peak meets the second one's beginning"


def test_projection_counts_the_sweeps_that_a_prompt_takes_to_enter():
    admission = admission_of(gpu=10, prefill_tokens=16)
    wait(admission, (64, 18))
    peaks = [admission.projected_peak("gpu") for _ in range(22) if sweep(admission)]
    assert peaks == [6] * 20 + [0], "four sweeps for the prompt, one for each further token but the last"


def test_nobody_overtakes_the_row_that_waits_longest():
    admission = admission_of(gpu=6)
    first, large, small = wait(admission, (32, 9), (64, 9), (1, 2))
    assert list(sweep(admission)) == [first]
    assert list(admission.waiting) == [large, small]


def test_rows_in_flight_never_exceed_the_block():
    admission = admission_of(gpu=100, rows=3, prefill_tokens=1000)
    wait(admission, *[(16, 3)] * 7)
    assert [len(sweep(admission)) for _ in range(9)] == [3] * 6 + [1] * 3


def test_static_block_takes_no_row_between_its_first_end_and_its_last():
    admission = admission_of(gpu=100, rows=3, prefill_tokens=1000, schedule="static")
    wait(admission, (16, 2), (16, 4), (16, 4), (16, 2))
    assert [len(sweep(admission)) for _ in range(6)] == [3, 3, 2, 2, 1, 1]


def test_static_block_takes_no_row_once_one_has_found_no_room():
    """The second row fits from sweep 25 on, when it is short until the first one ends. The block would last 45 sweeps longer for it."""
    rolling, static = (admission_of(gpu=5, rows=3, prefill_tokens=1000, schedule=s) for s in ("rolling", "static"))
    for admission in (rolling, static):
        wait(admission, (16, 40), (1, 60))
    assert [len(sweep(rolling)) for _ in range(60)].count(2) > 10
    assert [len(sweep(static)) for _ in range(100)] == [1] * 100 and not static.unfinished


def test_rows_go_where_the_shares_ask_and_elsewhere_when_that_is_full():
    admission = admission_of((25, 50), gpu=9, cpu=9, disk=9, tails=9, prefill_tokens=1000, rows=16)
    wait(admission, *[(16, 1)] * 8)
    assert sorted(row.tier for row in admission.plan_sweep()) == ["cpu"] * 4 + ["disk"] * 2 + ["gpu"] * 2
    admission = admission_of((25, 75), gpu=9, cpu=3, prefill_tokens=1000, rows=16)
    wait(admission, *[(16, 1)] * 8)
    assert sorted(row.tier for row in admission.plan_sweep()) == ["cpu"] * 3 + ["gpu"] * 5


def test_rows_that_come_and_go_keep_the_share_that_is_attended_on_the_cpu():
    admission = admission_of(CPU, cpu=100, rows=10, prefill_tokens=1000, cpu_attention_percent=30)
    wait(admission, *[(16, 2 + number % 5) for number in range(60)])
    shares = []
    while admission.unfinished:
        modes = [row.mode for row in sweep(admission)]
        assert set(modes) <= {AttentionMode.CPU, AttentionMode.FETCH}
        shares.append(modes.count(AttentionMode.CPU) / len(modes))
    assert shares[0] == 0.3
    assert sum(shares) / len(shares) == pytest.approx(0.3, abs=0.06)


def test_the_cpu_attends_rows_beyond_those_that_may_be_fetched():
    """Rows that it attended end first; those that enter then would be fetched."""
    admission = admission_of(CPU, cpu=200, rows=10, prefill_tokens=1000, cpu_attention_percent=50, most_fetched=5)
    first = wait(admission, *[(8, 40)] * 10)
    sweep(admission)
    assert [row.mode for row in first].count(AttentionMode.FETCH) == 5
    for row in first:
        if row.mode is AttentionMode.CPU:
            admission.finish(row)
    wait(admission, *[(8, 40)] * 5)
    sweep(admission)
    assert [row.mode for row in admission.running].count(AttentionMode.FETCH) == 5


def test_rows_on_the_gpu_are_attended_there_and_disk_rows_are_fetched():
    for kv, tier, mode in ((GPU, "gpu", AttentionMode.GPU), (DISK, "disk", AttentionMode.FETCH)):
        admission = admission_of(kv, **{tier: 9}, tails=4, cpu_attention_percent=100)
        wait(admission, (16, 4))
        assert [row.mode for row in admission.plan_sweep()] == [mode]


def test_expected_end_below_the_limit_lets_more_rows_in():
    def entered(expected_end):
        admission = admission_of(gpu=12, prefill_tokens=1000, expected_end=expected_end)
        wait(admission, *[(16, 48)] * 8)
        return len(admission.plan_sweep())

    assert (entered(None), entered(lambda row: 32), entered(lambda row: 0)) == (3, 6, 8)


# Who is preempted.


def test_youngest_row_of_a_full_tier_is_preempted_and_enters_again_first():
    admission = admission_of(gpu=3, rows=2, expected_end=lambda row: 0)
    old, young, later = wait(admission, (16, 20), (16, 20), (16, 20))
    sweep(admission)
    (row,) = admission.plan_sweep()  # both want a second page, and there is one
    assert row is old and admission.preempted == [young] and admission.restarts == 1
    assert list(admission.waiting) == [young, later]
    assert (young.tier, young.cached, young.pages, young.run, young.length) == ("", 0, 0, 0, 17)
    assert held(admission, "gpu") == old.pages == 2


def test_row_that_is_itself_the_youngest_of_its_tier_leaves():
    admission = admission_of((50, 50), gpu=1, cpu=9, expected_end=lambda row: 0)
    (row,) = wait(admission, (16, 20))
    admission.plan_sweep()
    assert row.tier == "gpu"
    admission.commit(row, generated=True)
    admission.end_sweep()
    assert admission.plan_sweep() == [row], "the tier that is too small for it now sent it to the other one"
    assert (row.tier, row.run, admission.preempted) == ("cpu", 17, [row])


def test_row_of_another_tier_is_not_preempted():
    admission = admission_of((50, 50), gpu=3, cpu=4, expected_end=lambda row: 0, prefill_tokens=100)
    rows = wait(admission, *[(16, 20)] * 5)
    sweep(admission)
    assert [row.tier for row in rows] == ["gpu", "cpu", "gpu", "cpu", "gpu"]
    admission.plan_sweep()
    assert [row.tier for row in rows] == ["gpu", "cpu", "", "cpu", ""]
    assert admission.preempted == [rows[4], rows[2]]


# The steady state.


def test_aged_row_holds_all_but_its_last_token_and_decodes_next():
    admission = admission_of(CPU, cpu=9, cpu_attention_percent=100)
    row = RowLengths(prompt=20, limit=40, generated=7)
    assert admission.enter_aged(row)
    assert (row.tier, row.mode, row.cached, row.pages, row.prompt_done) == ("cpu", AttentionMode.CPU, 26, 2, 20)
    assert sweep(admission) == {row: (1, True)}


def test_aged_row_without_room_does_not_enter():
    admission = admission_of(gpu=4)
    assert admission.enter_aged(RowLengths(prompt=40, limit=49, generated=1))
    late = RowLengths(prompt=40, limit=49, generated=1)
    assert not admission.enter_aged(late)
    assert late.tier == "" and len(admission.running) == 1 and admission.free("gpu") == 1


# The simulator's rows are the runtime's rows.


def random_job(seed):
    """A policy, page counts, tails, expected end and rows (prompt, generation at most, generation)."""
    rng = random.Random(seed)
    gpu = rng.choice((0, 100, rng.randint(0, 100)))
    kv = gpu, rng.choice((0, 100 - gpu, rng.randint(0, 100 - gpu)))
    policy = policy_of(
        kv,
        rows=rng.randint(1, 14),
        prefill_tokens=rng.choice((7, 16, 17, 60, 500)),
        schedule=rng.choice(("rolling", "static")),
        cpu_attention_percent=rng.choice((0, 40, 75, 100)),
    )
    pages = {tier: rng.choice((0, rng.randint(3, 30))) for tier in TIERS}
    if not any(pages.values()) or seed % 4 == 0:
        pages = {tier: rng.randint(3, 30) for tier in TIERS}
    longest = max(pages.values()) * BLOCK
    rows = []
    for _ in range(rng.randint(1, 40)):
        prompt = rng.choice((1, 15, 16, 17, rng.randint(1, 90)))
        prompt = min(prompt, longest - 1)
        most = rng.randint(1, min(60, longest - prompt))
        rows.append((prompt, most, rng.choice((most, rng.randint(1, most)))))
    far_sighted = rng.choice((0.0, 0.5, 1.0))
    return policy, pages, rng.randint(1, 9), lambda row: row.prompt + int(far_sighted * (row.limit - row.prompt)), rows


def check_counts(admission, pages, tails):
    """What admission counts is what its rows hold."""
    rows = admission.running
    for tier in TIERS:
        needed = [-(-(row.cached + row.run) // BLOCK) for row in rows if row.tier == tier]
        assert [row.pages for row in rows if row.tier == tier] == needed
        assert admission.free(tier) == pages[tier] - sum(needed) >= 0
    assert admission.free_tails == tails - sum(row.tier == "disk" for row in rows) >= 0


@pytest.mark.parametrize("part", range(8))
def test_admission_decides_in_every_sweep_what_the_scheduler_over_a_real_cache_decides(part, tmp_path):
    restarts = tiers_used = 0
    for seed in range(part * 12, part * 12 + 12):
        policy, pages, tails, expected_end, lengths = random_job(seed)
        sim = Simulation(policy, pages, tails=tails, expected_end=expected_end, tmp_path=tmp_path)
        pure = Admission(policy, pages=pages, tails=tails, layout=KVPages(page_tokens=BLOCK), expected_end=expected_end)
        real = {sim.submit(prompt, most, ends): number for number, (prompt, most, ends) in enumerate(lengths)}
        rows = {row: number for number, row in enumerate(wait(pure, *[(prompt, most) for prompt, most, _ in lengths]))}
        seen = set()
        while pure.unfinished:
            planned = pure.plan_sweep()
            check_counts(pure, pages, tails)
            decided = [(rows[row], row.run, row.logits, row.tier, row.mode) for row in planned]
            seen |= {row.tier for row in planned}
            counted = sum(pure.commit(row, generated=row.logits) for row in planned)
            runs = sim.sweep()
            assert decided == [(real[r.owner], len(r.tokens), bool(r.logits), r.kv.tier, r.mode) for r in runs]
            assert counted == sim.sweeps[-1]["prompt"]
            assert {tier: held(pure, tier) for tier in TIERS} == sim.sweeps[-1]["held"]
            for row in planned:
                if row.generated >= lengths[rows[row]][2]:
                    pure.finish(row)
            pure.end_sweep()
            assert {tier: pure.free(tier) for tier in TIERS} == {tier: sim.cache.free(tier) for tier in TIERS}
            assert pure.free_tails == sim.cache.free_tails
            assert [rows[row] for row in pure.waiting] == [real[row] for row in sim.scheduler.waiting]
        assert not sim.scheduler.unfinished and pure.restarts == sim.scheduler.restarts
        restarts += pure.restarts
        tiers_used = max(tiers_used, len(seen))
    assert restarts > 0 and tiers_used == 3, "these jobs exercise restarts and all tiers"


# Urgent rows.


def urgent(admission, prompt, gen):
    row = RowLengths(prompt=prompt, limit=prompt + gen, urgent=True)
    admission.waiting.appendleft(row)
    return row


def test_an_urgent_row_enters_the_next_sweep_in_place_of_the_youngest_row():
    admission = admission_of(gpu=40, rows=2)
    first, second, third = wait(admission, (16, 9), (16, 9), (16, 9))
    sweep(admission)
    now = urgent(admission, 16, 3)
    assert now in sweep(admission) and admission.running == [first, now]
    assert list(admission.waiting) == [second, third] and admission.restarts == 1
    while admission.unfinished:
        sweep(admission)
    assert held(admission, "gpu") == 0 and second.length == second.limit


def test_an_urgent_row_that_has_a_place_preempts_nobody():
    admission = admission_of(gpu=40, rows=3)
    wait(admission, (16, 9), (16, 9))
    sweep(admission)
    assert urgent(admission, 16, 3) in sweep(admission) and admission.restarts == 0


def test_an_urgent_row_takes_its_pages_from_rows_that_are_not():
    admission = admission_of(gpu=4, rows=8)
    old, young = wait(admission, (17, 9), (17, 9))
    sweep(admission)
    now = urgent(admission, 17, 9)
    assert now in sweep(admission) and admission.running == [old, now] and list(admission.waiting) == [young]


def test_an_urgent_row_does_not_wait_for_prompts_that_take_the_pace():
    admission = admission_of(gpu=40, rows=4, prefill_tokens=32)
    (long,) = wait(admission, (200, 3))
    sweep(admission)
    now = urgent(admission, 20, 3)
    seen = sweep(admission)
    assert seen[now] == (20, True) and seen[long] == (12, False)


def test_urgent_rows_leave_only_for_older_ones_of_their_kind():
    admission = admission_of(gpu=40, rows=1)
    first, second = urgent(admission, 16, 3), RowLengths(prompt=16, limit=19, urgent=True)
    admission.waiting.append(second)
    assert set(sweep(admission)) == {first}
    assert set(sweep(admission)) == {first} and list(admission.waiting) == [second]
