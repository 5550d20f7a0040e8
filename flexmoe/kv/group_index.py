"""Where the KV of a GPU batch's rows lies in one sweep: index tensors, derived once and used by every layer of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch

from flexmoe.kernels.ragged import Ragged, SharedKeys, find_shared
from flexmoe.kv.batch import Group, Run, ranges
from flexmoe.kv.cache import KVCache
from flexmoe.kv.disk import DiskIndex
from flexmoe.system.uploads import Wanted
from policies.admission.row_state import AttentionMode


@dataclass(slots=True, kw_only=True)
class GroupIndex:
    """Rows of one attention mode.

    Attributes:
        group: the rows.
        home: pool slots of the new tokens of rows whose home is a pool.
        ragged: the rows as attention sees them.
    """

    group: Group
    home: torch.Tensor
    ragged: Ragged


@dataclass(slots=True, kw_only=True)
class HostIndex(GroupIndex):
    """Rows attended on the CPU.

    Attributes:
        queries, sinks: of the layer under way, on the host; each store replaces them.
    """

    queries: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    sinks: torch.Tensor | None = None


@dataclass(slots=True, kw_only=True)
class FetchIndex(GroupIndex):
    """Rows whose KV is brought to the GPU, packed one row after another: those of the host pool, then those on disk.

    Attributes:
        past_home: pool slots of the past tokens of rows whose home is a pool.
        staged_past, staged_new: slots of past and of new tokens in the staging buffer.
        disk: of the rows on disk; None where there are none.
        sides: which of the two staging buffers a layer under way has.
    """

    past_home: torch.Tensor
    staged_past: torch.Tensor
    staged_new: torch.Tensor
    disk: DiskIndex | None
    sides: dict[int, int] = field(default_factory=dict)

    @property
    def past_tokens(self) -> int:
        """Tokens that a layer fetches."""
        return len(self.staged_past)


def index_group(group: Group, cache: KVCache, layers: int = 0) -> GroupIndex:
    """Index tensors of a group of rows, on the host; `on_device` says which of them belong on the compute device.

    Args:
        layers: number of a group of layers.
    """
    rows = _Rows.of(group.runs, cache, layers)
    if group.mode is AttentionMode.FETCH:
        return _index_fetched(group, rows, cache, layers)
    home, ragged = torch.from_numpy(rows.new_slots()), rows.ragged()
    kind = GroupIndex if group.mode is AttentionMode.GPU else HostIndex
    return kind(group=group, home=home, ragged=ragged)


def on_device(index: GroupIndex) -> list[Wanted]:
    """The index tensors that the compute device uses."""
    if isinstance(index, HostIndex):
        return []
    names = ("staged_past", "staged_new") if isinstance(index, FetchIndex) else ("home",)
    return [*((index, name) for name in names), *((plan, "packed") for plan in index.ragged.plans.values())]


def _index_fetched(group: Group, rows: _Rows, cache: KVCache, layers: int) -> FetchIndex:
    in_pool = sum(r.kv.tier != "disk" for r in group.runs)  # the first ones
    on_disk, staged = group.runs[in_pool:], rows.side_by_side()
    brought = rows.brought()
    pooled = replace(rows, seen=brought).first(in_pool)
    return FetchIndex(
        group=group,
        home=torch.from_numpy(pooled.new_slots()),
        ragged=staged.ragged(),
        past_home=torch.from_numpy(pooled.past_slots()),
        staged_past=torch.from_numpy(replace(staged, seen=brought).past_slots()),
        staged_new=torch.from_numpy(staged.new_slots()),
        disk=DiskIndex.of(on_disk, cache, layers, brought[in_pool:].tolist()) if on_disk else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows as arrays, since thousands of them are indexed in every sweep. All are int64.

    Attributes:
        size: tokens of a page.
        past, new: ``[B]``, tokens of each row in the cache, and of its run.
        seen: ``[B]``, number of the first page that the run sees.
        pages: the rows' page tables, one after the other.
        first_page: ``[B]``, where each row's page number 0 stands, or would.
        shared: what the rows have in common.
    """

    size: int
    past: np.ndarray
    new: np.ndarray
    seen: np.ndarray
    pages: np.ndarray
    first_page: np.ndarray
    shared: tuple[SharedKeys, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[Run], cache: KVCache, layers: int) -> _Rows:
        size, window = cache.page_tokens, cache.shape.groups[layers].window
        past = np.array([r.kv.length for r in runs], dtype=np.int64)
        new = np.array([len(r.tokens) for r in runs], dtype=np.int64)
        tables = [r.kv.tables[layers] for r in runs]
        counts = [len(table.pages) for table in tables]
        pages = np.fromiter(chain.from_iterable(table.pages for table in tables), np.int64, sum(counts))
        first_page, seen = np.cumsum([0, *counts])[:-1], np.zeros_like(past)
        shared: tuple[SharedKeys, ...] = ()
        if window is not None:
            first_page -= np.array([table.first for table in tables], dtype=np.int64)
            seen = np.maximum(0, past + 1 - window) // size
        else:
            shared = find_shared([r.kv.shared for r in runs])
        return cls(size=size, past=past, new=new, seen=seen, pages=pages, first_page=first_page, shared=shared)

    def first(self, count: int) -> _Rows:
        """So many of them."""
        cut = {name: getattr(self, name)[:count] for name in ("past", "new", "seen", "first_page")}
        return replace(self, **cut)

    def side_by_side(self) -> _Rows:
        """The same rows in a buffer: what they share, then of each row the other pages that it needs behind those of the one
        before."""
        needed = -(-(self.past + self.new) // self.size) - self.seen
        first_page, common = np.cumsum(needed) - needed, np.zeros_like(needed)
        pages = np.zeros(int(needed.sum()), dtype=np.int64)
        taken = 0
        for each in self.shared:
            columns = np.arange(each.begin // self.size, each.end // self.size)
            pages[first_page[each.first : each.stop, None] + columns] = taken + columns - columns[0]
            common[each.first : each.stop] = each.end // self.size
            taken += len(columns)
        own = needed - common
        pages[ranges(first_page + common, own)] = taken + np.arange(int(own.sum()))
        return replace(self, pages=pages, first_page=first_page - self.seen)

    def brought(self) -> np.ndarray:
        """``[B]``, number of the first page that is brought to the buffer for the row: those before it are brought for another
        one, or are not seen."""
        begin = self.seen.copy()
        for each in self.shared:
            begin[each.first + 1 : each.stop] = each.end // self.size
        return begin

    def new_slots(self) -> np.ndarray:
        """Flat token slots of the runs' tokens."""
        tokens = ranges(self.past, self.new)
        pages = self.pages[np.repeat(self.first_page, self.new) + tokens // self.size]
        slots: np.ndarray = pages * self.size + tokens % self.size
        return slots

    def past_slots(self) -> np.ndarray:
        """Flat token slots of the tokens before the runs, page by page, since there may be millions; of those that are seen."""
        pages = -(-self.past // self.size) - self.seen
        own = np.arange(self.size)
        left = np.repeat(self.past, pages) - ranges(self.seen, pages) * self.size
        whole = self.pages[ranges(self.first_page + self.seen, pages)][:, None] * self.size + own
        slots: np.ndarray = whole[own < left[:, None]]
        return slots

    def ragged(self) -> Ragged:
        """As attention sees them."""
        contexts = self.past + self.new
        pages = -(-contexts // self.size)
        places = np.arange(max(1, int(pages.max(initial=0))))
        table = np.clip(self.first_page[:, None] + places, 0, len(self.pages) - 1)
        held = (places < pages[:, None]) & (places >= self.seen[:, None])
        tables = np.where(held, self.pages[table], 0).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(self.new)]).astype(np.int32)
        lengths = torch.from_numpy(contexts.astype(np.int32))
        return Ragged(torch.from_numpy(starts), lengths, torch.from_numpy(tables), self.shared)
