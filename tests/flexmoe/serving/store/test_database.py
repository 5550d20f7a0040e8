"""The schema of the database, its steps, and what is refused."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from flexmoe.errors import DataError
from flexmoe.serving.store.database import MIGRATIONS, Database


def test_a_new_database_is_in_wal_mode_at_the_newest_version(tmp_path):
    database = Database(tmp_path / "db")
    assert database.version == len(MIGRATIONS)
    assert database.rows("PRAGMA journal_mode")[0][0] == "wal"
    database.close()


def test_a_database_of_the_first_version_is_migrated_and_keeps_its_batches(tmp_path):
    old = Database(tmp_path / "db", MIGRATIONS[:1])
    old.rows(
        "INSERT INTO batches (id, status, endpoint, input_file_id, completion_window, output_file_id, error_file_id, "
        "created_at, expires_at) VALUES ('b', 'validating', '/v1/completions', 'f', '24h', 'o', 'e', 1, 2)"
    )
    old.close()
    new = Database(tmp_path / "db")
    assert [(row["id"], row["priority"]) for row in new.rows("SELECT * FROM batches")] == [("b", 0)]
    new.close()


def test_a_step_that_fails_changes_nothing(tmp_path):
    Database(tmp_path / "db").close()
    with pytest.raises(Exception, match="no such table"):
        Database(tmp_path / "db", (*MIGRATIONS, "CREATE TABLE more (x); INSERT INTO nowhere VALUES (1);"))
    again = Database(tmp_path / "db")
    assert again.version == len(MIGRATIONS)
    assert not again.rows("SELECT * FROM sqlite_master WHERE name = 'more'")
    again.close()


def test_a_newer_database_and_a_file_that_is_none_are_refused(tmp_path):
    Database(tmp_path / "newer", (*MIGRATIONS, "CREATE TABLE more (x)")).close()
    (tmp_path / "none").write_bytes(b"no database at all" * 100)
    for name, words in (("newer", "newer FlexMoE"), ("none", "damaged or none")):
        with pytest.raises(DataError, match=words):
            Database(tmp_path / name)


def test_a_transaction_that_an_error_leaves_changes_nothing(tmp_path):
    database = Database(tmp_path / "db")
    with pytest.raises(KeyError), database.transaction():
        database.rows(
            "INSERT INTO files (id, filename, purpose, size_bytes, created_s) VALUES ('a', 'n', 'batch', 1, 2)"
        )
        raise KeyError
    assert not database.rows("SELECT * FROM files")
    database.close()
    with pytest.raises((DataError, sqlite3.ProgrammingError)):
        database.rows("SELECT 1")


def test_a_read_waits_for_no_transaction_and_sees_those_that_have_ended(tmp_path):
    database = Database(tmp_path / "db")
    with ThreadPoolExecutor(1) as other:
        with database.transaction():
            database.rows(
                "INSERT INTO files (id, filename, purpose, size_bytes, created_s) VALUES ('a', 'n', 'b', 1, 2)"
            )
            assert other.submit(database.read, "SELECT * FROM files").result(10) == []
        assert [row["id"] for row in other.submit(database.read, "SELECT * FROM files").result(10)] == ["a"]
    database.close()
