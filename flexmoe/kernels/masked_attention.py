"""Attention over a paged KV cache by torch's `scaled_dot_product_attention` with a mask, on any device and in any dtype.

Rows of like length are padded to their longest. They are attended in pieces, so that copies of K and V and the masks stay
within the memory that is planned for them.

Legend: T tokens, H query heads, G KV heads, Dh head size, S keys, B rows of a piece, q queries of a row, n queries of a KV
head: q times the heads that share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cost_model.memory.memory_plan import MASK_BYTES, mask_bytes
from flexmoe.formats.packed_kv import copied_pages
from flexmoe.kernels.log_sums import Merged, attend_all
from flexmoe.kernels.ragged import Planned, Ragged
from flexmoe.kernels.varlen_attention import DEFAULT_PAGES

_BUCKET_WASTE = 1.25


def masked_paged_attention(
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
    """`flexmoe.kernels.paged_attention.paged_attention` by masks.

    Args:
        workspace: ``[2, P, page_tokens, G, Dh]`` for the copies of K and V; no row has more pages. Made when absent.
    """
    room = DEFAULT_PAGES if workspace is None else workspace.shape[1]
    heads, apart = q_THD.shape[1], bool(rows.shared) and window is None
    pair_bytes = mask_bytes(heads // k_pool.shape[2], q_THD.element_size(), 0 if sinks is None and not apart else heads)
    planned = plan_masked(rows, k_pool.shape[1], room, pair_bytes, window)
    pieces = planned.on_device(q_THD.device, _piece)
    if apart:
        merged = Merged(q_THD)
        for part in pieces:
            merged.add(*part.part(q_THD, k_pool, v_pool, workspace))
        return merged.result(q_THD, sinks, out)
    out_THD = torch.empty_like(q_THD) if out is None else out
    for piece in pieces:
        piece.attend(q_THD, k_pool, v_pool, out_THD, window, sinks, workspace)
    return out_THD


def plan_masked(rows: Ragged, page_tokens: int, room: int, pair_bytes: int, window: int | None) -> Planned:
    """The pieces of rows whose pages are copied ``room`` at a time; for ``pair_bytes`` see `mask_bytes`."""
    key = ("masked", page_tokens, room, pair_bytes, window)
    if key not in rows.plans:
        shared = _described_shared(rows, page_tokens) if window is None else ()
        rows.plans[key] = Planned.of([*shared, *_described(rows, page_tokens, room, pair_bytes, window)])
    return rows.plans[key]


def _described_shared(rows: Ragged, page_tokens: int) -> Iterator[dict[str, Any]]:
    """What rows have in common, each beginning behind those that it follows."""
    starts, tables = rows.q_starts.numpy(), rows.tables.numpy()
    for each in rows.shared:
        yield {
            "tokens": slice(int(starts[each.first]), int(starts[each.stop])),
            "pages": tables[each.first, each.begin // page_tokens : each.end // page_tokens],
        }


def buckets_of(rows: Ragged) -> list[list[int]]:
    """Rows with equal run lengths and contexts within `_BUCKET_WASTE` of each other."""
    lengths, contexts = rows.q_lengths.tolist(), rows.contexts.tolist()
    order = sorted((b for b in range(len(lengths)) if lengths[b]), key=lambda b: (lengths[b], contexts[b]))
    buckets: list[list[int]] = []
    for b in order:
        first = buckets[-1][0] if buckets else None
        if first is None or lengths[b] != lengths[first] or contexts[b] > _BUCKET_WASTE * contexts[first] + 32:
            buckets.append([])
        buckets[-1].append(b)
    return buckets


def _described(
    rows: Ragged, page_tokens: int, room: int, pair_bytes: int, window: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """The pieces of every bucket.

    Args:
        room: pages that a piece may copy.
        pair_bytes: of the masks, for a query of a row and a key.
    """
    lengths, contexts, starts = rows.q_lengths, rows.contexts.numpy().astype(np.int64), rows.q_starts.numpy()
    common = rows.common_pages(page_tokens) if window is None else np.zeros_like(contexts)
    for bucket in buckets_of(rows):
        run, pages = int(lengths[bucket[0]]), int((-(-contexts[bucket] // page_tokens) - common[bucket]).max())
        if window is not None:  # pages that no query of a run sees are left out
            pages = min(pages, -(-(window + run - 2) // page_tokens) + 1)
        pairs = max(1, MASK_BYTES // (pair_bytes * page_tokens * pages))
        step, together = min(run, pairs), max(1, min(room // pages, pairs // run))
        for at in range(0, len(bucket), together):
            members = np.asarray(bucket[at : at + together])
            for first in range(0, run, step):
                queries = np.arange(first, min(run, first + step))
                positions_Bq = (contexts[members] - run)[:, None] + queries
                begin_B = common[members]
                if window is not None:
                    begin_B = np.maximum(0, positions_Bq[:, 0] + 1 - window) // page_tokens
                # Later keys are seen by later queries.
                seen = int((positions_Bq[:, -1] // page_tokens + 1 - begin_B).max())
                columns = np.minimum(begin_B[:, None] + np.arange(seen), rows.tables.shape[1] - 1)
                yield {
                    "queries_Bq": starts[members][:, None] + queries,
                    "positions_Bq": positions_Bq - begin_B[:, None] * page_tokens,
                    "pages": np.maximum(0, rows.tables.numpy()[members[:, None], columns]),
                }


def _piece(**described: Any) -> _Piece | _SharedPiece:
    return _SharedPiece(**described) if "tokens" in described else _Piece(**described)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharedPiece:
    """Keys that rows have in common.

    Attributes:
        tokens: the queries of these rows.
        pages: the pages, int32.
    """

    tokens: slice
    pages: torch.Tensor

    def part(
        self, q_THD: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, workspace: torch.Tensor | None
    ) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """The tokens, what attention to these keys gives them, and the logarithms of its sums."""
        k_SGd, v_SGd = (
            copied_pages(pool, self.pages, q_THD, None if workspace is None else workspace[which]).flatten(0, 1)
            for which, pool in enumerate((k_pool, v_pool))
        )
        return self.tokens, *attend_all(q_THD[self.tokens], k_SGd, v_SGd)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Index tensors, int32, of one padded attention call.

    Attributes:
        queries_Bq: places of the queries.
        positions_Bq: their positions among the keys of their rows' pages.
        pages: page tables of the rows, from the first page that the piece sees.
    """

    queries_Bq: torch.Tensor
    positions_Bq: torch.Tensor
    pages: torch.Tensor

    def attend(
        self,
        q_THD: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        out_THD: torch.Tensor,
        window: int | None,
        sinks_H: torch.Tensor | None,
        workspace: torch.Tensor | None,
    ) -> None:
        """Attend, and write the queries' places of ``out_THD``."""
        heads = k_pool.shape[2]
        shared = q_THD.shape[1] // heads
        q_BGnd, k_BGSd, v_BGSd, mask_B1nS = self._padded(q_THD, k_pool, v_pool, window, workspace)
        if sinks_H is None:
            attended = F.scaled_dot_product_attention(q_BGnd, k_BGSd, v_BGSd, attn_mask=mask_B1nS)
        else:
            sinks_GN = sinks_H.view(heads, shared)
            attended = _attention_with_sinks(q_BGnd, k_BGSd, v_BGSd, mask_B1nS, sinks_GN)
        out_THD.index_copy_(0, self.queries_Bq.flatten().long(), _by_token(attended, shared))

    def part(
        self, q_THD: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, workspace: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens, what attention to the piece's keys gives them, and the logarithms of its sums."""
        q_BGnd, k_BGSd, v_BGSd, mask_B1nS = self._padded(q_THD, k_pool, v_pool, None, workspace)
        shared = q_THD.shape[1] // k_pool.shape[2]
        scores_BGnS = (q_BGnd @ k_BGSd.transpose(2, 3)).float().mul_(q_BGnd.shape[-1] ** -0.5)
        scores_BGnS.masked_fill_(~mask_B1nS, -torch.inf)
        lse_BGn1 = scores_BGnS.logsumexp(-1, keepdim=True)
        attended = scores_BGnS.sub_(lse_BGn1).exp_().to(v_BGSd.dtype) @ v_BGSd
        lse_TH = _by_token(lse_BGn1, shared).squeeze(-1)
        return self.queries_Bq.flatten().long(), _by_token(attended, shared), lse_TH

    def _padded(
        self,
        q_THD: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        window: int | None,
        workspace: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[B, G, n, Dh]``, keys and values ``[B, G, S, Dh]`` and the mask ``[B, 1, n, S]``."""
        count, heads = self.queries_Bq.shape[0], k_pool.shape[2]
        shared = q_THD.shape[1] // heads
        mask_BqS = self._mask(self.pages.shape[1] * k_pool.shape[1], window)
        unused_BS11 = ~mask_BqS.any(1)[:, :, None, None]  # slots that no query sees may hold anything, NaN included
        k_BGSd, v_BGSd = (
            self._gathered(pool, q_THD, workspace, which).masked_fill_(unused_BS11, 0).transpose(1, 2)
            for which, pool in enumerate((k_pool, v_pool))
        )
        # The heads that share a KV head are queries of it: SDPA's own grouping takes no mask in its fused kernels, and
        # the other one repeats K and V per head in float32.
        q_BqHd = q_THD.index_select(0, self.queries_Bq.flatten()).unflatten(0, (count, -1))
        q_BGnd = q_BqHd.unflatten(2, (heads, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return q_BGnd, k_BGSd, v_BGSd, mask_BqS[:, None, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)

    def _mask(self, keys: int, window: int | None) -> torch.Tensor:
        """bool ``[B, q, S]``: which keys a query sees."""
        keys_S, last_Bq1 = (
            torch.arange(keys, dtype=torch.int32, device=self.pages.device),
            self.positions_Bq[:, :, None],
        )
        mask_BqS = keys_S <= last_Bq1
        if window is not None:
            mask_BqS &= keys_S > last_Bq1 - window
        return mask_BqS

    def _gathered(
        self, pool: torch.Tensor, q_THD: torch.Tensor, workspace: torch.Tensor | None, which: int
    ) -> torch.Tensor:
        """``[B, S, G, Dh]``: the keys, or the values, of the rows."""
        pages = self.pages.flatten()
        keys = copied_pages(pool, pages, q_THD, None if workspace is None else workspace[which])
        side_by_side: torch.Tensor = keys.unflatten(0, self.pages.shape).flatten(1, 2)
        return side_by_side


def _by_token(x_BGnd: torch.Tensor, shared: int) -> torch.Tensor:
    """``[T, H, d]`` of the tokens of a piece, row by row."""
    x_THd: torch.Tensor = x_BGnd.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    return x_THd


def _attention_with_sinks(
    q_BGnd: torch.Tensor, k_BGSd: torch.Tensor, v_BGSd: torch.Tensor, mask_B1nS: torch.Tensor, sinks_GN: torch.Tensor
) -> torch.Tensor:
    """`scaled_dot_product_attention` with one more score in the softmax of each head, that of no key."""
    scores_BGnS = (q_BGnd @ k_BGSd.transpose(2, 3)).float().mul_(q_BGnd.shape[-1] ** -0.5)
    scores_BGnS.masked_fill_(~mask_B1nS, -torch.inf)
    sinks_Gn1 = sinks_GN.float().repeat_interleave(q_BGnd.shape[2] // sinks_GN.shape[1], dim=1).unsqueeze(-1)
    largest_BGn1 = torch.maximum(scores_BGnS.amax(-1, keepdim=True), sinks_Gn1)
    scores_BGnS.sub_(largest_BGn1).exp_()
    sums_BGn1 = scores_BGnS.sum(-1, keepdim=True).add_((sinks_Gn1 - largest_BGn1).exp())
    return scores_BGnS.div_(sums_BGn1).to(v_BGSd.dtype) @ v_BGSd
