"""The work directory: one job, one runner, and every way in which the two may not be the same as before."""

import errno
import json
import os
from dataclasses import replace

import pytest

from flexmoe.errors import DataError, StorageError, UsageError
from flexmoe.job.manifest import Finished, Manifest, work_directory
from flexmoe.job.output_files import publish
from flexmoe.job.workspace import Workspace

IDENTITY = {"input": "a1", "model": "b2", "weights": "c3", "tokenizer": "d4", "gen_len": 32, "seed": 0}


def manifest(shard=None, rows=3, created_s=1000, **identity):
    return Manifest(identity=IDENTITY | identity, rows=rows, shard=shard, created_s=created_s, model_name="m")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def opened(output):
    """Opens the work directory of `output`; what is open at the end is closed."""
    spaces = []

    def call(wanted=None, **options):
        spaces.append(Workspace(output, output.with_name("out.errors.jsonl"), wanted or manifest(), **options))
        return spaces[-1]

    yield call
    for space in spaces:
        space.close()


def finished(output, lines=(b"a\n", b"b\n")):
    written = publish(output, lines)
    return Finished(rows_ok=2, prompt_tokens=5, generated_tokens=7, output=written, errors=None, failed_rows=(1,))


def begun(space):
    """Something has been done in it."""
    space.journal.finish(1, b"one\n")
    space.close()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_manifest_is_there_before_any_work_is(opened, output):
    space = opened()
    assert names(work_directory(output)) == ["lock", "manifest.json"]
    document = json.loads((work_directory(output) / "manifest.json").read_text())
    assert document["kind"] == "flexmoe.job" and document["identity"] == IDENTITY and document["finished"] is None
    assert space.finished is None


def test_a_second_start_goes_on_with_the_rows_and_the_time_of_the_first(opened):
    first = opened()
    first.journal.finish(1, b"one\n")
    first.close()
    again = opened(manifest(created_s=2000))
    assert again.manifest.created_s == 1000 and 1 in again.journal


@pytest.mark.parametrize(
    "change, kind, told",
    [
        ({"input": "zz"}, DataError, "the input file has changed"),
        ({"weights": "zz"}, DataError, "weights are others"),
        ({"tokenizer": "zz", "gen_len": 64}, DataError, "gen_len was 32 and is 64"),
        ({"gen_len": 64}, UsageError, "gen_len was 32 and is 64"),
        ({"seed": 7}, UsageError, "seed was 0 and is 7"),
        ({"chat_template": "t.jinja"}, UsageError, "chat_template was not given and is t.jinja"),
        ({"shard": (0, 2)}, UsageError, "shard was not given and is 0/2"),
    ],
    ids=str,
)
def test_another_job_is_refused_with_what_differs(opened, change, kind, told):
    begun(opened())
    with pytest.raises(kind, match="holds another job") as caught:
        opened(manifest(**change))
    assert told in str(caught.value) and "overwrite=True" in str(caught.value)
    assert 1 in opened().journal, "what was there is there still"


def test_a_job_in_which_nothing_was_done_leaves_nothing(opened, output):
    for touch in (
        lambda space: None,
        lambda space: space.journal,
        lambda space: space.journal.finish(0, b"no", failed=True),
    ):
        space = opened()
        touch(space)
        space.close()
        assert not work_directory(output).exists()


def test_a_job_that_was_killed_before_it_had_done_anything_gives_way_to_another(opened, output):
    space = opened()
    space.journal.finish(0, b"refused", failed=True)
    kept = {path.name: path.read_bytes() for path in work_directory(output).iterdir()}
    space.close()
    work_directory(output).mkdir()
    for name, data in kept.items():
        (work_directory(output) / name).write_bytes(data)
    assert opened(manifest(gen_len=64)).journal.rows_done == 0


def test_overwrite_starts_anew(opened):
    begun(opened())
    space = opened(manifest(gen_len=64, created_s=2000), overwrite=True)
    assert space.journal.rows_done == 0 and space.manifest.created_s == 2000
    begun(space)
    again = opened(manifest(gen_len=64))
    assert again.journal.rows_done == 1 and again.manifest.created_s == 2000


@pytest.mark.parametrize("looked", [False, True])
def test_overwrite_forgets_nothing_before_the_new_job_begins(opened, output, looked):
    begun(opened())
    work = work_directory(output)
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    space = opened(manifest(gen_len=64), overwrite=True)
    if looked:
        space.journal.finish(0, b"refused", failed=True)
        (work / "kept").write_bytes((work / "journal.new").read_bytes())
    space.close()
    if looked:
        (work / "kept").rename(work / "journal.new")  # as a kill leaves it
    assert 1 in opened().journal
    assert before.items() <= {path.name: path.read_bytes() for path in work.iterdir()}.items()
    assert not (work / "journal.new").exists()


@pytest.mark.parametrize("moment", ["remove", "save", "rename"])
def test_no_moment_of_the_beginning_mixes_two_jobs(opened, output, monkeypatch, moment):
    begun(opened())
    space = opened(manifest(gen_len=64), overwrite=True)
    space.journal.finish(0, b"refused", failed=True)

    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    names = {
        "remove": "flexmoe.job.workspace.remove",
        "save": "flexmoe.job.manifest.Manifest.save",
        "rename": "flexmoe.job.journal.Journal.rename",
    }
    with monkeypatch.context() as patched:
        patched.setattr(names[moment], killed)
        with pytest.raises(Killed):
            space.begin()
        space._journal.close()
        os.close(space._lock._descriptor)
        space._lock._descriptor = -1
    if moment == "rename":
        assert opened(manifest(gen_len=64)).journal.rows_done == 0
    else:
        assert (1 in opened().journal) == (moment == "remove")


def test_overwrite_forgets_nothing_where_there_is_no_room_for_the_first_row(opened, monkeypatch):
    begun(opened())
    space = opened(manifest(gen_len=64), overwrite=True)
    journal = space.journal

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("policies.common.file_io.os.write", full)
        with pytest.raises(StorageError):
            journal.finish(0, b"zero\n")
    space.close()
    assert 1 in opened().journal


def test_the_same_job_with_overwrite_goes_on_with_what_it_began(opened, output, caplog):
    space = opened(overwrite=True)
    begun(space)
    again = opened(manifest(created_s=2000), overwrite=True)
    assert 1 in again.journal and again.manifest.created_s == 1000
    assert "remove" in caplog.text and str(work_directory(output)) in caplog.text
    again.close()
    other = opened(manifest(gen_len=64), overwrite=True)
    assert other.journal.rows_done == 0, "another job starts anew"


def test_overwrite_does_a_finished_job_again_though_it_was_begun_so(opened, output):
    space = opened(overwrite=True)
    space.begin()
    space.finish(finished(output))
    space.close()
    again = opened(overwrite=True)
    assert again.finished is None and again.journal.rows_done == 0


def test_a_finished_job_is_known_and_its_journal_gone(opened, output):
    space = opened()
    space.journal.finish(0, b"a\n")
    done = finished(output)
    space.finish(done)
    space.close()
    assert names(work_directory(output)) == ["manifest.json"]
    assert opened().finished == done


def test_a_finished_job_whose_output_was_taken_away_is_done_again(opened, output):
    space = opened()
    space.finish(finished(output))
    space.close()
    output.unlink()
    again = opened()
    assert again.finished is None and again.journal.rows_done == 0


def test_a_finished_output_that_was_edited_is_not_replaced_without_being_told(opened, output):
    space = opened()
    space.finish(finished(output))
    space.close()
    output.write_text("mine")
    with pytest.raises(UsageError, match="not as the finished job left it"):
        opened()
    assert output.read_text() == "mine"


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl"])
def test_a_file_that_is_not_the_jobs_is_not_replaced_without_being_told(opened, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="was not begun by this job"):
        opened()
    assert names(tmp_path) == [name]
    assert opened(overwrite=True).finished is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"kind": "flexmoe.job"}',
        '{"kind": "flexmoe.job", "schema_version": 99}',
        '{"kind": "flexmoe.job", "schema_version": 1, "identity": 3}',
        "\x00" * 50,
    ],
)
def test_a_damaged_manifest_is_an_error_that_names_the_way_out(opened, output, text):
    work_directory(output).mkdir()
    (work_directory(output) / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="overwrite=True"):
        opened()
    assert opened(overwrite=True).finished is None


def test_a_work_directory_that_cannot_be_made_is_a_storage_error(opened, output):
    work_directory(output).write_text("in the way")
    with pytest.raises(StorageError, match="out.jsonl.flexmoe"):
        opened()


def test_the_fingerprint_is_the_same_for_all_shards_and_starts():
    one, other = manifest(shard=(0, 2), created_s=1), manifest(shard=(1, 2), created_s=2)
    assert one.fingerprint == other.fingerprint and one.part != other.part
    assert one.fingerprint != manifest(seed=1).fingerprint


def test_what_a_killed_process_left_of_a_file_that_it_published_is_removed(opened, output):
    space = opened()
    begun(space)
    errors, work = output.with_name("out.errors.jsonl"), work_directory(output)
    left = [path.with_name(f"{path.name}.tmp-123-0a1b2c3d") for path in (output, errors, work / "manifest.json")]
    kept = [output.with_name(name) for name in ("out.jsonl.tmp-of-mine", "other.jsonl.tmp-123-0a1b2c3d")]
    for path in (*left, *kept):
        path.write_bytes(b"half a file")
    assert 1 in opened().journal
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)


def test_a_job_that_goes_on_with_other_versions_says_so_and_one_with_the_same_does_not(opened, caplog):
    first = replace(manifest(), versions={"torch": "2.1", "flexmoe": "1"})
    begun(opened(first))
    opened(first).close()
    assert not caplog.messages
    opened(replace(first, versions={"torch": "2.2", "flexmoe": "1"}))
    [told] = caplog.messages
    assert "begun with torch 2.1 (now 2.2)" in told and "flexmoe" not in told.split("was begun")[1]


def test_a_second_runner_is_told_who_works_on_the_job(opened):
    opened()
    with pytest.raises(UsageError, match=rf"process {os.getpid()} on .*, since 2"):
        opened()
