"""Grouped products of few tokens per expert on CPU cores (`products.h`), at the speed at which the weights are read."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from flexmoe.kernels.native import library as native


def grouped_products(
    x_nD: torch.Tensor, weights: torch.Tensor | Sequence[torch.Tensor], ends_e: torch.Tensor
) -> torch.Tensor:
    """``x · weight[e]^T`` for the tokens of each expert e; accumulation is fp32.

    Args:
        x_nD: fp32, bf16 or fp16; the token stride is free, tokens are contiguous.
        weights: of each expert ``[R, D]``, same dtype, contiguous; stacked or wherever they lie.
        ends_e: int32, rising; the tokens of expert e are ``x_nD[ends_e[e - 1] : ends_e[e]]``, and the last end is n.

    Returns:
        torch.Tensor: ``[n, R]``.

    Raises:
        ValueError: the tensors do not fit together.
        RuntimeError: the library is not available (ask `native.available()` first).
        MemoryError: there was no memory for the call.
    """
    library = native.load()
    if library is None:
        raise RuntimeError("native code is disabled or could not be built; call native.available() first")
    stacked = isinstance(weights, torch.Tensor)
    count, (rows, depth) = len(weights), weights[0].shape
    dtypes = {weights.dtype} if stacked else {w.dtype for w in weights}
    if not (dtypes == {x_nD.dtype} and x_nD.dtype in native.DTYPE_CODES and ends_e.dtype == torch.int32):
        raise ValueError(
            f"dtypes {x_nD.dtype}, {sorted(map(str, dtypes))}, {ends_e.dtype} are not one of fp32, bf16, fp16, and int32"
        )
    lie_well = (
        weights.is_contiguous() if stacked else all(w.is_contiguous() and w.shape == (rows, depth) for w in weights)
    )
    if x_nD.shape[1] != depth or x_nD.stride(1) != 1 or not lie_well or not ends_e.is_contiguous():
        raise ValueError(f"x {[*x_nD.shape]} and weights {[rows, depth]} do not fit, or are not contiguous")
    ends = ends_e.tolist()
    if len(ends) != count or ends != sorted(ends) or ends[0] < 0 or ends[-1] != len(x_nD):
        raise ValueError(
            f"ends {ends} do not rise from 0 or more to the {len(x_nD)} tokens, one for each of {count} experts"
        )
    out = torch.empty(len(x_nD), rows, dtype=x_nD.dtype)
    each = rows * depth * x_nD.element_size()
    places = (
        range(weights.data_ptr(), weights.data_ptr() + count * each, each)
        if stacked
        else map(torch.Tensor.data_ptr, weights)
    )
    status = library.flexmoe_products(
        native.DTYPE_CODES[x_nD.dtype], x_nD.data_ptr(), x_nD.stride(0), (ctypes.c_void_p * count)(*places),
        ends_e.data_ptr(), out.data_ptr(), count, rows, depth, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError("native products could not allocate their work list")
    return out
