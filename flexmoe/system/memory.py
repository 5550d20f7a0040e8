"""Memory of this process: what it holds, what it may hold, and what it takes beside what a plan places.

A process may hold what the machine has available, within the limits of its cgroups (of both versions, and of the groups
above its own) and its resource limits. What it holds already is a part of that.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from flexmoe.system.machine import cpu_flags, lines_of
from policies.common.memory_units import GIB, MIB, SYSTEM_PAGE_BYTES

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: Directory of the memory controller, and the files of limit and use and the line of memory.stat that counts pages of files
#: which can be reclaimed; of version 2 and of version 1.
_VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
#: Resource limits, the field of /proc/self/statm that each bounds, and what is mapped and never touched: stacks of threads,
#: and for address space what the allocator reserves for each thread.
_LIMITS = ((resource.RLIMIT_AS, 0, GIB), (resource.RLIMIT_DATA, 5, 128 * MIB))
_RESIDENT_FIELD = 1
#: What a process takes between its plan and its last sweep beside what is planned: threads, buffers that libraries keep,
#: what the allocator cannot give back. Two cores took 80 to 105 MiB (benchmarks/memory.md).
_GROWTH_BYTES, _GROWTH_BYTES_PER_CORE = 128 * MIB, 4 * MIB
#: Code that oneDNN generates for products of 16-bit numbers of few sizes (`flexmoe.kernels.linear`): an estimate, where the
#: CPU has such instructions. The probe measures it.
_GENERATED_CODE_BYTES, _HAS_PRODUCTS = 128 * MIB, frozenset({"avx512bw", "avx512_bf16", "amx_bf16", "bf16"})
#: So that the same job meets the same number at each start.
_STEP_BYTES = 32 * MIB
#: A process is short of memory when less than this share of its limit is left.
_MARGIN = 1 / 64


def resident_bytes() -> int:
    """Memory that this process holds."""
    return _used(_RESIDENT_FIELD)


def available_host_bytes() -> int:
    """Memory that this process may still take: free or reclaimable, within its cgroups and resource limits."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in lines_of(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return max(0, min([available, *_rooms_of_cgroups(), *_rooms_of_limits()]))


def process_limit_bytes(memory_limit: float | None = None) -> int:
    """Memory that the whole process may hold, what it holds already included.

    Args:
        memory_limit: GiB that it may hold at most; None: what the machine, its cgroups and resource limits allow.
    """
    allowed = resident_bytes() + available_host_bytes()
    return allowed if memory_limit is None else min(allowed, int(memory_limit * GIB))


def process_bytes() -> int:
    """Memory that this process takes beside what is going to be planned: what it holds now, and what it grows by."""
    cores = len(os.sched_getaffinity(0))
    generated = 0 if _HAS_PRODUCTS.isdisjoint(cpu_flags()) else _GENERATED_CODE_BYTES
    needed = resident_bytes() + _GROWTH_BYTES + cores * _GROWTH_BYTES_PER_CORE + generated
    return -(-needed // _STEP_BYTES) * _STEP_BYTES


def is_short(limit_bytes: int) -> bool:
    """Whether the process is about to exceed a limit."""
    return resident_bytes() > (1 - _MARGIN) * limit_bytes


def _rooms_of_cgroups() -> Iterator[int]:
    """What each cgroup that this process is in, or that holds one of those, leaves it."""
    paths = [line.split(":", 2)[2].strip("/") for line in lines_of(_OWN_CGROUPS) if line.count(":") >= 2]
    for controller, limit_file, used_file, reclaimable in _VERSIONS:
        root = _CGROUPS / controller
        groups = {root / path for path in ("", *paths)}
        groups |= {above for own in groups for above in own.parents if above.is_relative_to(root)}
        for group in groups:
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and used is not None:
                stat = dict(line.split(" ", 1) for line in lines_of(group / "memory.stat") if " " in line)
                yield limit - used + int(stat.get(reclaimable, 0))


def _rooms_of_limits() -> Iterator[int]:
    for limit, field, untouched_bytes in _LIMITS:
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - _used(field) - untouched_bytes


def _used(field: int) -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[field]) * SYSTEM_PAGE_BYTES


def _number(path: Path) -> int | None:
    text = "".join(lines_of(path))
    return int(text) if text.isdigit() else None
