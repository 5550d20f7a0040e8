"""A product with a weight, on any device at the speed of its hardware.

A CPU without instructions for 16-bit numbers multiplies them in torch several times slower than in float32. There the
weight is widened piece by piece, and the product of the pieces is taken in float32.

Legend: n tokens, C columns and R rows of a weight.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.products import grouped_products
from flexmoe.system.machine import cpu_flags

#: CPU features of which one makes torch's own products of this dtype fast.
_INSTRUCTIONS = {
    torch.bfloat16: frozenset({"avx512bw", "avx512_bf16", "amx_bf16", "bf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}
#: Tokens up to which our own product, which reads the weight once as it is, beats widening it.
_FEW_TOKENS = 12
#: Numbers of a weight that are widened at a time: 4 MiB stay in the cache, and the pieces are large enough for threads.
_PIECE = 1 << 20


def linear(x_nC: torch.Tensor, weight_RC: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
    """``x · weight^T + bias``: ``[n, R]`` in the dtype of ``x``."""
    if x_nC.device.type != "cpu" or multiplies(x_nC.dtype):
        return F.linear(x_nC, weight_RC, bias_R)
    if len(x_nC) <= _FEW_TOKENS and bias_R is None and weight_RC.is_contiguous() and native.available():
        return grouped_products(x_nC.contiguous(), [weight_RC], torch.tensor([len(x_nC)], dtype=torch.int32))
    wide_nC, out_nR = x_nC.float(), x_nC.new_empty(len(x_nC), len(weight_RC))
    rows = max(1, _PIECE // weight_RC.shape[1])
    for at in range(0, len(weight_RC), rows):
        bias = None if bias_R is None else bias_R[at : at + rows].float()
        out_nR[:, at : at + rows] = F.linear(wide_nC, weight_RC[at : at + rows].float(), bias)
    return out_nR


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of numbers of a dtype."""
    return dtype not in _INSTRUCTIONS or not _INSTRUCTIONS[dtype].isdisjoint(cpu_flags())
