"""Shards become one output: every row once, in input order, and whatever is missing, foreign or changed is named."""

import itertools
import random

import pytest

from flexmoe.batch.merge_shards import merge_shards
from flexmoe.cli.merge import main
from flexmoe.job.manifest import Finished, Manifest, work_directory
from flexmoe.job.output_files import default_error_path, publish
from flexmoe.job.shards import Shard


def make(directory, total=11, count=3, failed=(), identity=None, only=None):
    """The files that finished shards of a job leave; rows in `failed` are error rows. Returns the output paths."""
    paths = []
    for index in range(count) if only is None else only:
        shard = Shard(index=index, count=count)
        path = shard.path(directory / "out.jsonl")
        rows = list(shard.rows(total))
        output = publish(path, [b'{"row": %d}\n' % row for row in rows if row not in failed])
        bad = [place for place, row in enumerate(rows) if row in failed]
        errors = publish(default_error_path(path), [b'{"bad": %d}\n' % rows[place] for place in bad]) if bad else None
        finished = Finished(
            rows_ok=len(rows) - len(bad),
            prompt_tokens=1,
            generated_tokens=1,
            output=output,
            errors=errors,
            failed_rows=tuple(bad),
        )
        manifest = Manifest(
            identity=identity or {"input": "x"},
            rows=len(rows),
            shard=(index, count),
            created_s=index,
            model_name="m",
            finished=finished,
        )
        work_directory(path).mkdir(exist_ok=True)
        manifest.save(work_directory(path) / "manifest.json")
        paths.append(path)
    return paths


def test_the_error_files_that_a_pattern_takes_in_are_passed_over(tmp_path, capsys):
    make(tmp_path, failed={4, 5})
    paths = sorted(tmp_path.glob("out.shard-*.jsonl"), key=lambda path: path.is_dir())
    paths = [path for path in paths if path.is_file()]
    assert len(paths) == 5
    code, _, err = call(capsys, "-o", tmp_path / "merged.jsonl", *paths)
    assert (code, err) == (3, "") and rows(tmp_path / "merged.errors.jsonl", b"bad") == [4, 5]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "merged").mkdir()
    return tmp_path / "merged" / "out.jsonl"


def rows(path, key=b"row"):
    return [int(line.split(b": ")[1].rstrip(b"}\n")) for line in path.read_bytes().splitlines()]


def test_every_row_is_there_once_in_input_order_whatever_failed_where(tmp_path, out):
    for seed, (total, count) in enumerate(itertools.product((0, 1, 2, 7, 20), (1, 2, 3, 8))):
        rng = random.Random(seed)
        failed = {row for row in range(total) if rng.random() < 0.3}
        directory = tmp_path / str(seed)
        directory.mkdir()
        paths = make(directory, total, count, failed)
        rng.shuffle(paths)
        assert merge_shards(out, paths, overwrite=True) == (total - len(failed), len(failed))
        assert rows(out) == [row for row in range(total) if row not in failed]
        errors = default_error_path(out)
        assert (rows(errors) if errors.exists() else []) == sorted(failed)


def call(capsys, *args):
    code = main([str(arg) for arg in args])
    return (code, *capsys.readouterr())


def test_the_command_says_what_it_made_and_exits_like_a_run(tmp_path, out, capsys):
    code, told, err = call(capsys, "-o", out, *make(tmp_path))
    assert (code, err) == (0, "") and "rows: 11 ok, 0 failed" in told and not default_error_path(out).exists()
    code, told, err = call(capsys, "-o", out, "--overwrite", *make(tmp_path, failed={4}))
    assert (code, err) == (3, "") and "10 ok, 1 failed" in told and str(default_error_path(out)) in told


def fault(capsys, out, paths, code, *parts):
    got, _, err = call(capsys, "-o", out, *paths)
    assert got == code and err.startswith("flexmoe.merge: ") and "Traceback" not in err, err
    for part in parts:
        assert str(part) in err
    assert not out.exists()


def test_a_missing_shard_is_named(tmp_path, out, capsys):
    fault(capsys, out, make(tmp_path, count=5, only=(0, 2, 4)), 2, "2 of 5 shards are missing: 1, 3")


def test_a_shard_given_twice_is_named(tmp_path, out, capsys):
    paths = make(tmp_path)
    fault(capsys, out, [*paths, paths[1]], 2, "both shard 1/3")


def test_shards_of_other_jobs_are_named_with_what_differs(tmp_path, out, capsys):
    (tmp_path / "b").mkdir()
    other = make(tmp_path / "b", only=(2,), identity={"input": "y"})
    fault(capsys, out, [*make(tmp_path, only=(0, 1)), *other], 2, "not shards of one job", "differ in input", other[0])
    other = make(tmp_path / "b", count=2, only=(1,))
    fault(capsys, out, [*make(tmp_path, only=(0,)), *other], 2, "one is of 3, the other of 2")


def test_an_unfinished_shard_is_named(tmp_path, out, capsys):
    paths = make(tmp_path)
    path = work_directory(paths[1]) / "manifest.json"
    held = Manifest.load(path)
    Manifest(identity=held.identity, rows=held.rows, shard=held.shard, created_s=1, model_name="m").save(path)
    fault(capsys, out, paths, 65, paths[1], "not finished", "1/3")


def test_a_file_without_a_manifest_is_named(tmp_path, out, capsys):
    paths = make(tmp_path)
    (tmp_path / "x.jsonl").write_text("{}\n")
    fault(capsys, out, [*paths, tmp_path / "x.jsonl"], 66, "x.jsonl", "no")
    fault(capsys, out, [*paths, tmp_path / "none.jsonl"], 66, "none.jsonl")


def test_an_output_of_a_whole_job_is_no_shard(tmp_path, out, capsys):
    [path] = make(tmp_path, count=1)
    manifest = work_directory(path) / "manifest.json"
    held = Manifest.load(manifest)
    Manifest(identity=held.identity, rows=11, shard=None, created_s=1, model_name="m", finished=held.finished).save(
        manifest
    )
    fault(capsys, out, [path], 2, "whole job")


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b.replace(b"4", b"5"), lambda b: b + b"{}\n"])
def test_a_file_that_is_not_as_its_run_left_it_is_named(tmp_path, out, capsys, damage):
    for failed, path in (
        ((), Shard(index=1, count=3).path(tmp_path / "out.jsonl")),
        ((4, 7), default_error_path(Shard(index=1, count=3).path(tmp_path / "out.jsonl"))),
    ):
        paths = make(tmp_path, failed=failed)
        path.write_bytes(damage(path.read_bytes()))
        fault(capsys, out, paths, 65, path, "not as its run left it")


def test_a_missing_error_file_is_named(tmp_path, out, capsys):
    paths = make(tmp_path, failed={4})
    default_error_path(paths[1]).unlink()
    fault(capsys, out, paths, 66, default_error_path(paths[1]))


def test_a_manifest_that_contradicts_its_files_is_noticed(tmp_path, out, capsys):
    paths = make(tmp_path, failed={4})
    path = work_directory(paths[1]) / "manifest.json"
    path.write_text(path.read_text().replace('"failed_rows": [\n   1\n  ]', '"failed_rows": []'))
    fault(capsys, out, paths, 65, paths[1])


def test_an_output_that_is_there_is_kept(tmp_path, out, capsys):
    out.write_text("mine")
    code, _, err = call(capsys, "-o", out, *make(tmp_path))
    assert code == 2 and "--overwrite" in err and out.read_text() == "mine"


def test_a_shard_may_not_be_the_output(tmp_path, capsys):
    paths = make(tmp_path)
    code, _, err = call(capsys, "-o", paths[0], *paths)
    assert code == 2 and "choose another" in err and rows(paths[0]) == [0, 3, 6, 9]


def test_a_directory_is_no_shard(tmp_path, out, capsys):
    fault(capsys, out, [tmp_path], 2, "is a directory")
