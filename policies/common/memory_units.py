"""Sizes of memory that the whole project counts in."""

import mmap

MIB, GIB = 1 << 20, 1 << 30
#: A page of this machine's memory: what direct input and output, and registered memory, are aligned to.
SYSTEM_PAGE_BYTES = mmap.PAGESIZE


def align_down(value: int) -> int:
    """The page boundary at or below ``value``."""
    return value // SYSTEM_PAGE_BYTES * SYSTEM_PAGE_BYTES


def align_up(value: int) -> int:
    """The page boundary at or above ``value``."""
    return -(-value // SYSTEM_PAGE_BYTES) * SYSTEM_PAGE_BYTES


def in_units(nbytes: int) -> str:
    """A size for people: ``1.250 GiB``, ``3.1 MiB``, and in bytes below a tenth of a MiB.

    Example:
        >>> in_units(5 * MIB), in_units(100)
        ('5.0 MiB', '100 bytes')
    """
    if nbytes >= GIB / 10:
        return f"{nbytes / GIB:.3f} GiB"
    return f"{nbytes / MIB:.1f} MiB" if nbytes >= MIB / 10 else f"{nbytes} bytes"
