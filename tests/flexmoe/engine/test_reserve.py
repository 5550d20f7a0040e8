"""Lengths that a job learns from its own rows: rare at first, fair to long rows, and worth their restarts."""

import numpy as np
import pytest

from flexmoe.engine.length_estimate import FIRST_ROWS, LengthEstimate
from flexmoe.engine.scheduler import Row
from flexmoe.params import EngineRequest, SamplingParams
from tests.support.scheduling import Simulation, pages, policy

PROMPT, LIMIT = 30, 1000


def row(generated=0, limit=LIMIT, **params):
    request = EngineRequest(request_id="r", prompt_token_ids=(1,) * PROMPT, params=SamplingParams(**params))
    return Row(request, [1] * (PROMPT + generated), PROMPT + limit)


def learned(lengths, running=(), limit=LIMIT):
    estimate = LengthEstimate(lambda: running)
    for length in lengths:
        estimate.add(row(length, limit))
    return estimate


def test_a_row_is_expected_at_its_limit_until_enough_rows_have_ended():
    assert learned([10] * (FIRST_ROWS - 1)).expected_end(row()) == PROMPT + LIMIT
    assert learned([10] * FIRST_ROWS).expected_end(row()) == PROMPT + 10


def test_a_row_is_expected_where_nineteen_of_twenty_have_ended():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 401))
    assert learned(lengths).expected_end(row()) == PROMPT + 380


def test_a_row_that_has_come_far_is_judged_by_those_that_came_as_far():
    estimate = learned([10] * 300 + list(range(201, 401)))
    assert estimate.expected_end(row()) == PROMPT + 375
    assert estimate.expected_end(row(generated=10)) == PROMPT + 390
    assert estimate.expected_end(row(generated=300)) == PROMPT + 395


def test_too_few_rows_say_nothing_of_what_lies_beyond_them():
    estimate = learned([10] * 300 + list(range(201, 401)))
    assert estimate.expected_end(row(generated=385)) == PROMPT + LIMIT
    assert estimate.expected_end(row(generated=700)) == PROMPT + LIMIT


def test_never_above_the_limit_of_the_row():
    assert learned([300] * 100).expected_end(row(limit=40)) == PROMPT + 40


def test_rows_that_were_cut_at_their_limit_say_only_that_they_came_so_far():
    """Half of the rows may only generate 50 tokens; those that may generate more take 100."""
    estimate = LengthEstimate(list)
    for _ in range(100):
        estimate.add(row(50, limit=50))
        estimate.add(row(100))
    assert estimate.expected_end(row()) == PROMPT + 100


def test_rows_in_flight_count_as_long_as_they_have_come():
    """The short rows of a block end first; those that still run are the long ones."""
    short, long_ = [10] * 100, [row(500) for _ in range(100)]
    assert learned(short).expected_end(row()) == PROMPT + 10
    assert learned(short, running=long_).expected_end(row()) == PROMPT + LIMIT


def test_old_rows_are_forgotten():
    estimate = learned([500] * 5000 + [20] * 5000)
    assert estimate.expected_end(row()) == PROMPT + 20


def test_rows_that_cannot_end_early_neither_teach_nor_learn():
    estimate = learned([10] * 100)
    assert estimate.expected_end(row(ignore_eos=True)) == PROMPT + LIMIT
    assert estimate.expected_end(row(ignore_eos=True, stop="x")) == PROMPT + 10
    untaught = LengthEstimate(list)
    for _ in range(200):
        untaught.add(row(10, ignore_eos=True))
    assert untaught.expected_end(row()) == PROMPT + LIMIT


def sweeps_and_restarts(learns, real, most, *, rows=300):
    """A job where the KV cache limits the rows in flight."""
    sim = Simulation(policy(rows=128, prefill_tokens=512), pages(gpu=16 * 640 // 16))
    if learns:
        estimate = LengthEstimate(lambda: sim.scheduler.running)
        sim.scheduler = type(sim.scheduler)(sim.policy, sim.cache, estimate.expected_end)
    lengths = np.broadcast_to(real, rows)
    for length in lengths:
        sim.submit(128, most, int(length))
    while sim.scheduler.unfinished:
        before = len(sim.done)
        sim.sweep()
        for ended in sim.done[before:] if learns else ():
            estimate.add(ended)
    return len(sim.sweeps), sim.scheduler.restarts


@pytest.mark.slow
def test_jobs_that_ask_for_much_and_take_little_need_far_fewer_sweeps():
    real = np.clip(np.random.default_rng(0).lognormal(np.log(160), 0.7, 300), 1, 1024).astype(int)
    (plain, _), (learned_, restarts) = (sweeps_and_restarts(learns, real, 1024) for learns in (False, True))
    assert learned_ < 0.7 * plain and restarts < 30


@pytest.mark.parametrize("most, real", [(200, 200), pytest.param(1024, 1024, marks=pytest.mark.slow)])
def test_jobs_that_take_what_they_ask_for_lose_nothing(most, real):
    assert sweeps_and_restarts(True, real, most, rows=130) == sweeps_and_restarts(False, real, most, rows=130)


@pytest.mark.slow
def test_jobs_whose_rows_become_longer_still_end():
    rng = np.random.default_rng(1)
    real = np.concatenate([rng.integers(10, 60, 150), rng.integers(300, 900, 150)])
    plain, _ = sweeps_and_restarts(False, real, 1024)
    learned_, restarts = sweeps_and_restarts(True, real, 1024)
    assert learned_ < plain and restarts > 0
