"""What this machine has left: memory a new process may take, disk space."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes() -> int:
    """Host memory that is free or reclaimable, within the cgroup's limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        cached = sum(
            int(line.split()[1]) for line in _lines(_CGROUP / "memory.stat") if line.startswith("inactive_file ")
        )
        available = min(available, limit - used + cached)
    return available


def free_disk_bytes(directory: Path) -> int:
    """Free bytes of the file system that holds ``directory`` or its nearest existing parent."""
    here = directory.absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None
