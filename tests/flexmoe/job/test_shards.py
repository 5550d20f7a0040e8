"""Shards divide a job evenly, say which part they are, and the order of work takes the longest rows first."""

import pytest

from flexmoe.errors import UsageError
from flexmoe.job.shards import Shard
from policies.admission.order import longest_first


def test_shards_take_every_row_once():
    for total, count in ((10, 3), (2, 5), (0, 2), (7, 1)):
        parts = [list(Shard(index=i, count=count).rows(total)) for i in range(count)]
        assert sorted(sum(parts, [])) == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["", "1", "1/", "2/2", "-1/2", "0/0", "a/b", "0/1001", "1/2/3", "٠/٢"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="shard"):
        Shard.parse(text)


def slurm(task, first, last, count):
    return {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(("ID", "MIN", "MAX", "COUNT"), (task, first, last, count))}


@pytest.mark.parametrize(
    "variables, shard",
    [
        ((0, 0, 7, 8), (0, 8)),
        ((7, 0, 7, 8), (7, 8)),
        ((3, 1, 4, 4), (2, 4)),
        ((10, 5, 15, 3), (1, 3)),
        ((4, 4, 4, 1), (0, 1)),
    ],
)
def test_slurms_array_gives_the_shard(variables, shard):
    assert Shard.of_slurm(slurm(*variables)) == Shard(index=shard[0], count=shard[1])


def test_work_of_another_division_is_found_by_its_name(tmp_path):
    for name in ("out.shard-0-of-8.jsonl.flexmoe", "outer.shard-0-of-4.jsonl.flexmoe", "out.shard-0-of-4.flexmoe"):
        (tmp_path / name).mkdir()
    Shard(index=1, count=8).check_division(tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="shard 0/4, and .*shard-0-of-8.* shard='i/8'"):
        Shard(index=0, count=4).check_division(tmp_path / "out.jsonl")
    Shard(index=0, count=4).check_division(tmp_path / "none" / "out.jsonl")


@pytest.mark.parametrize("variables", [{}, slurm("x", 0, 1, 2), slurm(3, 0, 9, 3), slurm(2, 0, 9, 4)], ids=str)
def test_an_array_that_is_no_even_one_is_refused(variables):
    with pytest.raises(UsageError, match="shard"):
        Shard.of_slurm(variables)


def test_a_shards_output_is_named_after_the_jobs(tmp_path):
    assert Shard(index=0, count=8).path(tmp_path / "out.jsonl") == tmp_path / "out.shard-0-of-8.jsonl"
    assert Shard(index=1, count=2).path(tmp_path / "results").name == "results.shard-1-of-2"


def test_rows_of_a_window_that_generate_most_come_first_and_nothing_is_read_ahead_of_it():
    lengths, taken = [(3, 50), (9, 1), (9, 2), (1, 90), (5, 1), (7, 1), (2, 1), (8, 1)], []

    def rows():
        for row in range(len(lengths)):
            taken.append(row)
            yield row

    order = longest_first(rows(), lengths.__getitem__, 4)
    assert [next(order) for _ in range(4)] == [2, 1, 0, 3] and len(taken) == 4
    assert list(order) == [7, 5, 4, 6]
