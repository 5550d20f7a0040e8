"""Attention over a paged KV cache by flash attention for rows of any lengths: few launches, no mask, no padding.

The pages of all rows of a call are copied side by side, K once and V once, and one kernel attends to all of them. Query
heads that share a KV head are grouped by the kernel. Rows that lie in the pool one after another, as fetched rows do, are
attended where they are, unless they are compressed: those are unpacked side by side.

Rows that decode are attended apart from longer runs: with one query a row the kernel takes the heads that share a KV head
for queries of it, and reads K and V once for all of them.

Keys that rows share are attended to in a call of their own, in which all queries of these rows are those of one.

Legend: T tokens, H query heads, G KV heads, Dh head size, B rows of a call, P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from flexmoe.formats.packed_kv import copied_pages, is_packed
from flexmoe.kernels.log_sums import Merged
from flexmoe.kernels.ragged import Planned, Ragged

#: Of `torch.ops.aten._flash_attention_forward`; the first of what it returns is used.
FlashOp = Callable[..., tuple[torch.Tensor, ...]]
#: Pages that a call without a workspace copies at most, a row's own excepted.
DEFAULT_PAGES = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """Rows that are attended together.

    Attributes:
        queries: their tokens: a slice, or an int32 index.
        pages: their pages in the pool: a slice, or an int32 index.
        q_starts, k_starts: int32 ``[B + 1]``; a row's keys begin on a page.
        k_lengths: int32 ``[B]``.
        most_queries, most_keys: of a row.
        window: keys that a query sees before its own; -1: all.
        is_causal: the last query of a row sees its last key, and those before it see fewer; else every query sees all keys.
    """

    queries: slice | torch.Tensor
    pages: slice | torch.Tensor
    q_starts: torch.Tensor
    k_starts: torch.Tensor
    k_lengths: torch.Tensor
    most_queries: int
    most_keys: int
    window: int
    is_causal: bool = True


def flash(*arguments: object, **options: object) -> tuple[torch.Tensor, ...]:
    """Torch's own varlen flash attention. It takes the same arguments in all versions that we support, other than the
    wrapper in `torch.nn.attention.varlen`."""
    result: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_forward(*arguments, **options)
    return result


def varlen_paged_attention(
    q_THD: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    rows: Ragged,
    *,
    window: int | None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flexmoe.kernels.paged_attention.paged_attention` by flash attention.

    Args:
        workspace: ``[2, P, page_tokens, G, Dh]`` for the copies of K and V; no row has more pages. Made when absent.
    """
    room = DEFAULT_PAGES if workspace is None else workspace.shape[1]
    apart = bool(rows.shared) and window is None and gives_log_sums(q_THD.device, q_THD.dtype)
    calls: list[_Call] = plan_varlen(rows, k_pool.shape[1], room, window, apart).on_device(q_THD.device, _Call)
    scale = q_THD.shape[-1] ** -0.5
    if apart:
        merged = Merged(q_THD)
        for call in calls:
            attended_THd, lse_HT = _flash(call, q_THD[call.queries], k_pool, v_pool, scale, workspace)
            merged.add(call.queries, attended_THd, lse_HT.transpose(0, 1)[: len(attended_THd)])
        return merged.result(q_THD, sinks, out)
    if out is None and len(calls) == 1 and isinstance(calls[0].queries, slice):
        return _attend(calls[0], q_THD, k_pool, v_pool, scale, workspace, sinks)
    out_THD = torch.empty_like(q_THD) if out is None else out
    for call in calls:
        if isinstance(call.queries, slice):
            out_THD[call.queries] = _attend(call, q_THD[call.queries], k_pool, v_pool, scale, workspace, sinks)
        else:
            attended = _attend(call, q_THD.index_select(0, call.queries), k_pool, v_pool, scale, workspace, sinks)
            out_THD.index_copy_(0, call.queries.long(), attended)
    return out_THD


@cache
def gives_log_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash attention on a device gives the logarithms of its sums as ``[H, T]``, which sinks need. The layout is another
    one in some versions, so it is tried: rows that decode, and longer ones."""
    generator = torch.Generator().manual_seed(0)
    return all(_gives_log_sums(device, dtype, queries, generator) for queries in (1, 3))


def _gives_log_sums(device: torch.device, dtype: torch.dtype, queries: int, generator: torch.Generator) -> bool:
    rows, keys, heads, shared, size = 3, 16, 4, 2, 64
    q_THd = torch.randn(rows * queries, heads, size, generator=generator).to(dtype)
    k_SGd = torch.randn(rows * keys, heads // shared, size, generator=generator).to(dtype)
    q_starts, k_starts = (torch.arange(rows + 1, dtype=torch.int32, device=device) * each for each in (queries, keys))
    lengths = k_starts[1:] - k_starts[:-1]
    on_device = q_THd.to(device), k_SGd.to(device), k_SGd.to(device)
    _, lse, *_ = flash(
        *on_device, q_starts, k_starts, queries, keys, 0.0, True, False, scale=size**-0.5, window_size_left=None,
        window_size_right=None, seqused_k=lengths,
    )  # fmt: skip
    q_BqHd, k_BSHd = q_THd.double().unflatten(0, (rows, -1)), k_SGd.double().unflatten(0, (rows, -1))
    scores = torch.einsum("bqhd,bkhd->hbqk", q_BqHd, k_BSHd.repeat_interleave(shared, dim=2)) * size**-0.5
    scores = scores.masked_fill(torch.ones(queries, keys).triu(keys - queries + 1).bool(), -torch.inf)
    expected = scores.logsumexp(-1).flatten(1)
    return lse.shape == expected.shape and torch.allclose(lse.cpu().double(), expected, atol=0.05)


def _attend(
    call: _Call,
    q_THD: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    scale: float,
    workspace: torch.Tensor | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    out_THD, lse_HT = _flash(call, q_THD, k_pool, v_pool, scale, workspace)
    return out_THD if sinks_H is None else _with_sinks(out_THD, lse_HT, sinks_H)


def _flash(
    call: _Call,
    q_THD: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    scale: float,
    workspace: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the logarithms of its sums."""
    k, v = (_side_by_side(pool, call.pages, q_THD, workspace, which) for which, pool in enumerate((k_pool, v_pool)))
    out_THD, lse_HT, *_ = flash(
        q_THD,
        k,
        v,
        call.q_starts,
        call.k_starts,
        call.most_queries,
        call.most_keys,
        0.0,  # no dropout
        call.is_causal,
        False,  # no mask for debugging
        scale=scale,
        window_size_left=call.window if call.window >= 0 else None,
        window_size_right=0 if call.window >= 0 else None,
        seqused_k=call.k_lengths,
    )
    return out_THD, lse_HT


def _with_sinks(out_THD: torch.Tensor, lse_HT: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """What attention gives with one more score s in each softmax: e^lse / (e^lse + e^s) of it, where lse is the logarithm of the
    sum over the keys."""
    share_TH = torch.sigmoid(lse_HT.transpose(0, 1)[: len(out_THD)] - sinks_H.float())
    return (out_THD.float() * share_TH.unsqueeze(-1)).to(out_THD.dtype)


def _side_by_side(
    pool: torch.Tensor, pages: slice | torch.Tensor, q_THD: torch.Tensor, workspace: torch.Tensor | None, which: int
) -> torch.Tensor:
    """``[P · page_tokens, G, Dh]``: the pages one after another."""
    if isinstance(pages, slice) and not is_packed(pool):
        return pool[pages].flatten(0, 1)
    return copied_pages(pool, pages, q_THD, None if workspace is None else workspace[which]).flatten(0, 1)


def plan_varlen(rows: Ragged, page_tokens: int, room: int, window: int | None, apart: bool = False) -> Planned:
    """The calls for rows whose pages are copied ``room`` at a time.

    Args:
        apart: keys that rows share are attended to in calls of their own.
    """
    key = ("varlen", page_tokens, room, window, apart)
    if key not in rows.plans:
        described = _described(rows, page_tokens, room, window, rows.common_pages(page_tokens) if apart else None)
        rows.plans[key] = Planned.of([*(_described_shared(rows, page_tokens) if apart else ()), *described])
    return rows.plans[key]


def _described_shared(rows: Ragged, page_tokens: int) -> Iterator[dict[str, Any]]:
    """A call for each beginning that rows have in common, behind those that it follows."""
    starts, tables = rows.q_starts.numpy(), rows.tables.numpy()
    for each in rows.shared:
        queries, keys = int(starts[each.stop] - starts[each.first]), each.end - each.begin
        yield {
            "queries": slice(int(starts[each.first]), int(starts[each.stop])),
            "pages": _as_slice(tables[each.first, each.begin // page_tokens : each.end // page_tokens]),
            "q_starts": np.array([0, queries]),
            "k_starts": np.array([0, keys]),
            "k_lengths": np.array([keys]),
            "most_queries": queries,
            "most_keys": keys,
            "window": -1,
            "is_causal": False,
        }


def _described(
    rows: Ragged, page_tokens: int, room: int, window: int | None, common: np.ndarray | None
) -> list[dict[str, Any]]:
    """The calls for what rows have by themselves, behind the ``common`` pages."""
    lengths, contexts, starts = rows.q_lengths, rows.contexts.numpy().astype(np.int64), rows.q_starts.numpy()
    tables, columns = rows.tables.numpy(), np.arange(rows.tables.shape[1])
    first = np.zeros_like(contexts) if common is None else common
    if window is not None:  # pages that no query of the run sees are left out
        first = np.maximum(0, contexts - lengths + 1 - window) // page_tokens
    stop = -(-contexts // page_tokens)
    described = []
    for members in _cut(lengths, stop - first, room):
        begin, end, q = first[members, None], stop[members, None], lengths[members]
        keys = contexts[members] - first[members] * page_tokens
        described.append(
            {
                "queries": _as_slice(np.repeat(starts[members] - _before(q), q) + np.arange(q.sum())),
                "pages": _as_slice(tables[members][(columns >= begin) & (columns < end)]),
                "q_starts": np.append(_before(q), q.sum()),
                "k_starts": page_tokens * np.append(_before(end - begin), (end - begin).sum()),
                "k_lengths": keys,
                "most_queries": int(q.max()),
                "most_keys": int(keys.max()),
                # A window as wide as the keys hides nothing, and would cost the kernel its quicker path.
                "window": window - 1 if window is not None and window < keys.max() else -1,
            }
        )
    return described


def _before(counts: np.ndarray) -> np.ndarray:
    """The sum of the counts before each."""
    before: np.ndarray = counts.reshape(-1).cumsum() - counts.reshape(-1)
    return before


def _cut(lengths: np.ndarray, pages: np.ndarray, room: int) -> Iterator[np.ndarray]:
    """Rows that go together: those that decode, then the others, as many at a time as have pages for the room."""
    for chosen in (lengths == 1, lengths > 1):
        members = np.flatnonzero(chosen)
        while len(members):
            count = max(1, int(np.searchsorted(np.cumsum(pages[members]), room, side="right")))
            yield members[:count]
            members = members[count:]


def _as_slice(values: np.ndarray) -> slice | np.ndarray:
    """The slice that these integers are, if they follow each other; else themselves."""
    first = int(values[0])
    return slice(first, first + len(values)) if (np.diff(values) == 1).all() else values
