"""Samples of one prompt: computed once, begun from there, counted no lower than they hold, and never waited for in vain."""

import random

import pytest

from flexmoe.engine.scheduler import Row
from flexmoe.params import EngineRequest, SamplingParams
from policies.placement import TIERS
from tests.support.scheduling import CPU_KV, DISK_KV, GPU_KV, MIXED_KV, Simulation, pages, policy

B = 16


class Samples(Simulation):
    """A simulation whose requests have several samples."""

    def submit(self, prompt, gen, ends=(None,)):
        request = EngineRequest(
            request_id=str(len(self.ends)), prompt_token_ids=(1,) * prompt, params=SamplingParams(max_tokens=gen)
        )
        rows = [Row(request, [1] * prompt, prompt + gen) for _ in ends]
        self.ends |= {row: end or gen for row, end in zip(rows, ends)}
        self.scheduler.submit(rows)
        return rows

    def sweep(self):
        runs = super().sweep()
        admission = self.scheduler.admission
        for tier in TIERS:
            rows = [row for row in admission.running if row.tier == tier]
            assert sum(row.pages for row in rows) <= self.cache.total(tier), "the buffers are made for no more"
            assert 0 <= admission.free(tier) <= self.cache.free(tier), "what is counted free is free"
            assert [row.kv.tier for row in rows] == [tier] * len(rows)
        assert admission.free_tails == self.cache.free_tails
        assert admission.prefixes.reserved_places >= 0
        return runs

    def run(self, most=20_000):
        super().run(most)
        admission = self.scheduler.admission
        assert all(admission.free(t) == self.cache.total(t) and admission.projected_peak(t) == 0 for t in TIERS)
        assert admission.prefixes.reserved_places == self.scheduler.rows_waiting == 0
        return self


def computed(sim):
    """Tokens that the sweeps advanced."""
    return sum(len(run.tokens) for sweep in sim.sweeps for run in sweep["runs"])


@pytest.mark.parametrize(
    "percent, tiers", [(GPU_KV, pages(gpu=40)), (CPU_KV, pages(cpu=40)), (DISK_KV, pages(disk=40))]
)
@pytest.mark.parametrize("prompt", [17, 32, 33, 75])
def test_prompt_is_computed_once_but_for_the_page_that_grows(percent, tiers, prompt, tmp_path):
    sim = Samples(policy(percent, rows=8, prefill_tokens=30), tiers, tails=8, tmp_path=tmp_path)
    sim.submit(prompt, 5, ends=(None,) * 4)
    sim.run()
    left = prompt - (prompt - 1) // B * B
    assert computed(sim) == prompt + 3 * left + 4 * (5 - 1)
    assert sum(s["prompt"] for s in sim.sweeps) == prompt, "the prompt counts once"


def test_samples_hold_the_same_pages_and_enter_when_the_prompt_is_there():
    sim = Samples(policy(rows=8, prefill_tokens=40), pages(gpu=40))
    first, second, third = sim.submit(70, 9, ends=(None,) * 3)
    assert [run.owner for run in sim.sweep()] == [first]
    assert sim.scheduler.rows_waiting == 2
    assert [run.owner for run in sim.sweep()] == [first] and list(sim.scheduler.waiting) == [second, third]
    runs = {run.owner: run for run in sim.sweep()}
    assert [len(runs[row].tokens) for row in (first, second, third)] == [1, 6, 6] and runs[second].logits == 1
    assert first.kv.pages[:4] == second.kv.pages[:4] == third.kv.pages[:4]
    assert len({row.kv.pages[4] for row in (first, second, third)}) == 3
    assert sim.used("gpu") == 4 + 3


def test_prompt_shorter_than_a_page_is_computed_by_every_sample():
    sim = Samples(policy(rows=8, prefill_tokens=64), pages(gpu=40))
    rows = sim.submit(16, 3, ends=(None,) * 3)
    assert [run.owner for run in sim.sweep()] == rows
    sim.run()
    assert sum(s["prompt"] for s in sim.sweeps) == 16


def test_pages_stay_for_samples_that_wait_when_the_others_have_ended():
    sim = Samples(policy(rows=2, prefill_tokens=200), pages(gpu=20))
    sim.submit(64, 9, ends=(1, 2, 3, 3, 2))
    sim.run()
    assert computed(sim) == 64 + 4 * 16 + (0 + 1 + 2 + 2 + 1)


def test_new_request_leaves_the_places_of_samples_that_are_to_come():
    sim = Samples(policy(rows=4, prefill_tokens=1000), pages(gpu=100))
    first = sim.submit(64, 9, ends=(None,) * 3)
    second, _ = sim.submit(64, 9, ends=(None,) * 2)
    (late,) = sim.submit(64, 9)
    assert [run.owner for run in sim.sweep()] == [first[0], second], "the fifth place was promised to another sample"
    assert [run.owner for run in sim.sweep()] == [first[0], second, *first[1:]]
    assert late in sim.scheduler.waiting
    sim.run()


def test_more_samples_than_places_take_turns():
    sim = Samples(policy(rows=3, prefill_tokens=64), pages(gpu=40))
    sim.submit(40, 4, ends=(None,) * 11)
    sim.run()
    assert computed(sim) == 40 + 10 * 8 + 11 * 3
    assert max(s["rows"] for s in sim.sweeps) == 3


def test_where_one_row_fits_at_a_time_the_prompt_is_still_computed_once():
    sim = Samples(policy(rows=3, prefill_tokens=64), pages(gpu=4))
    sim.submit(40, 20, ends=(None,) * 3)
    sim.run()
    assert max(s["rows"] for s in sim.sweeps) == 1
    assert computed(sim) == 40 + 2 * 8 + 3 * 19


def two_prompts_whose_first_samples_have_ended(tier_pages, expected_end):
    """What is kept of both prompts, three pages each, is all that the tier holds now."""
    sim = Samples(policy(rows=4, prefill_tokens=200), pages(gpu=tier_pages), expected_end=expected_end)
    for _ in range(2):
        sim.submit(64, 60, ends=(1, 60))
    sim.sweep()
    assert sim.used("gpu") == 6 and not sim.scheduler.running and len(sim.scheduler.waiting) == 2
    return sim


def test_prefix_that_only_waits_gives_way_to_a_row_that_grows():
    sim = two_prompts_whose_first_samples_have_ended(10, lambda row: 0)
    sim.run()
    assert sim.scheduler.restarts == 1, "the second sample entered without its prefix, and was the younger one"


def test_prefixes_that_only_wait_give_way_when_nothing_can_run_beside_them():
    expected = [0]
    sim = two_prompts_whose_first_samples_have_ended(10, lambda row: expected[0])
    expected[0] = 124  # eight pages, of which seven would be free or shared
    assert [len(run.tokens) for run in sim.sweep()] == [64]
    sim.run()
    assert sim.scheduler.restarts == 0


def test_row_that_is_preempted_begins_its_prompt_again():
    sim = Samples(policy(rows=4, prefill_tokens=100), pages(gpu=40))
    first, second = sim.submit(40, 9, ends=(None,) * 2)
    sim.sweep()
    sim.sweep()
    sim.scheduler.preempt(second)
    assert second.prefix is None and not second.shares
    runs = {run.owner: run for run in sim.sweep()}
    assert len(runs[second].tokens) == 41 and len(runs[first].tokens) == 1
    sim.run()
    assert sum(s["prompt"] for s in sim.sweeps) == 40


def test_row_that_computes_the_prompt_may_be_preempted_before_it_is_there():
    sim = Samples(policy(rows=4, prefill_tokens=20), pages(gpu=40))
    first, second = sim.submit(70, 4, ends=(None,) * 2)
    sim.sweep()
    sim.sweep()
    sim.scheduler.preempt(first)
    assert sim.scheduler.admission.prefixes.reserved_places == 0 and sim.scheduler.rows_waiting == 2
    sim.run()
    assert len(first.tokens) == len(second.tokens) == 74


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_dropped_request_leaves_nothing(after):
    sim = Samples(policy(rows=3, prefill_tokens=40), pages(gpu=40))
    rows = sim.submit(70, 9, ends=(None,) * 5)
    (other,) = sim.submit(30, 3)
    for _ in range(after):
        sim.sweep()
    for row in rows:
        sim.scheduler.drop(row)
    sim.run()
    assert sim.done == [other]


@pytest.mark.parametrize("seed", range(24))
def test_random_jobs_finish_whatever_is_shared_preempted_or_evicted(seed, tmp_path):
    rng = random.Random(seed)
    percent, tiers = rng.choice(
        [
            (GPU_KV, pages(gpu=rng.randint(8, 60))),
            (CPU_KV, pages(cpu=rng.randint(8, 60))),
            (DISK_KV, pages(disk=rng.randint(8, 60))),
            (MIXED_KV, pages(gpu=rng.randint(6, 20), cpu=rng.randint(8, 24), disk=rng.randint(6, 26))),
        ]
    )
    far_sighted = rng.choice((0.0, 0.4, 1.0))
    sim = Samples(
        policy(
            percent,
            rows=rng.randint(1, 12),
            prefill_tokens=rng.choice((7, 33, 200)),
            schedule=rng.choice(("rolling", "static")),
        ),
        tiers,
        tails=rng.randint(1, 6),
        tmp_path=tmp_path,
        expected_end=lambda row: row.prompt + int(far_sighted * (row.limit - row.prompt)),
    )
    longest, prompts = max(tiers.values()) * B, 0
    for _ in range(rng.randint(1, 14)):
        prompt = min(rng.choice((1, 16, 17, 33, rng.randint(1, 120))), longest - 1)
        gen = rng.randint(1, min(50, longest - prompt))
        sim.submit(prompt, gen, ends=[rng.randint(1, gen) for _ in range(rng.choice((1, 1, 2, 3, 8)))])
        prompts += prompt
    for _ in range(100_000):
        if not sim.scheduler.unfinished:
            break
        if rng.random() < 0.05 and sim.scheduler.running:
            sim.scheduler.preempt(rng.choice(sim.scheduler.running))
        sim.sweep()
    sim.run()
    assert len(sim.done) == len(sim.ends) and all(row.generated == sim.ends[row] for row in sim.done)
    assert sum(s["prompt"] for s in sim.sweeps) == prompts, "every prompt counts once"
    if far_sighted == 1.0 and sim.scheduler.restarts == 0:
        assert all(row.tokens[: row.prompt] == [1] * row.prompt for row in sim.done)
