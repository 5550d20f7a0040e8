"""Files by id and batches by state."""

import pytest

from flexmoe.serving.store.batches import BatchStore
from flexmoe.serving.store.database import Database
from flexmoe.serving.store.files import FileStore, Upload


@pytest.fixture
def database(tmp_path):
    found = Database(tmp_path / "db")
    yield found
    found.close()


@pytest.fixture
def files(database, tmp_path):
    return FileStore(database, tmp_path)


def kept(files, data=b"line\n", name="in.jsonl", purpose="batch", now_s=100, expires_s=None):
    with Upload(files.uploads / "0123") as upload:
        upload.write(data)
        upload.sync()
        return files.keep("0123", name, purpose, now_s, expires_s)


def test_a_file_has_its_bytes_below_its_id_whatever_its_name(files, tmp_path):
    file = kept(files, b"abc", "../../etc/passwd")
    assert files.path(file).read_bytes() == b"abc" and files.path(file).parent == tmp_path / "files"
    assert files.get(file.id) == file and file.filename == "../../etc/passwd" and file.size_bytes == 3
    assert not list((tmp_path / "uploads").iterdir())


def test_an_upload_that_is_not_kept_leaves_nothing(files, tmp_path):
    with pytest.raises(KeyError), Upload(files.uploads / "0123") as upload:
        upload.write(b"half")
        raise KeyError
    assert not list((tmp_path / "uploads").iterdir()) and files.page(10) == ([], False)


def test_what_a_killed_process_has_left_is_swept_away(files, tmp_path):
    file = kept(files)
    (tmp_path / "uploads" / "cut").write_bytes(b"half")
    (tmp_path / "files" / "file-unknown").write_bytes(b"never kept")
    files.sweep()
    assert [path.name for path in (tmp_path / "files").iterdir()] == [file.id]
    assert not list((tmp_path / "uploads").iterdir())


def test_pages_follow_a_cursor_in_both_orders_and_by_purpose(files):
    made = [kept(files, purpose=purpose) for purpose in ("batch", "vision", "batch", "batch")]
    newest = list(reversed(made))
    first, more = files.page(2)
    assert first == newest[:2] and more
    assert files.page(2, first[-1]) == (newest[2:], False)
    assert files.page(9, made[0], ascending=True) == (made[1:], False)
    assert files.page(9, purpose="vision") == ([made[1]], False)


def test_a_deleted_file_is_read_to_its_end_by_who_has_it_open(files):
    file = kept(files, b"abc")
    with open(files.path(file), "rb") as reader:
        files.delete(file)
        assert reader.read() == b"abc"
    assert files.get(file.id) is None and not files.path(file).exists()


def test_files_expire(files):
    old, later = kept(files, expires_s=150), kept(files, expires_s=300)
    files.expire(200)
    assert files.get(old.id) is None and files.get(later.id) == later


@pytest.fixture
def batches(database):
    return BatchStore(database)


def made(batches, **values):
    given = {"metadata": {"a": "b"}, "files_expire_s": None, "priority": 0, "most_open": 3} | values
    return batches.create(
        endpoint="/v1/completions", input_file_id="f", completion_window="24h", now_s=5, expires_at=9, **given
    )


def test_a_batch_changes_its_state_only_from_those_that_it_may(batches):
    batch = made(batches)
    assert batches.advance(batch.id, "finalizing", ("in_progress",)) is None
    now = batches.advance(batch.id, "failed", ("validating",), failed_at=7, errors=[{"code": "x", "line": 3}])
    assert (now.status, now.failed_at, now.errors, now.metadata) == (
        "failed",
        7,
        [{"code": "x", "line": 3}],
        {"a": "b"},
    )
    assert batches.advance(batch.id, "cancelling", ("validating", "in_progress")) is None and now.has_ended


def test_no_more_batches_are_open_than_may_be(batches):
    first, _, _ = made(batches), made(batches), made(batches)
    assert made(batches) is None
    batches.advance(first.id, "completed", ("validating",))
    assert made(batches) is not None and len(batches.open()) == 3


def test_batches_are_listed_newest_first_and_found_by_their_files(batches):
    several = [made(batches) for _ in range(3)]
    page, more = batches.page(2)
    assert [batch.id for batch in page] == [several[2].id, several[1].id] and more
    assert [batch.id for batch in batches.page(2, page[-1])[0]] == [several[0].id]
    assert batches.of_file(several[1].error_file_id) == several[1] and batches.of_file("file-none") is None
