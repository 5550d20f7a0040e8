"""A gated feed-forward network in one native call, from the hidden states of some tokens to what is added to their outputs
(`feed_forward.h`). CPUs with AMX have it, for bf16.

Legend: T tokens, D hidden, F width, n tokens of the network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from flexmoe.kernels.native import library as native

#: Multiples of what D and F are.
STEP = 32
_NO_SUCH_ROW = 1


def can_feed_forward(
    x_TD: torch.Tensor, y_TD: torch.Tensor, gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor
) -> bool:
    """Whether `feed_forward` takes these on this machine."""
    (ffn, hidden), weights = gate_FD.shape, (gate_FD, up_FD, down_DF)
    return (
        all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in (x_TD, y_TD, *weights))
        and all(weight.is_contiguous() for weight in weights)
        and x_TD.stride(1) == y_TD.stride(1) == 1
        and hidden % STEP == ffn % STEP == 0
        and native.has_tiles()
    )


def feed_forward(
    x_TD: torch.Tensor,
    y_TD: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tokens_n: torch.Tensor | None = None,
    factors_n: torch.Tensor | None = None,
) -> None:
    """``y[tokens[i]] += factors[i] · down · (silu(gate · x[tokens[i]]) · (up · x[tokens[i]]))``, rounded where it is added, and once
    between the products.

    Args:
        weights: gate and up ``[F, D]`` and down ``[D, F]``, as `can_feed_forward` has them.
        tokens_n: int64, each once; None: all.
        factors_n: bf16; None: one.

    Raises:
        IndexError: there is no such token.
        ValueError: tokens and factors do not fit together.
        MemoryError: there was no memory for the call.
    """
    gate_FD, up_FD, down_DF = weights
    count = len(x_TD) if tokens_n is None else len(tokens_n)
    for each, dtype in ((tokens_n, torch.int64), (factors_n, torch.bfloat16)):
        if each is not None and not (
            each.dtype == dtype and len(each) == count == each.numel() and each.is_contiguous()
        ):
            raise ValueError(
                f"tokens and factors are {count} contiguous int64 and bf16, not {[*each.shape]} of {each.dtype}"
            )
    of_tokens = [None if each is None else each.data_ptr() for each in (tokens_n, factors_n)]
    sizes = *down_DF.shape, y_TD.data_ptr(), y_TD.stride(0), min(len(x_TD), len(y_TD)), torch.get_num_threads()
    pointers = (weight.data_ptr() for weight in (gate_FD, up_FD, down_DF))
    status = _function()(x_TD.data_ptr(), x_TD.stride(0), *of_tokens, count, *pointers, *sizes)
    if status == _NO_SUCH_ROW:
        raise IndexError(
            f"a feed-forward network is asked for tokens that {min(len(x_TD), len(y_TD))} rows do not have"
        )
    if status:
        raise MemoryError("the native feed-forward network could not allocate its memory")


@cache
def _function() -> Callable[..., int]:
    """The function of the library, with its arguments."""
    function = native.required().flexmoe_feed_forward
    pointer, int64, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    ends = integer, integer, pointer, int64, int64, integer
    function.argtypes = [pointer, int64, pointer, pointer, int64, pointer, pointer, pointer, *ends]
    function.restype = integer
    called: Callable[..., int] = function
    return called
