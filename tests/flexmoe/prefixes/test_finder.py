"""What prompts have in common, in whole pages, over any number of them; and the order that keeps those together."""

import itertools
import random

import pytest

from flexmoe.prefixes import finder as finder_module
from flexmoe.prefixes.digests import DIGEST_BYTES, page_digests
from flexmoe.prefixes.finder import MOST_LEVELS, PrefixFinder, find_prefixes
from flexmoe.prefixes.order import PrefixOrder

PAGE = 16


def tree_of(prompts):
    return find_prefixes(map(page_digests, prompts))


def common(a, b):
    """Tokens of the whole pages that both prompts begin with, fewer than either has."""
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return min(same, len(a) - 1, len(b) - 1) // PAGE * PAGE


def family(rng, depth=3):
    """Prompts that diverge at random places, some of them inside a page, and some that are the same."""
    prompts = [[]]
    for _ in range(depth):
        prompts = [p + [rng.randrange(3) for _ in range(rng.choice((0, 7, 16, 33)))] for p in prompts for _ in range(3)]
    return prompts + rng.sample(prompts, 5)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_a_prompt_has_a_digest_for_each_page_that_others_can_begin_after(length):
    assert len(page_digests([1] * length)) == (length - 1) // PAGE * DIGEST_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_a_prompt_ends_its_prefixes_where_others_go_their_own_ways(seed):
    prompts = [p for p in family(random.Random(seed)) if p]
    tree = tree_of(prompts)
    for at, prompt in enumerate(prompts):
        shared = {common(prompt, other) for i, other in enumerate(prompts) if i != at} - {0}
        assert set(tree.ends(at)) == shared


@pytest.mark.parametrize("seed", range(5))
def test_a_file_that_does_not_fit_in_memory_is_the_same(seed, monkeypatch):
    prompts = [p for p in family(random.Random(seed)) if p]
    ends = [tree_of(prompts).ends(i) for i in range(len(prompts))]
    monkeypatch.setattr(finder_module, "_MEMORY_BYTES", 64)
    assert [tree_of(prompts).ends(i) for i in range(len(prompts))] == ends


def test_shared_tokens_are_counted_once_for_each_prompt_that_finds_them():
    tree = tree_of([[1] * 100, [1] * 100, [1] * 40 + [2] * 60, [3] * 100])
    assert tree.ends(0) == (32, 96) and tree.ends(2) == (32,) and tree.ends(3) == ()
    assert tree.shared_tokens == 96 + 32


def test_no_prompt_has_more_prefixes_than_are_followed():
    prompts = [[1] * (PAGE * (i + 1)) + [2] * 8 for i in range(MOST_LEVELS + 5)]
    assert max(len(tree_of(prompts).ends(i)) for i in range(len(prompts))) == MOST_LEVELS


def test_nothing_is_found_where_nothing_is_common():
    assert len(tree_of([[i] * 50 for i in range(20)])) == 0 == len(tree_of([])) == len(tree_of([[1]]))


def test_a_finder_takes_prompts_without_a_whole_page():
    finder = PrefixFinder()
    assert [finder.add(page_digests(p)) for p in ([1], [1] * 40, [], [1] * 40)] == [0, 1, 2, 3]
    assert [finder.find().ends(i) for i in range(4)] == [(), (32,), (), (32,)]


# The order.


def order_of(prompts, lengths, window, rows=None):
    tree = tree_of(prompts)
    return list(
        PrefixOrder(tree, tree.nodes, lambda row: (lengths[row], 0)).waiting(rows or range(len(prompts)), window)
    )


@pytest.mark.parametrize("seed", range(10))
def test_every_row_waits_once_and_those_of_a_prefix_are_neighbours(seed):
    rng = random.Random(seed)
    heads = [[i] * 64 for i in range(6)]
    prompts = [rng.choice(heads) + [rng.randrange(9, 12) for _ in range(rng.randint(1, 30))] for _ in range(60)]
    order = order_of(prompts, [len(p) + 4 for p in prompts], 1000)
    assert sorted(order) == list(range(60))
    assert len([0 for a, b in itertools.pairwise(order) if prompts[a][0] != prompts[b][0]]) == 5


def test_longest_rows_come_first_among_all_and_within_a_prefix():
    prompts = [[1] * 40 + [2], [3] * 90, [1] * 40 + [2] * 60, [4] * 20]
    assert order_of(prompts, [41, 90, 100, 20], 10) == [2, 0, 1, 3]


def test_windows_follow_the_prefixes_through_the_whole_file():
    prompts = [[i % 3] * 64 + [7 + i] for i in range(30)]
    order = order_of(prompts, [65] * 30, 10)
    assert [prompts[i][0] for i in order] == [0] * 10 + [1] * 10 + [2] * 10


def test_a_short_prefix_does_not_break_the_order_by_length():
    prompts = [[1] * 16 + [5 + i] * (100 * (1 + i % 2)) for i in range(6)]
    lengths = [len(p) for p in prompts]
    assert [lengths[i] for i in order_of(prompts, lengths, 10)] == sorted(lengths, reverse=True)


def test_without_prefixes_the_order_is_that_of_the_lengths():
    prompts = [[i] * (20 + i) for i in range(9)]
    assert order_of(prompts, [len(p) for p in prompts], 3) == [2, 1, 0, 5, 4, 3, 8, 7, 6]
    assert order_of(prompts, [len(p) for p in prompts], 9, rows=[4, 1]) == [4, 1]
