"""Default directories: what is named wins, then the home, and without one a private place in the temporary directory."""

import itertools
import os
import pwd
from pathlib import Path

import pytest

from policies.common.directories import OFFLOAD_DIR, cache_directory, hub_directory, resolved
from policies.common.errors import StorageError, UsageError

#: No directory can be made below these.
HOMES = {"missing": None, "a file": "/dev/null", "below a file": "/dev/null/home", "not writable": "/usr"}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No environment, no entry in passwd, and a temporary directory of the test's own."""

    def getpwuid(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "FLEXMOE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / f"flexmoe-{os.geteuid()}"


def test_the_environment_wins_then_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_directory() == tmp_path / "me" / ".cache" / "flexmoe" and hub_directory() is None
    assert resolved(OFFLOAD_DIR) == resolved("~/flexmoe_offload_dir") == tmp_path / "me" / "flexmoe_offload_dir"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/flexmoe")
    monkeypatch.setenv("FLEXMOE_CACHE", "/chosen")
    assert cache_directory() == Path("/chosen")


@pytest.mark.parametrize("home, named", list(itertools.product(HOMES, ["", "FLEXMOE_CACHE", "XDG_CACHE_HOME"])))
def test_without_a_home_to_write_to_every_place_is_private_and_what_is_named_still_wins(
    home, named, nowhere, monkeypatch
):
    if HOMES[home] is not None:
        monkeypatch.setenv("HOME", HOMES[home])
    if home == "not writable":  # to root, who may run the tests, it is
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    if named:
        monkeypatch.setenv(named, "/named")
    want = {"": nowhere / "cache", "FLEXMOE_CACHE": Path("/named"), "XDG_CACHE_HOME": Path("/named/flexmoe")}[named]
    assert cache_directory() == want
    assert hub_directory() == (None if named == "XDG_CACHE_HOME" else want / "huggingface")
    assert resolved(OFFLOAD_DIR) == nowhere / "offload"
    assert resolved("some/place") == Path("some/place")
    assert nowhere.stat().st_mode & 0o777 == 0o700


def test_a_place_that_others_may_use_is_refused_with_what_names_another(nowhere):
    nowhere.mkdir(mode=0o700)
    nowhere.chmod(0o755)
    with pytest.raises(StorageError, match="not a directory of this user alone.*FLEXMOE_CACHE"):
        cache_directory()
    nowhere.rmdir()
    nowhere.symlink_to("/tmp")
    with pytest.raises(StorageError, match="name one with offload_dir"):
        resolved(OFFLOAD_DIR)


def test_a_home_that_is_not_known_is_a_sentence():
    with pytest.raises(UsageError, match="give a path without ~"):
        resolved("~nobody-of-that-name/offload")
    with pytest.raises(UsageError, match="give a path without ~"):
        resolved("~/elsewhere")
