"""The rows of a sweep dealt to two half-blocks."""

import random
from types import SimpleNamespace

import pytest

from flexmoe.kv.batch import Block, Run
from policies.admission.row_state import AttentionMode
from policies.schedule import in_first_half

MODES = list(AttentionMode)


def runs_of(count, seed=0):
    rng = random.Random(seed)
    return [
        Run(
            SimpleNamespace(shared=(), tier="cpu", length=rng.randint(0, 9)),
            [1] * rng.choice([1, 1, 1, 5]),
            rng.choice(MODES),
            1,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("rows, size", [(1, 4), (4, 4), (5, 4), (9, 3), (10, 3), (31, 4), (32, 4)])
def test_both_halves_are_whole_batches_and_have_every_row_once(rows, size):
    runs = runs_of(rows)
    block = Block(runs, size, half_blocks=2)
    batches = -(-rows // size)
    assert {id(run) for run in block.runs} == {id(run) for run in runs} and len(block.runs) == rows
    assert len(block.batches) == batches
    assert [run for batch in block.batches for group in batch.groups for run in group.runs] == block.runs
    first = in_first_half(batches)
    assert sum(len(g.runs) for b in block.batches[:first] for g in b.groups) == rows * first // batches


def test_each_half_has_half_of_the_rows_of_each_kind():
    runs = runs_of(400)
    block = Block(runs, 50, half_blocks=2)
    halves = [
        [run for b in part for g in b.groups for run in g.runs] for part in (block.batches[:4], block.batches[4:])
    ]
    for mode in MODES:
        of_mode = [sum(run.mode is mode for run in half) for half in halves]
        assert abs(of_mode[0] - of_mode[1]) <= 1


def test_each_batch_of_two_halves_has_its_part_of_the_rows_of_each_kind():
    block = Block(runs_of(400), 50, half_blocks=2)
    batches = [[run for g in b.groups for run in g.runs] for b in block.batches]
    for mode in MODES:
        of_mode = [sum(run.mode is mode for run in batch) for batch in batches]
        assert max(of_mode) - min(of_mode) <= 2
    for batch in batches:
        assert len(batch) == 50
        assert [MODES.index(run.mode) for run in batch] == sorted(MODES.index(run.mode) for run in batch)


@pytest.mark.parametrize("rows", [1, 3, 16, 40, 97])
def test_no_batch_of_two_halves_fetches_more_rows_than_it_may(rows):
    """Rows are spread over more batches, where most of those that are left are fetched."""
    runs = [run for run in runs_of(3 * rows, seed=rows) if run.mode is not AttentionMode.GPU][:rows]
    block = Block(runs, 20, half_blocks=2, fetched_rows=4)
    fetched = [sum(len(g.runs) for g in b.groups if g.mode is AttentionMode.FETCH) for b in block.batches]
    assert max(fetched) <= 4
    assert len(block.batches) == max(-(-len(runs) // 20), -(-sum(fetched) // 4))


def test_the_tokens_of_the_halves_lie_side_by_side():
    block = Block(runs_of(31), 4, half_blocks=2)
    first, second = block.halves(4)
    assert first == slice(0, block.batches[3].stop)
    assert second == slice(block.batches[4].start, block.tokens)
    assert block.halves(0) == [slice(0, block.tokens)]


def test_one_half_block_keeps_rows_of_a_kind_together():
    block = Block(runs_of(40), 8)
    places = [MODES.index(run.mode) for run in block.runs]
    assert places == sorted(places)


def prefixed(marks, length, count):
    return [
        Run(SimpleNamespace(shared=marks, tier="cpu", length=length), [1], AttentionMode.CPU, 1) for _ in range(count)
    ]


def halves_of(runs, size):
    block = Block(runs, size, half_blocks=2)
    middle = in_first_half(len(block.batches))
    return [
        [r for b in part for g in b.groups for r in g.runs] for part in (block.batches[:middle], block.batches[middle:])
    ]


def test_rows_of_one_prefix_come_to_one_half():
    runs = [run for number in range(4) for run in prefixed(((160, number),), 170, 16)]
    random.Random(0).shuffle(runs)
    first, second = halves_of(runs, 16)
    assert len(first) == len(second) == 32
    assert not {r.kv.shared for r in first} & {r.kv.shared for r in second}


def test_of_one_prefix_of_all_rows_the_longer_ones_are_kept_together():
    runs = [run for number in range(4) for run in prefixed(((32, 9), (160, number)), 170, 16)]
    random.Random(0).shuffle(runs)
    first, second = halves_of(runs, 16)
    assert len(first) == len(second) == 32
    assert not {r.kv.shared for r in first} & {r.kv.shared for r in second}


def test_a_prefix_of_all_rows_is_in_both_halves():
    long, short = prefixed(((160, 0),), 400, 20), prefixed(((160, 0),), 170, 20)
    halves = halves_of([*long, *short], 20)
    assert [sum(r.kv.length == 400 for r in half) for half in halves] == [10, 10]


def test_rows_of_one_prefix_are_dealt_to_both_halves_where_one_would_read_more():
    runs = [
        *prefixed(((160, 0),), 176, 20),
        *prefixed((), 176, 28),
    ]  # together, the other half would read 24 whole rows
    halves = halves_of(runs, 24)
    assert [sum(bool(r.kv.shared) for r in half) for half in halves] == [10, 10]


@pytest.mark.parametrize("seed", range(20))
def test_halves_of_rows_with_prefixes_have_as_many_of_each_kind(seed):
    rng = random.Random(seed)
    runs = runs_of(96, seed)
    for run in runs:
        marks = tuple((16 * (i + 1), rng.randint(0, 2)) for i in range(rng.randint(0, 3)))
        run.kv.shared, run.kv.length = marks, 48 + rng.randint(1, 9)
    first, second = halves_of(runs, 8)
    assert sorted(map(id, (*first, *second))) == sorted(map(id, runs)) and len(first) == 48
    for mode in MODES:
        of_mode = [sum(run.mode is mode for run in half) for half in (first, second)]
        assert abs(of_mode[0] - of_mode[1]) <= 1
