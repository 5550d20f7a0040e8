"""The job in a few numbers: means, histogram, longest row."""

import json
import random

import pytest

from policies import Workload
from policies.common.errors import UsageError


def test_a_histogram_counts_equal_rows_together_and_gives_the_means_rounded_up():
    w = Workload.of_lengths([(10, 4), (20, 4), (10, 4)])
    assert w.lengths == ((10, 4, 2), (20, 4, 1))
    assert (w.prompt_len, w.gen_len, w.num_requests, w.longest_row) == (14, 4, 3, 24)


def test_without_a_histogram_the_longest_row_is_the_mean_row():
    assert Workload(prompt_len=7, gen_len=5).longest_row == 12


def test_a_sample_of_the_rows_may_stand_for_a_larger_job():
    assert Workload.of_lengths([(10, 4)], num_requests=1000).num_requests == 1000


@pytest.mark.parametrize("seed", range(5))
def test_many_different_rows_are_gathered_and_keep_their_number_means_and_longest_row(seed):
    rng = random.Random(seed)
    rows = [(rng.randrange(1, 4000), rng.randrange(1, 900)) for _ in range(5000)]
    w = Workload.of_lengths(rows)
    assert len(w.lengths) <= 24 * 24
    assert sum(count for _, _, count in w.lengths) == len(rows)
    for axis in (0, 1):
        mean = sum(row[axis] for row in rows) / len(rows)
        assert sum(entry[axis] * entry[2] for entry in w.lengths) / len(rows) == pytest.approx(mean, rel=0.01)
        square = sum(row[axis] ** 2 for row in rows) / len(rows)
        assert sum(entry[axis] ** 2 * entry[2] for entry in w.lengths) / len(rows) == pytest.approx(square, rel=0.02)
    assert w.longest_row == max(map(sum, rows))


@pytest.mark.parametrize("seed", range(5))
def test_json_reads_back_to_the_same_workload(seed):
    rng = random.Random(seed)
    w = Workload.of_lengths([(rng.randrange(1, 90), rng.randrange(1, 90)) for _ in range(40)])
    assert Workload(**json.loads(json.dumps(w.to_json()))) == w
    short = Workload(prompt_len=3, gen_len=2)
    assert Workload(**json.loads(json.dumps(short.to_json()))) == short


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_len": 0},
        {"gen_len": 1.5},
        {"num_requests": 0},
        {"num_requests": True},
        {"lengths": [[1, 2]]},
        {"lengths": "abc"},
        {"lengths": [[1, 2, -1]]},
        {"longest_row": -1},
    ],
)
def test_a_value_that_is_none_is_refused_with_its_name(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Workload(**({"prompt_len": 4, "gen_len": 2} | bad))


def test_no_rows_are_no_workload():
    with pytest.raises(UsageError, match="at least one"):
        Workload.of_lengths([])
