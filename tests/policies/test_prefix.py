"""Rows that begin alike: the beginning is computed once, held once, counted no lower than it is held, and never waited for in
vain."""

import random
from itertools import permutations

import pytest

from cost_model.model.arch import LayerGroup
from flexmoe.engine.scheduler import Row
from flexmoe.params import EngineRequest, SamplingParams
from policies.placement import TIERS
from tests.support.scheduling import CPU_KV, DISK_KV, GPU_KV, MIXED_KV, Simulation, pages, policy

B = 16


class Samples(Simulation):
    """A simulation whose requests have several samples, and which remembers the tokens that were written to each page."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.written, self.copied, self.known = {}, [], {}

    def compute(self, runs, copies):
        for copy in copies:
            self.copied.append((copy.source, copy.target, sum(len(sources) for sources, _ in copy.pages)))
            for source, target in (pair for each in copy.pages for pair in zip(*each, strict=True)):
                self.written[copy.target, target] = self.written[copy.source, source]
        for run in runs:
            self.check_begun(run)
            for at, page in full_pages(run.kv, 0, run.kv.length):
                assert self.written[run.kv.tier, page] == run.owner.tokens[: (at + 1) * B], "a page of other tokens"
        for run in runs:
            for at, page in full_pages(run.kv, run.kv.length, run.kv.length + len(run.tokens)):
                self.written[run.kv.tier, page] = run.owner.tokens[: (at + 1) * B]
        self.known = {run.owner: run.kv for run in runs}

    def check_begun(self, run):
        """What is in a tier nobody computes, nor two rows what they share."""
        for prefix in run.owner.prefix.path if run.owner.prefix else ():
            makers = [copy.maker for copy in prefix.copies.values()]
            assert makers.count(None) == len(makers) or len(makers) == 1
            if None in makers and self.known.get(run.owner) is not run.kv and not run.owner.computes_all:
                assert run.kv.length >= prefix.tokens, "it is there"

    def submit(self, prompt, gen, ends=(None,), token=None, prefix_ends=()):
        """``prompt``: a number of tokens that nobody else has, or token ids."""
        ids = prompt if isinstance(prompt, tuple) else (token or 1000 + len(self.ends),) * prompt
        request = EngineRequest(
            request_id=str(len(self.ends)),
            prompt_token_ids=ids,
            params=SamplingParams(max_tokens=gen),
            prefix_ends=prefix_ends,
        )
        rows = [Row(request, list(ids), len(ids) + gen) for _ in ends]
        self.ends |= {row: end or gen for row, end in zip(rows, ends)}
        self.scheduler.submit(rows)
        return rows

    def sweep(self):
        runs = super().sweep()
        admission = self.scheduler.admission
        for tier in TIERS:
            rows = [row for row in admission.running if row.tier == tier]
            common = {id(copy): copy for row in rows for copy in held_by(row)}.values()
            held = sum(row.pages for row in rows) + sum(copy.pages for copy in common)
            assert held <= self.cache.total(tier), "the buffers are made for no more"
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


def full_pages(kv, begin, end):
    """(number, page) of the pages that are full when so many tokens are stored, from the first that was not before."""
    for table in kv.tables:
        for at in range(max(table.first, begin // B), end // B):
            yield at, table.pages[at - table.first]


def held_by(row):
    """The shared pages that a row in flight holds."""
    ends = row.held.prefix.path if row.held else ()
    return [prefix.copies[row.tier] for prefix in ends]


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
    for token in (1, 2):
        sim.submit(64, 92, ends=(1, 92), token=token)
    sim.sweep()
    assert sim.used("gpu") == 6 and not sim.scheduler.running and len(sim.scheduler.waiting) == 2
    return sim


def test_prefix_that_only_waits_gives_way_to_a_row_that_grows():
    sim = two_prompts_whose_first_samples_have_ended(12, lambda row: 0)
    sim.run()
    assert sim.scheduler.restarts == 1, "the younger one gave way, and entered again when the other had ended"


def test_prefixes_that_only_wait_give_way_when_nothing_can_run_beside_them():
    expected = [0]
    sim = two_prompts_whose_first_samples_have_ended(12, lambda row: expected[0])
    expected[0] = 156  # ten pages: three of its own prefix and seven more, of which six are free
    assert [len(run.tokens) for run in sim.sweep()] == [16], "the other prefix went"
    sim.run()
    assert sim.scheduler.restarts == 0


def test_row_that_is_preempted_begins_behind_the_pages_that_others_hold():
    sim = Samples(policy(rows=4, prefill_tokens=100), pages(gpu=40))
    first, second = sim.submit(40, 9, ends=(None,) * 2)
    sim.sweep()
    sim.sweep()
    sim.scheduler.preempt(second)
    assert second.held is None and not second.shared_pages
    runs = {run.owner: run for run in sim.sweep()}
    assert len(runs[second].tokens) == 41 - 32 and len(runs[first].tokens) == 1
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


# Prompts of different requests.


def family(sim, *rows, head=64, gen=5):
    """Rows of requests that begin with the same ``head`` tokens, each with so many of its own."""
    return [
        sim.submit((7,) * head + (100 + len(sim.ends),) * own, gen, prefix_ends=(head // B * B,))[0] for own in rows
    ]


@pytest.mark.parametrize(
    "percent, tiers", [(GPU_KV, pages(gpu=40)), (CPU_KV, pages(cpu=40)), (DISK_KV, pages(disk=40))]
)
def test_what_requests_begin_with_alike_is_computed_and_held_once(percent, tiers, tmp_path):
    sim = Samples(policy(percent, rows=8, prefill_tokens=100), tiers, tails=8, tmp_path=tmp_path)
    first, *others = family(sim, 8, 20, 3, 40)
    sim.sweep()
    assert [run.owner for run in sim.sweeps[-1]["runs"]] == [first]
    sim.sweep()
    (tier,) = [tier for tier, count in tiers.items() if count]
    assert sim.used(tier) == 4 + 1 + 2 + 1 + 3
    assert [row.found_tokens for row in (first, *others)] == [0, 64, 64, 64]
    sim.run()
    assert computed(sim) == 72 + 20 + 3 + 40 + 4 * (5 - 1)
    assert sim.scheduler.prefix_metrics() == {
        "needed_tokens": 4 * 64 + 71,
        "saved_tokens": 3 * 64,
        "hit_rate": 3 * 64 / (4 * 64 + 71),
    }


def test_what_requests_begin_with_alike_is_copied_where_their_tier_lacks_it(tmp_path):
    """Four pages that are shared and four rows of one of their own fill a tier."""
    sim = Samples(
        policy(MIXED_KV, rows=12, prefill_tokens=1000), pages(gpu=8, cpu=8, disk=8), tails=12, tmp_path=tmp_path
    )
    rows = family(sim, *[8] * 12)
    sim.sweep()
    sim.sweep()
    assert len(sim.scheduler.running) == 12
    assert [count for *_, count in sim.copied] == [4, 4], "once for each of the other tiers"
    assert all(sim.used(tier) == 4 + 4 for tier in TIERS), "shared once in each tier"
    assert [row.found_tokens for row in rows] == [0] + [64] * 11
    assert len({row.kv.shared for row in rows}) == 3, "rows of a tier share its pages"
    sim.run()
    assert computed(sim) == 64 + 12 * 8 + 12 * 4


def test_a_row_waits_for_what_is_computed_in_a_tier_that_has_no_room_for_it(tmp_path):
    sim = Samples(policy((100, 0, 50, 50, 100, 0), rows=4, prefill_tokens=40), pages(gpu=5, cpu=5))
    first, second = family(sim, 8, 8)
    for _ in range(2):
        assert [run.owner for run in sim.sweep()] == [first]
        assert sim.scheduler.rows_waiting == 1
    sim.sweep()
    assert second.tier != first.tier and second.found_tokens == 64 and sim.copied == [(first.tier, second.tier, 4)]
    sim.run()


@pytest.mark.parametrize("window", [None, 5, 40])
def test_longer_beginnings_are_copied_behind_shorter_ones_that_are_there(window):
    groups = (LayerGroup(None, (0,)), LayerGroup(window, (1,))) if window else ()
    sim = Samples(policy((100, 0, 50, 50, 100, 0), rows=9, prefill_tokens=1000), pages(gpu=99, cpu=99), groups=groups)
    head, tail = (7,) * 32, (8,) * 48
    rows = [sim.submit((*head, *tail, at), 90, prefix_ends=(32, 80))[0] for at in range(2)]
    other = sim.submit((*head, *(9,) * 3), 90, prefix_ends=(32,))[0]
    late = sim.submit((*head, *tail, 5), 90, prefix_ends=(32, 80))[0]
    admission = sim.scheduler.admission
    order = {other: ["cpu"], late: ["cpu"]}
    admission._tiers = lambda row: order.get(row, ["gpu"])
    for _ in range(4):
        sim.sweep()
    assert [row.found_tokens for row in (*rows, other, late)] == [0, 80, 32, 80]
    assert (other.tier, late.tier) == ("cpu", "cpu") and other.kv.shared == late.kv.shared[:1]
    layout = sim.cache.layout
    assert sim.copied == [("gpu", "cpu", layout.before(32)), ("gpu", "cpu", layout.before(80) - layout.shared(32))]
    sim.run()


def test_idle_pages_that_another_tier_has_too_go_first():
    sim = Samples(policy((100, 0, 50, 50, 100, 0), rows=3, prefill_tokens=1000), pages(gpu=40, cpu=40))
    admission = sim.scheduler.admission
    twice = [sim.submit((1,) * 64 + (at,), 1, prefix_ends=(64,))[0] for at in range(4)]
    once = [sim.submit((2,) * 32 + (at,), 1, prefix_ends=(32,))[0] for at in range(2)]
    order = {twice[1]: ["cpu"]}
    admission._tiers = lambda row: order.get(row, ["gpu"])
    admission.waiting.clear()
    admission.waiting.extend([twice[0], twice[1], once[0]])
    for _ in range(3):
        sim.sweep()
    assert sim.used("gpu") == 4 + 2 and sim.used("cpu") == 4 and not admission.running
    assert admission.prefixes.evict("gpu")
    assert set(twice[0].prefix.copies) == {"cpu"} and set(once[0].prefix.copies) == {"gpu"}
    admission.waiting.extend([twice[2], twice[3], once[1]])
    sim.scheduler.drop(twice[3])
    sim.run()
    assert twice[2].found_tokens == 64


def test_unlike_prompts_with_the_same_ends_share_nothing():
    sim = Samples(policy(rows=8, prefill_tokens=1000), pages(gpu=60))
    for token in range(4):
        sim.submit((token,) * 70, 3, prefix_ends=(32, 64))
    sim.run()
    assert computed(sim) == 4 * 70 + 4 * 2 and sim.scheduler.saved_tokens == 0


def test_longer_beginnings_go_on_from_shorter_ones():
    sim = Samples(policy(rows=8, prefill_tokens=1000), pages(gpu=60))
    head, tail = (7,) * 32, (8,) * 48
    a, _ = (
        sim.submit((*head, *tail, 1), 9, prefix_ends=(32, 80))[0],
        sim.submit((*head, *tail, 2), 9, prefix_ends=(32, 80)),
    )
    c = sim.submit((*head, *(9,) * 60), 9, prefix_ends=(32,))[0]
    d = sim.submit((*head, *tail, 3, 3), 9, prefix_ends=(32, 80))[0]
    sim.sweep()
    sim.sweep()
    assert (a.found_tokens, c.found_tokens, d.found_tokens) == (0, 32, 80)
    assert c.kv.pages[:2] == a.kv.pages[:2] and d.kv.pages[:5] == a.kv.pages[:5] and c.kv.pages[2] != a.kv.pages[2]
    assert [end for end, _ in d.kv.shared] == [32, 80] and c.kv.shared == d.kv.shared[:1]
    sim.run()
    assert computed(sim) == 81 + 1 + 60 + 2 + 4 * 8


def test_a_row_does_not_wait_for_a_small_part_of_its_prompt():
    sim = Samples(policy(rows=8, prefill_tokens=1000), pages(gpu=60))
    rows = family(sim, 100, 100, 100, head=16)
    assert [run.owner for run in sim.sweep()] == rows
    sim.run()


def test_waiting_rows_are_released_when_the_row_that_computes_leaves():
    sim = Samples(policy(rows=8, prefill_tokens=200), pages(gpu=60))
    first, second, third = family(sim, 8, 8, 8)
    assert [run.owner for run in sim.scheduler.plan_sweep()] == [first]
    assert sim.scheduler.rows_waiting == 2 and sim.scheduler.admission.aside == [second, third]
    sim.scheduler.drop(first)
    assert list(sim.scheduler.waiting) == [second, third]
    sim.run()
    assert second.found_tokens == 0 and third.found_tokens == 64


def test_a_row_that_waits_for_a_beginning_can_be_dropped():
    sim = Samples(policy(rows=8, prefill_tokens=200), pages(gpu=60))
    rows = family(sim, 8, 8, 8)
    sim.scheduler.plan_sweep()
    sim.scheduler.drop(rows[1])
    assert sim.scheduler.admission.aside == [rows[2]]
    sim.scheduler.preempt(rows[0])
    sim.run()
    assert sim.done == [rows[0], rows[2]]


def test_clear_drops_rows_wherever_they_wait():
    sim = Samples(policy(rows=3, prefill_tokens=200), pages(gpu=60))
    family(sim, *[8] * 9)
    sim.scheduler.plan_sweep()
    assert sim.scheduler.admission.aside and sim.scheduler.waiting
    sim.scheduler.clear()
    sim.run()
    assert not sim.done


def test_a_row_that_needs_all_positions_computes_all_of_them_and_still_serves_others():
    sim = Samples(policy(rows=8, prefill_tokens=1000), pages(gpu=60))
    rows = family(sim, 8, 8, 8)
    rows[0].computes_all = rows[2].computes_all = True
    sim.run()
    assert [row.found_tokens for row in rows] == [0, 64, 0]


def test_pages_of_a_beginning_go_with_the_last_row_that_wants_them():
    sim = Samples(policy(rows=1, prefill_tokens=1000), pages(gpu=60))
    family(sim, 8, 8, gen=2)
    sim.sweep()
    sim.sweep()
    assert sim.used("gpu") == 4, "the second row waits"
    sim.sweep()
    sim.sweep()
    assert sim.used("gpu") == 0


def test_idle_beginnings_take_half_of_a_tier_at_most():
    sim = Samples(policy(rows=1, prefill_tokens=1000), pages(gpu=20))
    rows = []
    for token in range(6):
        rows += [sim.submit((token,) * 64 + (50 + i,), 1, prefix_ends=(64,))[0] for i in range(2)]
    order = rows[::2] + rows[1::2]
    sim.scheduler.waiting.clear()
    sim.scheduler.waiting.extend(order)
    for _ in range(6):
        sim.sweep()
        assert sim.used("gpu") <= 10
    sim.run()
    assert sum(row.found_tokens == 64 for row in rows) == 2, "four pages each: two of six were kept"


@pytest.mark.parametrize("window", [5, 16, 40])
def test_layers_with_a_window_share_what_the_next_token_sees(window):
    groups = (LayerGroup(None, (0,)), LayerGroup(window, (1,)))
    sim = Samples(policy(rows=8, prefill_tokens=1000), pages(gpu=120), groups=groups)
    rows = family(sim, 8, 20, 3, 40, gen=60)
    assert [len(run.tokens) for run in sim.sweep()] == [64], "the first row stops where the others begin"
    sim.run()
    assert [row.found_tokens for row in rows] == [0, 64, 64, 64]


def random_prompt(rng, longest):
    """Of a small tree of prompts, most of them with something in common."""
    ids, ends = [], []
    for level in range(rng.randint(0, 3)):
        ids += [10 * level + rng.randrange(2)] * rng.choice((16, 32, 20))
        ends.append(len(ids) // B * B)
    ids += [rng.randrange(10**6)] * rng.randint(1, 30)
    return tuple(ids[:longest]), tuple(ends)


def churn(seed, operations, tmp_path):
    """Random admissions, aborts and restarts; every page is accounted for in every sweep, and none is left."""
    rng = random.Random(seed)
    percent, tiers = rng.choice(
        [
            (GPU_KV, pages(gpu=rng.randint(12, 60))),
            (DISK_KV, pages(disk=rng.randint(12, 60))),
            (MIXED_KV, pages(gpu=rng.randint(12, 24), cpu=rng.randint(12, 24), disk=rng.randint(12, 26))),
        ]
    )
    windowed = rng.random() < 0.3
    groups = (LayerGroup(None, (0,)), LayerGroup(rng.choice((5, 40)), (1,))) if windowed else ()
    sim = Samples(
        policy(percent, rows=rng.randint(1, 12), prefill_tokens=rng.choice((7, 33, 200))),
        {tier: count * (1 + windowed) for tier, count in tiers.items()},
        tails=rng.randint(1, 6),
        tmp_path=tmp_path,
        groups=groups,
        expected_end=rng.choice((None, lambda row: row.prompt)),
    )
    if rng.random() < 0.5:  # what is shared is copied far more often
        usable = [tier for tier in TIERS if tiers[tier]]
        sim.scheduler.admission._tiers = lambda row: rng.sample(usable, len(usable))
    longest = min(count for count in tiers.values() if count) * B - 40
    done = 0
    while done < operations:
        done += 1
        kind, scheduler = rng.random(), sim.scheduler
        if kind < 0.4 and scheduler.rows_waiting < 20:
            prompt, ends = random_prompt(rng, longest)
            sim.submit(
                prompt, gen := rng.randint(1, 30), [rng.randint(1, gen)] * rng.choice((1, 1, 3)), prefix_ends=ends
            )
        elif kind < 0.5 and scheduler.running:
            scheduler.preempt(rng.choice(scheduler.running))
        elif kind < 0.6 and scheduler.unfinished:
            scheduler.drop(rng.choice([*scheduler.running, *scheduler.waiting, *scheduler.admission.aside]))
        elif kind < 0.601:
            scheduler.clear()
        elif scheduler.unfinished:
            sim.sweep()
    return sim.run()


@pytest.mark.parametrize("seed", range(6))
def test_no_page_is_lost_or_given_twice_whatever_comes_and_goes(seed, tmp_path):
    churn(seed, 400, tmp_path)


def test_beginnings_are_copied_between_all_tiers_whatever_comes_and_goes(tmp_path):
    sims = [churn(seed, 400, tmp_path) for seed in range(200, 212)]
    ways = {copied[:2] for sim in sims for copied in sim.copied}
    assert ways == set(permutations(TIERS, 2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_page_leaks_in_ten_thousand_admissions_aborts_and_restarts(seed, tmp_path):
    sim = churn(100 + seed, 10_000, tmp_path)
    assert sim.scheduler.saved_tokens > 0
