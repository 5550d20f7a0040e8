"""What the prompts of a job have in common, over the whole file.

Digests of the prompts' beginnings (`flexmoe.prefixes.digests`) lie in a temporary file, 8 bytes for each page of 16 tokens.
In memory there are a few numbers for each prompt. Page by page, prompts with equal digests are kept together; a prompt that has
its digest to itself is done with. So the work is what is shared, and a file without common prefixes costs one comparison.
"""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable

import numpy as np

from cost_model.memory.allocation import PAGE_TOKENS
from flexmoe.prefixes.digests import DIGEST_BYTES

#: Digests stay in memory up to so many bytes.
_MEMORY_BYTES = 2**24
#: Of prefixes that begin with each other, a prompt has so many at most; longer ones are cut to the last of them.
MOST_LEVELS = 8


class PrefixFinder:
    """Takes the digests of prompts one after the other.

    Args:
        page_tokens: tokens of a page.
    """

    def __init__(self, page_tokens: int = PAGE_TOKENS) -> None:
        self._page_tokens = page_tokens
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)
        self._counts, self._bytes = array("Q"), 0

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, digests: bytes) -> int:
        """Takes those of a prompt; returns its number."""
        self._bytes += self._file.write(digests)
        self._counts.append(len(digests) // DIGEST_BYTES)
        return len(self._counts) - 1

    def close(self) -> None:
        """Lets go of the digests; a second call does nothing."""
        self._file.close()

    def find(self) -> PrefixTree:
        """What the prompts have in common."""
        counts = np.frombuffer(self._counts, dtype=np.uint64).astype(np.int64)
        offsets = np.cumsum(counts) - counts
        digests = self._digests()
        found, node = _Nodes(), np.full(len(counts), -1, dtype=np.int32)
        active, depth = np.flatnonzero(counts > 0), 0
        while len(active):
            _, first, group, size = np.unique(
                digests[offsets[active] + depth], return_index=True, return_inverse=True, return_counts=True
            )
            own = found.extend(node[active[first]], size, depth + 1)
            own = own[group]
            active = active[own >= 0]
            node[active] = own[own >= 0]
            depth += 1
            active = active[counts[active] > depth]
        return PrefixTree(node, found.tokens(self._page_tokens), found.parents(), found.sizes())

    def _digests(self) -> np.ndarray:
        """All of them: in memory, or mapped from the file."""
        self._file.flush()
        if self._bytes > _MEMORY_BYTES:
            mapped = mmap.mmap(self._file.fileno(), self._bytes, access=mmap.ACCESS_READ)
            return np.frombuffer(mapped, dtype=np.uint64)
        self._file.seek(0)
        return np.frombuffer(self._file.read(), dtype=np.uint64)


class _Nodes:
    """The prefixes found so far: one grows for as long as all of its prompts go on alike."""

    def __init__(self) -> None:
        self._depths, self._parents, self._sizes, self._levels = (np.empty(0, dtype=np.int64) for _ in range(4))

    def extend(self, before: np.ndarray, sizes: np.ndarray, depth: int) -> np.ndarray:
        """Groups of prompts are alike up to so many pages; returns the prefix of each group, -1 for a prompt by itself.

        Args:
            before: of each group, the prefix of its prompts so far; -1: none.
            sizes: prompts of each group.
        """
        own = np.full(len(sizes), -1, dtype=np.int32)
        shared = sizes > 1
        grows = shared & (before >= 0)
        grows[grows] = self._sizes[before[grows]] == sizes[grows]
        own[grows] = before[grows]
        self._depths[before[grows]] = depth
        splits = shared & ~grows
        level = np.where(before >= 0, self._levels[before] if len(self._levels) else 0, 0)
        splits &= level < MOST_LEVELS
        count = int(splits.sum())
        own[splits] = len(self._depths) + np.arange(count)
        self._depths = np.append(self._depths, np.full(count, depth))
        self._parents = np.append(self._parents, before[splits])
        self._sizes = np.append(self._sizes, sizes[splits])
        self._levels = np.append(self._levels, level[splits] + 1)
        return own

    def tokens(self, page_tokens: int) -> np.ndarray:
        """Of each prefix."""
        tokens: np.ndarray = self._depths * page_tokens
        return tokens

    def parents(self) -> np.ndarray:
        """The prefix that each begins with; -1 where there is none."""
        return self._parents

    def sizes(self) -> np.ndarray:
        """Prompts of each."""
        return self._sizes


class PrefixTree:
    """Prefixes of a job's prompts, numbered so that shorter ones come before those that begin with them.

    Args:
        nodes: of each prompt its longest prefix; -1 where it has none.
        tokens, parents, sizes: of each prefix.

    Attributes:
        nodes, tokens, parents, sizes: as given.
    """

    def __init__(self, nodes: np.ndarray, tokens: np.ndarray, parents: np.ndarray, sizes: np.ndarray) -> None:
        self.nodes, self.tokens, self.parents, self.sizes = nodes, tokens, parents, sizes

    def __len__(self) -> int:
        return len(self.tokens)

    def ends(self, prompt: int) -> tuple[int, ...]:
        """Tokens up to which a prompt is like others, ascending."""
        ends, node = [], int(self.nodes[prompt])
        while node >= 0:
            ends.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tuple(reversed(ends))

    def means(self, page_tokens: int = PAGE_TOKENS) -> tuple[int, float]:
        """Tokens, in whole pages, that a prompt has in common with others on average, and how many prompts share such tokens:
        all but one of so many find them."""
        begin = np.where(self.parents >= 0, self.tokens[self.parents], 0) if len(self) else self.tokens
        held = int(((self.tokens - begin) * self.sizes).sum())
        length = round(held / max(1, len(self.nodes)) / page_tokens) * page_tokens
        return (length, held / max(1, held - self.shared_tokens)) if length else (0, 1.0)

    @property
    def shared_tokens(self) -> int:
        """Tokens of all prompts that are the same as those of an earlier one."""
        begin = np.where(self.parents >= 0, self.tokens[self.parents], 0) if len(self) else self.tokens
        return int(((self.tokens - begin) * (self.sizes - 1)).sum())


def find_prefixes(digests: Iterable[bytes]) -> PrefixTree:
    """What a few prompts have in common, from their digests."""
    finder = PrefixFinder()
    try:
        for each in digests:
            finder.add(each)
        return finder.find()
    finally:
        finder.close()
