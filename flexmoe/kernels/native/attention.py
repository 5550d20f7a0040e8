"""Paged attention on CPU cores (`attention.cpp`).

Legend: T query tokens, H query heads, G KV heads, D head size, B rows.
"""

from __future__ import annotations

import torch

from flexmoe.formats.packed_kv import head_words, is_packed
from flexmoe.kernels.native import library as native

_INT_LIMIT = 2**31
_STATUS_SENTENCES = {
    1: "q_starts must rise from 0 or more to at most the number of query tokens",
    2: "context_lens must count at least a row's queries and at most what its page table can hold",
    5: "shared must list beginnings that rows have in common in the same whole pages, each followed by those within it",
    3: "page_tables names a page that k_pool does not have, at a position that a query attends to",
}


def paged_attention(
    q_THD: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_tables: torch.Tensor,
    q_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    shared: torch.Tensor | None = None,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of ragged rows over a paged KV cache, on CPU cores.

    Row b's queries `q_THD[q_starts[b]:q_starts[b + 1]]` stand at its last positions, `context_lens[b] - 1` the last;
    their own keys and values are in the pools already. The key at position t lies in page
    `page_tables[b, t // page_tokens]` at `t % page_tokens`. Accumulation is fp32; the result of a row depends
    neither on the other rows nor on the number of threads. Of keys that rows share, a row's result depends on which they are.

    Args:
        q_THD: queries, fp32, bf16 or fp16; the token stride is free, the rest contiguous.
        k_pool, v_pool: [pages, page_tokens, G, D], same dtype; or compressed heads
            (`flexmoe.formats.packed_kv`). The page stride is free, the rest contiguous.
        page_tables: int32 [B, W]; entries that no query of the row sees may be anything.
        q_starts: int32 [B + 1]. A row without queries is skipped.
        context_lens: int32 [B], tokens in the cache including this run.
        scale: factor of the scores.
        out: contiguous [T, H, D] to write to; made when absent. Tokens outside q_starts are left alone.
        window: 0, or a query at p sees keys in (p - window, p].
        sinks: fp32 [H], a score of each head that counts in the softmax beside those of the keys.
        shared: int32 [S, 4], beginnings that rows have in common (`flexmoe.kernels.ragged.SharedKeys`), read once for all
            of their rows; none with a window.
        num_threads: torch's number of threads when absent.

    Returns:
        `out`.

    Raises:
        ValueError: the tensors do not fit together, or an index is out of range.
        RuntimeError: the library is not available (ask `available()` first).
        MemoryError: a thread got no scratch memory.
    """
    library = native.required()
    out = torch.empty_like(q_THD, memory_format=torch.contiguous_format) if out is None else out
    _check(q_THD, k_pool, v_pool, out, page_tables, q_starts, context_lens, window)
    tokens, heads, size = q_THD.shape
    pages, page_tokens, kv_heads, _ = k_pool.shape
    rows, width = page_tables.shape
    if rows == 0:
        return out
    compressed, element = is_packed(k_pool), k_pool.element_size() if is_packed(k_pool) else 1
    stored = native.DTYPE_CODES[q_THD.dtype], compressed, k_pool.shape[3] * element
    queries = q_THD.data_ptr(), q_THD.stride(0), tokens
    pools = k_pool.data_ptr(), v_pool.data_ptr(), k_pool.stride(0) * element, pages
    tables = page_tables.data_ptr(), page_tables.stride(0), width, q_starts.data_ptr(), context_lens.data_ptr()
    threads = torch.get_num_threads() if num_threads is None else max(1, num_threads)
    sizes = rows, heads, kv_heads, size, page_tokens, window, scale, threads
    sink_scores = None if sinks is None else _checked_sinks(sinks, heads).data_ptr()
    common = (None, 0) if shared is None else (_checked_shared(shared).data_ptr(), len(shared))
    status = library.flexmoe_attention(*stored, *queries, *pools, *tables, sink_scores, *common, out.data_ptr(), *sizes)
    if status in _STATUS_SENTENCES:
        raise ValueError(_STATUS_SENTENCES[status])
    if status:
        raise MemoryError("native attention could not allocate its scratch memory")
    return out


def _checked_sinks(sinks_H: torch.Tensor, heads: int) -> torch.Tensor:
    if sinks_H.shape != (heads,) or sinks_H.dtype != torch.float32 or not sinks_H.is_contiguous():
        raise ValueError(f"sinks must be fp32 [{heads}], not {sinks_H.dtype} {[*sinks_H.shape]}")
    if sinks_H.device.type != "cpu":
        raise ValueError("native attention takes CPU tensors only")
    return sinks_H


def _checked_shared(shared: torch.Tensor) -> torch.Tensor:
    if shared.dtype != torch.int32 or shared.dim() != 2 or shared.shape[1] != 4 or not shared.is_contiguous():
        raise ValueError(f"shared must be contiguous int32 [S, 4], not {shared.dtype} {[*shared.shape]}")
    return shared


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    window: int,
) -> None:
    """Raise ValueError unless the tensors fit together. Plain comparisons: this runs once per layer and sweep."""
    wanted = k.dtype if is_packed(k) else q.dtype
    if q.dtype not in native.DTYPE_CODES or q.dtype != out.dtype or not wanted == k.dtype == v.dtype:
        raise ValueError(
            f"q and out must share fp32, bf16 or fp16, and the pools it too or be compressed, not {q.dtype}, {k.dtype}, "
            f"{v.dtype}, {out.dtype}"
        )
    if not all(x.device.type == "cpu" for x in (q, k, v, out, tables, starts, lens)):
        raise ValueError("native attention takes CPU tensors only")
    width = head_words(q.shape[-1]) if is_packed(k) else q.shape[-1]
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or k.shape[3] != width or 0 in k.shape[1:]:
        raise ValueError(f"q {[*q.shape]} and pools {[*k.shape]}, {[*v.shape]} are not [T, H, D] and [N, tokens, G, D]")
    if q.shape[1] == 0 or q.shape[1] % k.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[2]} KV heads evenly")
    inner = (k.shape[2] * k.shape[3], k.shape[3], 1)
    if k.stride()[1:] != inner or v.stride()[1:] != inner or k.stride(0) != v.stride(0) or k.stride(0) < 0:
        raise ValueError("each page of the pools must be contiguous, and both pools have one page stride")
    if q.stride()[1:] != (q.shape[2], 1) or out.shape != q.shape or not out.is_contiguous():
        raise ValueError("each token of q must be contiguous, and out must be contiguous with q's shape")
    if not tables.dtype == starts.dtype == lens.dtype == torch.int32:
        raise ValueError(f"index tensors must be int32, not {tables.dtype}, {starts.dtype}, {lens.dtype}")
    if tables.dim() != 2 or starts.shape != (len(tables) + 1,) or lens.shape != (len(tables),):
        raise ValueError(
            f"page_tables {[*tables.shape]}, q_starts {[*starts.shape]} and context_lens {[*lens.shape]} are not "
            "[B, W], [B + 1] and [B]"
        )
    if starts.stride(0) != 1 or lens.stride(0) != 1 or (tables.shape[1] > 1 and tables.stride(1) != 1):
        raise ValueError("index tensors must be contiguous in their last dimension")
    if not 0 <= window < _INT_LIMIT or q.shape[0] * q.shape[1] >= _INT_LIMIT:
        raise ValueError(f"window must be 0 or more, not {window}, and fit 32 bits like the number of query vectors")
