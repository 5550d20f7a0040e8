"""The projection of KV use is exact arithmetic: what is added is what is used, and what leaves is taken back."""

import random

import pytest

from policies.admission.kv_pages import KVPages
from policies.admission.kv_projection import Projection, growth

BLOCK = 16
PAGES = KVPages(page_tokens=BLOCK)


def test_a_row_holds_its_prompt_while_it_is_prefilled_then_grows_by_one_token_a_sweep():
    assert growth(30, 2, 4, PAGES) == [2, 2, 2, 2, 3, 3]
    assert growth(1, 1, 0, PAGES) == [1]
    assert growth(16, 1, 1, PAGES) == [1, 2]


def test_rows_that_together_exceed_the_tier_at_one_sweep_do_not_fit():
    projection = Projection(4)
    projection.add("a", [1, 2, 3])
    assert projection.fits([1, 2, 1, 4])
    assert not projection.fits([1, 3])
    assert not projection.fits([1, 1, 1, 5])


def test_staggered_rows_fit_where_rows_that_peak_together_do_not():
    projection = Projection(5)
    projection.add("a", [1, 2, 3])
    assert not projection.fits([1, 2, 3])
    projection.advance()
    assert projection.fits([1, 2, 3])


def test_the_peak_never_hides_a_sweep_beyond_the_new_row():
    projection = Projection(3)
    projection.add("long", [1, 1, 1, 1, 3])
    assert projection.peak == 3
    assert projection.fits([2, 2])


def test_held_blocks_take_room_in_every_sweep_and_rows_may_lend_theirs():
    projection = Projection(5)
    projection.held = 2
    projection.add("a", [1, 2])
    assert projection.peak == 4
    assert projection.fits([2, 1]) and projection.fits([1, 1, 3])
    assert not projection.fits([3, 1]) and not projection.fits([1, 1, 4])
    projection.lend("a", 1)
    assert projection.held == 3 and projection.peak == 4, "what it lends stays when it has ended"
    projection.remove("a")
    assert projection.peak == 3


def test_a_row_that_leaves_early_gives_back_its_future_and_only_that():
    projection = Projection(10)
    projection.add("a", [1, 2, 3, 4])
    projection.add("b", [2, 2, 2, 2])
    projection.advance()
    projection.remove("a")
    assert projection.peak == 2
    projection.advance()
    projection.remove("b")
    assert projection.peak == 0


def test_a_row_may_outlive_its_curve_and_still_be_removed():
    projection = Projection(10)
    projection.add("a", [1, 2])
    for _ in range(5):
        projection.advance()
    projection.remove("a")
    assert projection.peak == 0


@pytest.mark.parametrize("seed", range(5))
def test_random_rows_leave_the_sum_of_those_present(seed):
    rng, projection, present, now = random.Random(seed), Projection(10**6), {}, 0
    for step in range(200):
        if rng.random() < 0.4:
            curve = growth(rng.randint(1, 80), rng.randint(1, 4), rng.randint(0, 40), PAGES)
            projection.add(step, curve)
            present[step] = (now, curve)
        if present and rng.random() < 0.3:
            row = rng.choice(list(present))
            projection.remove(row)
            del present[row]
        if rng.random() < 0.6:
            projection.advance()
            now += 1
        want = max(
            (sum(c[t - s] for s, c in present.values() if s <= t < s + len(c)) for t in range(now, now + 90)), default=0
        )
        assert projection.peak == want
