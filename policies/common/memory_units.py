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
