"""Sums over all sweeps, the last ones one by one, and no more memory for a long job than for a short one."""

import pytest

from flexmoe.engine.sweep_log import Sweep, SweepLog


def sweep(number):
    prompt = 7 if number % 3 == 0 else 0
    return Sweep(
        wall_s=number / 4, rows=number % 5, tokens=9, computed_tokens=12, prompt_tokens=prompt, generated_tokens=2
    )


def log_of(count, kept):
    log = SweepLog(kept)
    for number in range(count):
        log.add(sweep(number))
    return log


def test_totals_are_of_all_sweeps_and_only_the_last_ones_are_kept():
    log = log_of(100, kept=8)
    assert len(log) == 100 and list(log) == [sweep(number) for number in range(92, 100)]
    totals, all_ = log.totals, [sweep(number) for number in range(100)]
    for name in ("wall_s", "rows", "tokens", "computed_tokens", "prompt_tokens", "generated_tokens"):
        assert getattr(totals, name) == pytest.approx(sum(getattr(each, name) for each in all_))
    assert totals.most_rows == 4
    assert totals.prefill_s == pytest.approx(sum(each.wall_s for each in all_ if each.prompt_tokens))
    assert totals.prefill_s + totals.decode_s == pytest.approx(totals.wall_s)
    assert totals.decode_tokens == 2 * 66


@pytest.mark.parametrize("first, numbers", [(0, (2, 3, 4, 5)), (2, (2, 3, 4, 5)), (4, (4, 5)), (6, ()), (9, ())])
def test_sweeps_since_a_number_are_those_that_are_kept(first, numbers):
    assert log_of(6, kept=4).since(first) == [sweep(number) for number in numbers]
