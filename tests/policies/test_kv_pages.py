"""Pages of KV by a row's tokens: what a run sees is held, what no query to come sees is not, and the counts agree."""

import random

import pytest

from policies.admission.kv_pages import KVPages
from policies.admission.kv_projection import growth


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 18, 33, 128])
def test_a_row_holds_what_its_queries_see_whatever_its_runs(window):
    for seed in range(30):
        rng, layout = random.Random(seed), KVPages(page_tokens=16, full=2, windowed=3, window=window)
        past, first, chunk = 0, 0, rng.choice((1, 5, 40, 200))
        while past < 500:
            run = rng.randint(1, chunk) if rng.random() < 0.3 else 1
            first = max(first, layout.run_from(past, run))
            end = layout.covering(past + run)
            assert first <= max(0, past - window + 1) // 16, "a page that the run sees has been given back"
            assert layout.during(past, run) == 2 * end + 3 * (end - first) <= layout.most(past + run, max(chunk, run))
            assert run > 1 or end - first <= layout.ring
            past += run
            first = max(first, layout.kept_from(past))
            assert layout.held(past) == 2 * end + 3 * (end - first)


def test_a_window_of_128_takes_nine_pages_and_a_new_one_takes_the_place_of_the_oldest():
    layout = KVPages(page_tokens=16, windowed=1, window=128)
    assert layout.ring == 9
    assert {layout.during(past, 1) - layout.covering(past + 1) for past in range(128, 5000)} == {9}
    assert [layout.before(tokens) for tokens in (16, 128, 160, 1600)] == [2, 8 + 8, 10 + 8, 100 + 8]


@pytest.mark.parametrize("layout", [KVPages(page_tokens=16), KVPages(page_tokens=16, windowed=1, window=20), KVPages(page_tokens=16, full=0, windowed=1, window=20)], ids=str)  # fmt: skip
def test_the_longest_row_is_the_last_that_fits(layout):
    for pages in (1, 2, 3, 8, 9, 40):
        longest = layout.longest_row(pages, 30, limit=4096)
        assert not longest or layout.most(longest, 30) <= pages
        assert longest == 4096 or layout.most(longest + 16, 30) > pages


def test_a_row_is_projected_to_hold_its_chunk_and_then_its_window():
    layout = KVPages(page_tokens=16, windowed=1, window=20)
    assert growth(64, 2, 3, layout, 32) == [4 + 4, 4 + 4, 5 + 3, 5 + 3, 5 + 3]
    assert growth(160, 2, 2, layout, 80) == [10 + 8, 10 + 8, 11 + 3, 11 + 3]


def test_what_enters_holds_more_than_what_decodes():
    assert KVPages(page_tokens=16).entering(512, 4096) == 0
    layout = KVPages(page_tokens=16, windowed=2, window=128)
    assert layout.entering(512, 4096) == 8 * 2 * (32 - 9)
    assert layout.entering(64, 4096) == 0, "prompts within the window hold nothing that they lose"
