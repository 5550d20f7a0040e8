"""Grouped products on CPU cores: of few tokens per expert at the speed at which the weights are read (`products.h`), and of
more of them at the speed of fp32 arithmetic (`blocked.h`).

Legend: n tokens, C columns and R rows of a weight, e experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch

from flexmoe.kernels.native import library as native


def grouped_products(
    x_nC: torch.Tensor,
    weights: torch.Tensor | Sequence[torch.Tensor],
    ends_e: torch.Tensor,
    biases: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """``x · weight[e]^T + bias[e]`` for the tokens of each expert e; accumulation is fp32, and the result is rounded once.

    Args:
        x_nC: fp32, bf16 or fp16; the token stride is free, tokens are contiguous.
        weights: of each expert ``[R, C]``, same dtype, contiguous; stacked or wherever they lie.
        ends_e: int32, rising; the tokens of expert e are ``x_nC[ends_e[e - 1] : ends_e[e]]``, and the last end is n.
        biases: of each expert ``[R]``, same dtype, contiguous; None: there are none.

    Returns:
        torch.Tensor: ``[n, R]``.

    Raises:
        ValueError: the tensors do not fit together.
        RuntimeError: the library is not available (ask `library.available()` first).
        MemoryError: there was no memory for the call.
    """
    library = native.required()
    _check(x_nC, weights, ends_e)
    _check_biases(biases, weights)
    count, (rows, columns) = len(weights), weights[0].shape
    out_nR = torch.empty(len(x_nC), rows, dtype=x_nC.dtype)
    tokens = native.DTYPE_CODES[x_nC.dtype], x_nC.data_ptr(), x_nC.stride(0)
    addresses = (ctypes.c_void_p * count)(*_addresses(weights))
    more = None if biases is None else (ctypes.c_void_p * count)(*map(torch.Tensor.data_ptr, biases))
    sizes = count, rows, columns, more, torch.get_num_threads()
    if library.flexmoe_products(*tokens, addresses, ends_e.data_ptr(), out_nR.data_ptr(), *sizes):
        raise MemoryError("native products could not allocate their memory")
    return out_nR


def _check(x_nC: torch.Tensor, weights: torch.Tensor | Sequence[torch.Tensor], ends_e: torch.Tensor) -> None:
    """Raise ValueError unless the tensors fit together; no loop in Python over experts that lie stacked."""
    shape = weights[0].shape
    if isinstance(weights, torch.Tensor):
        dtypes, lie_well = {weights.dtype}, weights.is_contiguous()
    else:
        dtypes = {w.dtype for w in weights}
        lie_well = all(w.is_contiguous() and w.shape == shape for w in weights)
    if not (dtypes == {x_nC.dtype} and x_nC.dtype in native.DTYPE_CODES and ends_e.dtype == torch.int32):
        raise ValueError(
            f"dtypes {x_nC.dtype}, {sorted(map(str, dtypes))}, {ends_e.dtype} are not one of fp32, bf16, fp16, and int32"
        )
    if x_nC.shape[1] != shape[1] or x_nC.stride(1) != 1 or not lie_well or not ends_e.is_contiguous():
        raise ValueError(f"x {[*x_nC.shape]} and weights {[*shape]} do not fit, or are not contiguous")
    check_ends(ends_e, len(weights), len(x_nC))


def _check_biases(biases: Sequence[torch.Tensor] | None, weights: torch.Tensor | Sequence[torch.Tensor]) -> None:
    wanted = (weights[0].dtype, weights[0].shape[:1])
    if biases is not None and not (
        len(biases) == len(weights) and all((b.dtype, b.shape) == wanted and b.is_contiguous() for b in biases)
    ):
        raise ValueError(f"biases must be one contiguous {wanted[0]} {[*wanted[1]]} for each of {len(weights)} experts")


def check_ends(ends_e: torch.Tensor, experts: int, tokens: int) -> None:
    """Raise ValueError unless the tokens of experts end there."""
    if ends_e.dtype != torch.int32 or ends_e.device.type != "cpu" or not ends_e.is_contiguous():
        raise ValueError(f"ends must be contiguous int32 on the CPU, not {ends_e.dtype} on {ends_e.device}")
    ends = ends_e.tolist()
    if len(ends) != experts or ends != sorted(ends) or ends[0] < 0 or ends[-1] != tokens:
        raise ValueError(
            f"ends {ends} do not rise from 0 or more to the {tokens} tokens, one for each of {experts} experts"
        )


def _addresses(weights: torch.Tensor | Sequence[torch.Tensor]) -> Iterable[int]:
    if not isinstance(weights, torch.Tensor):
        return map(torch.Tensor.data_ptr, weights)
    first, each = weights.data_ptr(), weights[0].nbytes
    return range(first, first + len(weights) * each, each)
