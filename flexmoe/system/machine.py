"""What this machine is, and what it has left of cores and disk space."""

from __future__ import annotations

import os
import platform
import shutil
import threading
from pathlib import Path

from flexmoe.errors import StorageError
from policies.common.option_names import option

_CGROUP = Path("/sys/fs/cgroup")


def free_disk_bytes(directory: Path) -> int:
    """Free bytes of the file system that holds ``directory`` or its nearest existing parent."""
    return shutil.disk_usage(nearest_existing(directory)).free


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and whole ones of the cgroup's quota."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = "".join(lines_of(_CGROUP / "cpu.max")).partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def yield_to_others(niceness: int) -> None:
    """Lower the calling thread's priority: on a core that it shares, the others run first; alone it is as fast as before.

    Args:
        niceness: added to the thread's; 19 is the lowest priority.
    """
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + niceness))


def busy_core_s() -> float | None:
    """Core-seconds that all processes have used since the machine started; None where it cannot be told apart, because
    this process may use only some of the cores that the kernel counts."""
    first = (lines_of(Path("/proc/stat")) or [""])[0].split()
    if len(first) < 9 or first[0] != "cpu" or usable_cores() != os.cpu_count():
        return None
    user, nice, system, _, _, irq, softirq, stolen = (int(ticks) for ticks in first[1:9])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def cpu_flags() -> frozenset[str]:
    """The processor's features, by the kernel's names (``avx2``, ``amx_bf16``); empty where it tells none."""
    for line in lines_of(Path("/proc/cpuinfo")):
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(values.split())
    return frozenset()


def instruction_set(flags: frozenset[str] | None = None) -> str:
    """The widest instructions for products that the processor has, for people.

    Args:
        flags: its features; None: of this machine.
    """
    flags = cpu_flags() if flags is None else flags
    if "amx_bf16" in flags:
        return "AMX"
    if "avx512f" in flags:
        return "AVX-512 with bf16" if "avx512_bf16" in flags else "AVX-512"
    if "avx2" in flags:
        return "AVX2"
    return "NEON with bf16" if {"asimd", "bf16"} <= flags else platform.machine()


def cpu_name() -> str:
    """The processor's name for people."""
    for line in lines_of(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def filesystem(path: Path) -> str:
    """Type of the file system that holds a path: a disk tier on `tmpfs` would be host memory."""
    path = path.absolute()
    mounts = [line.split()[1:3] for line in lines_of(Path("/proc/mounts"))]
    holding = [(where, kind) for where, kind in mounts if path.is_relative_to(where)]
    return max(holding, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def nearest_existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    here = path.absolute()
    while not here.exists():
        here = here.parent
    return here


def make_directory(path: Path) -> None:
    """Create a directory and its parents, where they are missing.

    Raises:
        StorageError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(
            f"cannot create the offload directory {path}: {e.strerror}; choose another {option('offload_dir')}"
        ) from e


def lines_of(path: Path) -> list[str]:
    """Lines of a small file of the system; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
