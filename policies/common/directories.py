"""The directories that are used where none is named: below the user's home, or where that cannot be, private ones in the
temporary directory. Containers and batch systems run programs without a home, without an entry in passwd, or with a home
that may not be written.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

from policies.common.errors import StorageError, UsageError
from policies.common.option_names import option

log = logging.getLogger(__name__)
#: Where the disk tier's files go, and the disk whose rate is measured.
OFFLOAD_DIR = Path("~/flexmoe_offload_dir")


def cache_directory() -> Path:
    """Of measured machines and compiled kernels: `FLEXMOE_CACHE`, else `flexmoe` in `XDG_CACHE_HOME`, else in `~/.cache`.

    Raises:
        StorageError: there is no home to write to, and the directory in its place is another user's.
    """
    if chosen := os.environ.get("FLEXMOE_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "flexmoe"
    return _below_home(".cache/flexmoe") or _in_temporary("cache", "FLEXMOE_CACHE")


def hub_directory() -> Path | None:
    """Where models of the Hugging Face hub are kept if there is no home to write to; None: where its library puts them.

    Raises:
        StorageError: as `cache_directory`.
    """
    chosen = any(
        os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    )
    return None if chosen or _below_home(".cache/huggingface") else cache_directory() / "huggingface"


def resolved(directory: str | os.PathLike[str]) -> Path:
    """A directory that somebody named, with ``~`` for the home; for `OFFLOAD_DIR`, one that may be written to.

    Raises:
        UsageError: it begins with a home that is not known.
        StorageError: as `cache_directory`.
    """
    path = Path(directory)
    if path == OFFLOAD_DIR:
        return _below_home(OFFLOAD_DIR.name) or _in_temporary("offload", option("offload_dir"))
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path} begins with a home directory that is not known; give a path without ~") from error


def _below_home(name: str) -> Path | None:
    """A path below the home, if it is there or may be made."""
    try:
        wanted = Path.home() / name
    except RuntimeError:  # no HOME, and no entry in passwd
        return None
    here = wanted
    while not here.exists() and here != here.parent:
        here = here.parent
    return wanted if os.access(here, os.W_OK | os.X_OK) else None


def _in_temporary(name: str, choice: str) -> Path:
    """A directory that is this user's alone: others may write to the temporary directory too.

    Args:
        choice: what names another one.
    """
    private = Path(tempfile.gettempdir()) / f"flexmoe-{os.geteuid()}"
    try:
        private.mkdir(mode=0o700, exist_ok=True)
        status = private.lstat()
    except OSError as error:
        raise StorageError(f"cannot create {private}: {error.strerror}; name a directory with {choice}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise StorageError(f"{private} is not a directory of this user alone; remove it, or name one with {choice}")
    _tell(private / name, choice)
    return private / name


@functools.lru_cache(maxsize=16)
def _tell(directory: Path, choice: str) -> None:
    log.warning("there is no home directory to write to: %s is used; %s names another", directory, choice)
