"""A file is written whole or not at all, durably, and like any other file of its user."""

import os
import stat

import pytest

from policies.common import file_io


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_synced_before_it_has_its_name_and_the_directory_after(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace

    def noted_sync(descriptor):
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noted_replace(old, new):
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(file_io.os, "fsync", noted_sync)
    monkeypatch.setattr(file_io.os, "replace", noted_replace)
    file_io.write_file(tmp_path / "out", [b"one", b"two"])
    assert (tmp_path / "out").read_bytes() == b"onetwo" and names(tmp_path) == ["out"]
    assert calls == ["file", "rename", "directory"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_what_was_there_stays_where_the_disk_is_full_and_nothing_else_is_left(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").write_bytes(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(file_io.os, call, full)
        with pytest.raises(OSError, match="No space left"):
            file_io.write_file(tmp_path / "out", [b"after"])
    assert (tmp_path / "out").read_bytes() == b"before" and names(tmp_path) == ["out"]


def test_an_error_of_the_pieces_leaves_what_was_there(tmp_path):
    (tmp_path / "out").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError):
        file_io.write_file(tmp_path / "out", (bytes(1 // n) for n in (1, 0)))
    assert (tmp_path / "out").read_bytes() == b"before" and names(tmp_path) == ["out"]


def test_a_file_has_the_mode_that_the_umask_leaves_and_takes_the_place_of_a_link(tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / "target").write_bytes(b"target")
        (tmp_path / "out").symlink_to("target")
        file_io.write_file(tmp_path / "out", [b"new"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "target").read_bytes() == b"target"


def test_the_pattern_finds_what_a_killed_process_has_left_and_nothing_else(tmp_path):
    with file_io.temporary_file(tmp_path / "o[u]t") as (_, left):
        (tmp_path / "o[u]t.tmp-of-mine").touch()
        assert list(tmp_path.glob(file_io.temporary_pattern(tmp_path / "o[u]t"))) == [left]
