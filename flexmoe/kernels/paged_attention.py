"""Grouped-query causal attention over a paged KV cache, for runs of any length.

One function serves prefill, chunked prefill, decode and verification: row b's queries are the last q tokens of its
context. `choose_kernel` is the only place that says which kernel computes it.

Legend: T tokens, H query heads, G KV heads, Dh head size, P pages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from cost_model.memory.memory_plan import mask_bytes
from flexmoe.kernels.masked_attention import masked_paged_attention, plan_masked
from flexmoe.kernels.native import attention as native_attention
from flexmoe.kernels.native import library as native
from flexmoe.kernels.ragged import Planned, Ragged
from flexmoe.kernels.varlen_attention import gives_log_sums, plan_varlen, varlen_paged_attention
from flexmoe.system.cuda_features import has_flash_attention

log = logging.getLogger(__name__)
#: Flash attention takes heads of so many numbers at most, and of multiples of so many.
_FLASH_HEAD, _FLASH_STEP = 256, 8


@dataclass(frozen=True, slots=True)
class Kernel:
    """What computes attention: ``native``, ``varlen`` or ``masked``, and why."""

    name: str
    reason: str

    def shares(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether keys that rows have in common are read once for all of them. On a device the first call tries it."""
        return self.name != "varlen" or gives_log_sums(device, dtype)


def paged_attention(
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
    """Attention of every row's run over its cached context.

    Args:
        q_THD: queries ``[T, H, Dh]``, rotated.
        k_pool, v_pool: ``[pages, page_tokens, G, Dh]``, or of compressed heads (`flexmoe.formats.packed_kv`); the runs' own keys
            and values are already in them.
        rows: the rows, in the order of the queries.
        window: a query at position p sees keys in ``(p - window, p]``; None sees all.
        sinks: ``[H]``, a score of each head that counts in the softmax beside those of the keys and belongs to none.
        out: contiguous, where the result goes; made when absent.
        workspace: ``[2, P, page_tokens, G, Dh]``, in the dtype of ``q_THD``, where K and V are copied to by kernels that
            need them side by side; no row has more pages. Made when absent.

    Returns:
        torch.Tensor: ``[T, H, Dh]`` in the dtype of ``q_THD``.
    """
    kernel = choose_kernel(q_THD.device, q_THD.dtype, q_THD.shape[-1], sinks is not None)
    attend = _KERNELS[kernel.name]
    return attend(q_THD, k_pool, v_pool, rows, window=window, sinks=sinks, out=out, workspace=workspace)


def plan_attention(
    rows: Ragged,
    kernel: Kernel,
    dtype: torch.dtype,
    *,
    heads: int,
    shared: int,
    page_tokens: int,
    room: int,
    window: int | None,
    sinks: bool = False,
    shares: bool = True,
) -> Planned | None:
    """The calls of a sweep's `paged_attention`, before its first layer, so that their index arrays can be brought to the
    device together with others; None where the kernel has none.

    Args:
        dtype: of the queries.
        heads: query heads.
        shared: of those, how many share a KV head.
        page_tokens: tokens of a page.
        room: pages of the workspace.
        window: as for `paged_attention`.
        sinks: heads have sinks.
        shares: `Kernel.shares`.
    """
    apart = bool(rows.shared) and window is None
    if kernel.name == "varlen":
        return plan_varlen(rows, page_tokens, room, window, apart and shares)
    if kernel.name == "masked":
        scored = heads if sinks or apart else 0
        return plan_masked(rows, page_tokens, room, mask_bytes(shared, dtype.itemsize, scored), window)
    return None


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, sinks: bool = False) -> Kernel:
    """The kernel for a device; logged when it is first chosen.

    Args:
        sinks: heads have scores that belong to no key.
    """
    return _logged(device, dtype, head_dim, sinks, device.type == "cpu" and native.available())


@cache
def _logged(device: torch.device, dtype: torch.dtype, head_dim: int, sinks: bool, has_native: bool) -> Kernel:
    kernel = _chosen(device, dtype, head_dim, sinks, has_native)
    log.info("attention on %s in %s: %s, because %s", device, dtype, kernel.name, kernel.reason)
    return kernel


def _chosen(device: torch.device, dtype: torch.dtype, head_dim: int, sinks: bool, has_native: bool) -> Kernel:
    if device.type == "cpu":
        if has_native:
            return Kernel("native", "it streams the pages in place")
        return Kernel("masked", "the native library is not there")
    if dtype not in (torch.bfloat16, torch.float16):
        return Kernel("masked", "flash attention takes numbers of 16 bits only")
    if head_dim > _FLASH_HEAD or head_dim % _FLASH_STEP:
        return Kernel("masked", f"flash attention takes no heads of {head_dim}")
    if not has_flash_attention(device):
        return Kernel("masked", "flash attention needs compute capability 8.0 and a torch that was built with it")
    if sinks and not gives_log_sums(device, dtype):
        return Kernel("masked", "flash attention here does not give the sums that sinks are added to")
    return Kernel("varlen", "one call serves rows of any lengths, without a mask")


def _native(
    q_THD: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    rows: Ragged,
    *,
    window: int | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> torch.Tensor:
    return native_attention.paged_attention(
        q_THD,
        k_pool,
        v_pool,
        rows.tables,
        rows.q_starts,
        rows.contexts,
        window=window or 0,
        sinks=None if sinks is None else sinks.float(),
        shared=None if window else rows.shared_index(),
        scale=q_THD.shape[-1] ** -0.5,
        out=out,
    )


_KERNELS: Mapping[str, Callable[..., torch.Tensor]] = {
    "native": _native,
    "varlen": varlen_paged_attention,
    "masked": masked_paged_attention,
}
