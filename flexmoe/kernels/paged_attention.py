"""Grouped-query causal attention over a paged KV cache, for runs of any length.

One function serves prefill, chunked prefill, decode and verification: row b's queries are the last q tokens of its
context. On the CPU a native kernel streams the pages in place; the torch path below is its reference, and what
CUDA runs.

Legend: T tokens, H query heads, G KV heads, Dh head size, S context, B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from flexmoe.kernels.native import attention as native_attention
from flexmoe.kernels.native import library as native

_BUCKET_WASTE = 1.25


@dataclass(slots=True)
class Ragged:
    """Which rows an attention call serves; built once per sweep, used by every layer.

    Attributes:
        q_starts: int32 ``[B + 1]``, first query of each row.
        contexts: int32 ``[B]``, tokens of each row in the cache, the run included.
        tables: int32 ``[B, pages]``, page table of each row.
    """

    q_starts: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor
    _plans: dict[tuple[torch.device, int], list[_Bucket]] = field(default_factory=dict)

    @classmethod
    def of(cls, q_lengths: list[int], contexts: list[int], tables: list[list[int]]) -> Ragged:
        """From plain lists."""
        width = max((len(t) for t in tables), default=0)
        padded = np.zeros((len(tables), max(1, width)), dtype=np.int32)
        for row, table in zip(padded, tables):
            row[: len(table)] = table
        starts = np.concatenate([[0], np.cumsum(q_lengths)]).astype(np.int32)
        return cls(torch.from_numpy(starts), torch.tensor(contexts, dtype=torch.int32), torch.from_numpy(padded))

    @property
    def kv_tokens(self) -> int:
        """Context tokens over all rows."""
        return int(self.contexts.sum())


def paged_attention(
    q_THD: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    rows: Ragged,
    *,
    window: int | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every row's run over its cached context.

    Args:
        q_THD: queries ``[T, H, Dh]``, rotated.
        k_pool, v_pool: ``[pages, page_tokens, G, Dh]``; the runs' own keys and values are already in them.
        rows: the rows, in the order of the queries.
        window: a query at position p sees keys in ``(p - window, p]``; None sees all.
        out: contiguous, where the result goes; made when absent.

    Returns:
        torch.Tensor: ``[T, H, Dh]`` in the dtype of ``q_THD``.
    """
    scale = q_THD.shape[-1] ** -0.5
    if q_THD.device.type == "cpu" and native.available():
        return native_attention.paged_attention(
            q_THD, k_pool, v_pool, rows.tables, rows.q_starts, rows.contexts, window=window or 0, scale=scale, out=out
        )
    return torch_paged_attention(q_THD, k_pool, v_pool, rows, window=window, out=out)


def torch_paged_attention(
    q_THD: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    rows: Ragged,
    *,
    window: int | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in torch: rows of like length are padded to their longest and attended in one call."""
    out_THD = torch.empty_like(q_THD) if out is None else out
    key = (q_THD.device, k_pool.shape[1])
    if key not in rows._plans:
        rows._plans[key] = [_Bucket.of(rows, b, k_pool.shape[1], window, q_THD.device) for b in buckets_of(rows)]
    for bucket in rows._plans[key]:
        bucket.attend(q_THD, k_pool, v_pool, out_THD)
    return out_THD


def buckets_of(rows: Ragged) -> list[list[int]]:
    """Rows with equal run lengths and contexts within `_BUCKET_WASTE` of each other."""
    lengths = (rows.q_starts[1:] - rows.q_starts[:-1]).tolist()
    contexts = rows.contexts.tolist()
    order = sorted((b for b in range(len(lengths)) if lengths[b]), key=lambda b: (lengths[b], contexts[b]))
    buckets: list[list[int]] = []
    for b in order:
        first = buckets[-1][0] if buckets else None
        if first is None or lengths[b] != lengths[first] or contexts[b] > _BUCKET_WASTE * contexts[first] + 32:
            buckets.append([])
        buckets[-1].append(b)
    return buckets


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Index tensors of one padded attention call."""

    queries_Bq: torch.Tensor
    pages: torch.Tensor
    mask_BqS: torch.Tensor

    @classmethod
    def of(
        cls, rows: Ragged, members: list[int], page_tokens: int, window: int | None, device: torch.device
    ) -> _Bucket:
        starts, contexts = rows.q_starts[members].long(), rows.contexts[members].long()
        run = int(rows.q_starts[members[0] + 1] - rows.q_starts[members[0]])
        pages = -(-int(contexts.max()) // page_tokens)
        tables = rows.tables[members, :pages].long().clamp_(min=0)
        positions_Bq = contexts[:, None] - run + torch.arange(run)
        keys_S = torch.arange(pages * page_tokens)
        mask = keys_S <= positions_Bq[:, :, None]
        if window is not None:
            mask &= keys_S > positions_Bq[:, :, None] - window
        return cls((starts[:, None] + torch.arange(run)).to(device), tables.to(device), mask.to(device))

    def attend(self, q_THD: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, out_THD: torch.Tensor) -> None:
        kv_heads = k_pool.shape[2]
        shared = q_THD.shape[1] // kv_heads
        # The heads that share a KV head are queries of it: SDPA's own grouping takes no mask in its fused kernels, and
        # the other one repeats K and V per head in float32.
        q_BGnd = q_THD[self.queries_Bq].unflatten(2, (kv_heads, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask_B1nS = self.mask_BqS[:, None, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)
        unused = ~self.mask_BqS.any(1)  # slots that no query sees may hold anything, NaN included
        k_BGSd, v_BGSd = (
            p[self.pages].flatten(1, 2).masked_fill_(unused[:, :, None, None], 0).transpose(1, 2)
            for p in (k_pool, v_pool)
        )
        attended = F.scaled_dot_product_attention(q_BGnd, k_BGSd, v_BGSd, attn_mask=mask_B1nS)
        out_THD[self.queries_Bq] = attended.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
