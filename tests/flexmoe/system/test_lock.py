"""The lock of a work directory: one runner at a time, and none that a dead one keeps."""

import errno
import fcntl
import subprocess
import sys

import pytest

from flexmoe.errors import UsageError
from flexmoe.system import lock
from flexmoe.system.lock import Lock
from tests.support.paths import ROOT


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    code = f"import os, signal; from flexmoe.system.lock import Lock; Lock({str(tmp_path / 'lock')!r}); os.kill(os.getpid(), 9)"
    code = code.replace("Lock('", "Lock(__import__('pathlib').Path('").replace("'); os", "')); os")
    subprocess.run([sys.executable, "-c", code], timeout=60, cwd=ROOT)
    assert (tmp_path / "lock").exists()
    Lock(tmp_path / "lock").release()
    assert names(tmp_path) == []


def test_a_lock_file_that_was_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """Between opening and locking, the last holder may remove the file; two processes would then hold two locks."""
    path, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    held = Lock(path)
    assert len(calls) == 2 and path.exists()
    monkeypatch.undo()
    with pytest.raises(UsageError, match="another run"):
        Lock(path)
    held.release()


def test_a_file_system_without_locks_is_named_in_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    Lock(tmp_path / "lock").release()
    assert "has no locks" in caplog.text
