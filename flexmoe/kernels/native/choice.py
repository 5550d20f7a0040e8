"""The choice of tokens on CPU cores, in one pass over the logits (`choice.h`).

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import torch

from flexmoe.kernels.native import library as native


def largest(x_RV: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits of each row, or -1 where one of the row's logits is not finite.

    Args:
        x_RV: fp32, bf16 or fp16 on the CPU; a row's lie side by side.

    Returns:
        torch.Tensor: int64 ``[R]``.

    Raises:
        ValueError: the logits are of another kind.
        RuntimeError: the library is not available (ask `library.available()` first).
    """
    if x_RV.dtype not in native.DTYPE_CODES:
        raise ValueError(f"logits must be fp32, bf16 or fp16, not {x_RV.dtype}")
    _check(x_RV)
    tokens_R = torch.empty(len(x_RV), dtype=torch.int64)
    logits = native.DTYPE_CODES[x_RV.dtype], x_RV.data_ptr(), x_RV.stride(0)
    native.required().flexmoe_largest(*logits, tokens_R.data_ptr(), *x_RV.shape, torch.get_num_threads())
    return tokens_R


def winners(x_RV: torch.Tensor, keys_R2: torch.Tensor) -> torch.Tensor:
    """The token of each row whose logit less the logarithm of its exponential random number is largest.

    Args:
        x_RV: fp32 logits on the CPU without NaN, minus infinity for tokens that may not win; a row's lie side by side.
        keys_R2: int32, contiguous, of the rows' draws (`flexmoe.sampling.random_draws`).

    Returns:
        torch.Tensor: int64 ``[R]``.

    Raises:
        ValueError: the tensors do not fit together.
        RuntimeError: the library is not available (ask `library.available()` first).
    """
    if x_RV.dtype != torch.float32:
        raise ValueError(f"logits must be fp32, not {x_RV.dtype}")
    _check(x_RV)
    if keys_R2.dtype != torch.int32 or [*keys_R2.shape] != [len(x_RV), 2] or not keys_R2.is_contiguous():
        raise ValueError(f"keys {keys_R2.dtype} {[*keys_R2.shape]} are not contiguous int32 [{len(x_RV)}, 2]")
    tokens_R = torch.empty(len(x_RV), dtype=torch.int64)
    pointers = x_RV.data_ptr(), x_RV.stride(0), keys_R2.data_ptr(), tokens_R.data_ptr()
    native.required().flexmoe_winners(*pointers, *x_RV.shape, torch.get_num_threads())
    return tokens_R


def _check(x_RV: torch.Tensor) -> None:
    if x_RV.device.type != "cpu" or x_RV.dim() != 2 or x_RV.stride(1) != 1 or not x_RV.shape[1]:
        raise ValueError(
            f"logits {[*x_RV.shape]} on {x_RV.device} must be a matrix on the CPU, each row's side by side, one or more"
        )
