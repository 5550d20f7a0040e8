"""Sizes of memory that the whole project counts in."""

import mmap

MIB, GIB = 1 << 20, 1 << 30
#: A page of this machine's memory: what direct input and output, and registered memory, are aligned to.
SYSTEM_PAGE_BYTES = mmap.PAGESIZE
