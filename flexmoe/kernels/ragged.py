"""Rows of unlike lengths, as attention sees them.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """Keys ``[begin, end)`` of the rows ``[first, stop)``, at least two, in the same whole pages. Each row's own begin behind
    its last ones."""

    first: int
    stop: int
    begin: int
    end: int


def find_shared(marks: Sequence[tuple[tuple[int, int], ...]]) -> tuple[SharedKeys, ...]:
    """What neighbouring rows have in common.

    Args:
        marks: of each row its beginnings, the shortest first: (tokens, a number that rows with the same beginning share).
    """
    found: list[SharedKeys] = []
    if any(marks):
        _find_shared(marks, SharedKeys(0, len(marks), 0, 0), 0, found)
    return tuple(each for each in found if each.end > each.begin)


def _find_shared(
    marks: Sequence[tuple[tuple[int, int], ...]], within: SharedKeys, level: int, found: list[SharedKeys]
) -> None:
    at = within.first
    while at < within.stop:
        stop, mark = at + 1, marks[at][level] if level < len(marks[at]) else None
        while stop < within.stop and mark is not None and marks[stop][level : level + 1] == (mark,):
            stop += 1
        if stop - at > 1 and mark is not None:
            place, each = len(found), SharedKeys(at, stop, within.end, mark[0])
            found.append(each)
            _find_shared(marks, each, level + 1, found)
            longer = found[place + 1 : place + 2]
            if longer and (longer[0].first, longer[0].stop) == (at, stop):  # the same rows have more in common
                found[place : place + 2] = [SharedKeys(at, stop, each.begin, longer[0].end)]
        at = stop


@dataclass(slots=True)
class Ragged:
    """Which rows an attention call serves; built once per sweep, used by every layer.

    Attributes:
        q_starts: int32 ``[B + 1]``, first query of each row.
        contexts: int32 ``[B]``, tokens of each row in the cache, the run included.
        tables: int32 ``[B, pages]``, page table of each row.
        shared: pages that several rows have in common, those of longer beginnings behind those of shorter ones; kernels may
            read each once for all of its rows.
        plans: what kernels derive from the rows, by what it depends on besides.
    """

    q_starts: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor
    shared: tuple[SharedKeys, ...] = ()
    plans: dict[Hashable, Planned] = field(default_factory=dict)
    _shared_index: torch.Tensor | None = None

    @classmethod
    def of(cls, q_lengths: list[int], contexts: list[int], tables: list[list[int]]) -> Ragged:
        """From plain lists."""
        widths = np.fromiter(map(len, tables), dtype=np.int64, count=len(tables))
        padded = np.zeros((len(tables), max(1, widths.max(initial=0))), dtype=np.int32)
        flat = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=int(widths.sum()))
        padded[np.arange(padded.shape[1]) < widths[:, None]] = flat
        starts = np.concatenate([[0], np.cumsum(q_lengths)]).astype(np.int32)
        return cls(torch.from_numpy(starts), torch.tensor(contexts, dtype=torch.int32), torch.from_numpy(padded))

    def seen_tokens(self, window: int | None = None) -> int:
        """Context tokens that are read for the rows' queries, over all rows; shared ones once."""
        if window is None:
            again = sum((each.stop - each.first - 1) * (each.end - each.begin) for each in self.shared)
            return int(self.contexts.sum()) - again
        return int(np.minimum(self.contexts.numpy(), self.q_lengths + window - 1).sum())

    def shared_index(self) -> torch.Tensor | None:
        """int32 ``[S, 4]``, what is shared; None where nothing is."""
        if self._shared_index is None and self.shared:
            values = [(each.first, each.stop, each.begin, each.end) for each in self.shared]
            self._shared_index = torch.tensor(values, dtype=torch.int32)
        return self._shared_index

    def common_pages(self, page_tokens: int) -> np.ndarray:
        """int64 ``[B]``: pages at the beginning of each row that it shares with others."""
        common = np.zeros(len(self.contexts), dtype=np.int64)
        for each in self.shared:
            common[each.first : each.stop] = each.end // page_tokens
        return common

    @property
    def q_lengths(self) -> np.ndarray:
        """int64 ``[B]``: queries of each row."""
        return np.diff(self.q_starts.numpy()).astype(np.int64)


@dataclass(slots=True, eq=False)
class Planned:
    """What a kernel derives from rows, once for all layers of a sweep.

    Attributes:
        packed: int32, all index arrays; on the host, until they are wanted on the device or somebody brings them there.
        described: the kernel's calls; an array stands for the next of the ``packed`` integers.
        calls: the same for the kernel, once it has been used.
    """

    packed: torch.Tensor
    described: list[dict[str, Any]]
    calls: list[Any] | None = None

    @classmethod
    def of(cls, described: list[dict[str, Any]]) -> Planned:
        """With the arrays packed."""
        arrays = (value for one in described for value in one.values() if isinstance(value, np.ndarray))
        flat = np.concatenate([np.empty(0, np.int32), *(array.reshape(-1).astype(np.int32) for array in arrays)])
        return cls(torch.from_numpy(flat), described)

    def on_device(self, device: torch.device, call: Callable[..., Any]) -> list[Any]:
        """The calls, each made by ``call`` from its description with the arrays as tensors on the device."""
        if self.calls is None:
            self.packed = self.packed.to(device)
            sizes = [v.size for one in self.described for v in one.values() if isinstance(v, np.ndarray)]
            pieces = iter(self.packed.split(sizes))
            self.calls = [
                call(**{k: next(pieces).view(v.shape) if isinstance(v, np.ndarray) else v for k, v in one.items()})
                for one in self.described
            ]
        return self.calls
