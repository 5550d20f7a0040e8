"""Where the KV of a GPU batch's rows lies in one sweep: index tensors, derived once and used by every layer."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from flexmoe.kernels.ragged import Ragged
from flexmoe.kv.batch import Group, Run
from flexmoe.kv.cache import KVCache
from flexmoe.kv.disk import DiskIndex
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
        queries: of the layer under way, on the host; each store replaces them.
    """

    queries: torch.Tensor = field(default_factory=lambda: torch.empty(0))


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


def index_group(group: Group, cache: KVCache, device: torch.device) -> GroupIndex:
    """Index tensors of a group, each on the device that uses it; ``device`` is the compute device."""
    if group.mode is AttentionMode.FETCH:
        return _index_fetched(group, cache, device)
    home = _new_slots(cache, group.runs)
    ragged = group.ragged([r.kv.pages for r in group.runs])
    if group.mode is AttentionMode.GPU:
        return GroupIndex(group=group, home=home.to(device), ragged=ragged)
    return HostIndex(group=group, home=home, ragged=ragged)


def _index_fetched(group: Group, cache: KVCache, device: torch.device) -> FetchIndex:
    in_pool = [r for r in group.runs if r.kv.tier != "disk"]
    on_disk = [r for r in group.runs if r.kv.tier == "disk"]
    tables: list[list[int]] = []
    past, new, first = [], [], 0
    for r in group.runs:
        pages = cache.pages_for(r.kv.length + len(r.tokens))
        tables.append(list(range(first, first + pages)))
        past.append(_slots(cache, tables[-1], 0, r.kv.length))
        new.append(_slots(cache, tables[-1], r.kv.length, len(r.tokens)))
        first += pages
    return FetchIndex(
        group=group,
        home=_new_slots(cache, in_pool),
        ragged=group.ragged(tables),
        past_home=_joined(_slots(cache, r.kv.pages, 0, r.kv.length) for r in in_pool),
        staged_past=_joined(past).to(device),
        staged_new=_joined(new).to(device),
        disk=DiskIndex.of(on_disk, cache.page_tokens) if on_disk else None,
    )


def _new_slots(cache: KVCache, runs: Iterable[Run]) -> torch.Tensor:
    """Flat token slots of the runs' own tokens; most of them decode a single one."""
    size, found = cache.page_tokens, array("q")
    for run in runs:
        at, pages = run.kv.length, run.kv.pages
        if len(run.tokens) == 1:
            found.append(pages[at // size] * size + at % size)
        else:
            found.frombytes(_slots(cache, pages, at, len(run.tokens)).tobytes())
    return torch.from_numpy(np.frombuffer(found, dtype=np.int64).copy())


def _slots(cache: KVCache, pages: list[int], first: int, count: int) -> np.ndarray:
    """Flat token slots of tokens ``[first, first + count)`` of a row with this page table."""
    tokens, size = np.arange(first, first + count), cache.page_tokens
    slots: np.ndarray = np.asarray(pages, dtype=np.int64)[tokens // size] * size + tokens % size
    return slots


def _joined(pieces: Iterable[np.ndarray]) -> torch.Tensor:
    """One int64 index tensor of several arrays."""
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *pieces]))
