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
    for half in halves:
        assert [MODES.index(run.mode) for run in half] == sorted(MODES.index(run.mode) for run in half)


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
