"""Norm, rotary embedding with new keys and values to their pages, gate and rows put or added to others on CPU cores
(`elementwise.h`, `rotary.h`), one pass over memory each.

`flexmoe.kernels.elementwise` has the same in torch, and says which is taken. Tensors are fp32, bf16 or fp16 on the CPU, and
dimensions behind the first are contiguous; the caller sees to that (`fits`).

Legend: n rows or tokens, D numbers of a row, H heads, G KV heads, d head size, w elements of a head in a pool, F expert width.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from flexmoe.formats.packed_kv import WORD
from flexmoe.kernels.native import library as native

#: Dimensions that a head has at most in `rotate`.
MOST_HEAD = 1024


def fits(*tensors: torch.Tensor) -> bool:
    """Whether the functions here take these tensors: one dtype that they know, on the CPU, rows contiguous."""
    dtype = tensors[0].dtype
    return (
        dtype in native.DTYPE_CODES
        and all(x.dtype == dtype and x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
        and native.available()
    )


def can_rotate(
    q_nHd: torch.Tensor,
    k_nGd: torch.Tensor,
    v_nGd: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    pools: tuple[torch.Tensor, torch.Tensor] | None,
) -> bool:
    """Whether `rotate` takes these."""
    size = q_nHd.shape[2]
    return (
        fits(q_nHd, k_nGd, v_nGd, *angles)
        and all(x.stride(1) == size for x in (q_nHd, k_nGd, v_nGd))
        and angles[0].stride() == angles[1].stride()
        and size <= MOST_HEAD
        and (pools is None or _is_pool(*pools, k_nGd.dtype))
    )


def _is_pool(k_pool: torch.Tensor, v_pool: torch.Tensor, dtype: torch.dtype) -> bool:
    return (
        k_pool.dtype == v_pool.dtype
        and k_pool.dtype in (dtype, WORD)
        and k_pool.device.type == v_pool.device.type == "cpu"
        and k_pool.is_contiguous()
        and v_pool.is_contiguous()
    )


def can_put(to: tuple[torch.Tensor, torch.Tensor], rows: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether `put_rows` takes these: both alike, on the CPU, contiguous from the second dimension on."""
    return (
        all(x.dtype == rows[0].dtype and x.device.type == "cpu" and x[:1].is_contiguous() for x in (*to, *rows))
        and to[0].stride() == to[1].stride()
        and rows[0].stride() == rows[1].stride()
        and rows[0].shape == rows[1].shape
        and to[0].shape == to[1].shape
        and to[0].shape[1:] == rows[0].shape[1:]
        and native.available()
    )


def norm(
    x_nD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    weight_first: bool,
    added_nD: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """RMSNorm of rows; with ``added_nD`` of ``x + factor · added``, which is stored there.

    Args:
        weight_first: the weight is applied before rounding, not after it.
    """
    (n, columns), out_nD = x_nD.shape, torch.empty(x_nD.shape, dtype=x_nD.dtype)
    added = (None, 0) if added_nD is None else (added_nD.data_ptr(), added_nD.stride(0))
    _functions().flexmoe_norm(
        *_rows(x_nD),
        *added,
        factor,
        weight_D.data_ptr(),
        eps,
        weight_first,
        out_nD.data_ptr(),
        columns,
        n,
        columns,
        _threads(),
    )
    return out_nD


def rotate(
    q_nHd: torch.Tensor,
    k_nGd: torch.Tensor,
    v_nGd: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    *,
    interleaved: bool,
    pools: tuple[torch.Tensor, torch.Tensor] | None = None,
    slots_m: torch.Tensor | None = None,
    first: int = 0,
) -> None:
    """Turn queries and keys in place, but keys of the m tokens from ``first`` on into the slots of a pool, where values go, too.

    Args:
        q_nHd, k_nGd, v_nGd: heads contiguous, one after the other.
        angles: cosine and sine ``[n, 1, rotated]``, of which the two halves are equal.
        pools: keys and values ``[pages, page_tokens, G, w]``, in the dtype of the keys or of compressed heads.
        slots_m: int64, flat token slots of the pools.

    Raises:
        IndexError: there is no such slot.
        ValueError: a head has more than `MOST_HEAD` dimensions.
    """
    (n, heads, size), kv_heads, (cos, sin) = q_nHd.shape, k_nGd.shape[1], angles
    made = *_rows(q_nHd), k_nGd.data_ptr(), k_nGd.stride(0), v_nGd.data_ptr(), v_nGd.stride(0)
    shape = n, heads, kv_heads, size, cos.shape[-1], interleaved
    to: tuple[int | None, ...] = (None, None, 0, 0, None, 0, 0, 0, 0)
    if pools is not None and slots_m is not None:
        k_pool, item = pools[0], pools[0].element_size()
        slots = (
            k_pool.stride(1) * item,
            k_pool.shape[0] * k_pool.shape[1],
            slots_m.data_ptr(),
            first,
            first + len(slots_m),
        )
        stored = k_pool.dtype != k_nGd.dtype, k_pool.stride(2) * item
        to = k_pool.data_ptr(), pools[1].data_ptr(), *slots, *stored
    turned = cos.data_ptr(), sin.data_ptr(), cos.stride(0)
    status = _functions().flexmoe_rotate(*made, *turned, *shape, *to, _threads())
    if status == _NO_SUCH_SLOT:
        raise IndexError("keys and values are put to slots that their pool does not have")
    if status:
        raise ValueError(f"a head of {size} dimensions is turned; {MOST_HEAD} is the most")


def gate(
    gate_nF: torch.Tensor, up_nF: torch.Tensor, out_nF: torch.Tensor, clamp: tuple[float, float] | None = None
) -> torch.Tensor:
    """``silu(gate) · up``, or with ``clamp``, limit and slope, ``gate · sigmoid(slope · gate) · (up + 1)`` of what is clamped.

    Args:
        gate_nF, up_nF: apart, or every second number of one row each.
        out_nF: where it goes; may be ``gate_nF`` where the two lie apart.
    """
    limit, slope = clamp or (0.0, 0.0)
    alternate = gate_nF.stride(1) == 2
    combined = up_nF.data_ptr(), up_nF.stride(0), alternate, clamp is not None, limit, slope
    _functions().flexmoe_gate(
        *_rows(gate_nF), *combined, out_nF.data_ptr(), out_nF.stride(0), *gate_nF.shape, _threads()
    )
    return out_nF


def add_rows(to_TD: torch.Tensor, places_n: torch.Tensor, from_nD: torch.Tensor, factors_n1: torch.Tensor) -> None:
    """``to[places[i]] += factors[i] · from[i]`` in order.

    Raises:
        IndexError: there is no such row.
    """
    to, rows = _rows(to_TD), len(to_TD)
    given = places_n.data_ptr(), factors_n1.data_ptr(), from_nD.data_ptr(), from_nD.stride(0)
    if _functions().flexmoe_add_rows(*to, rows, *given, *from_nD.shape, _threads()):
        raise IndexError(f"rows are added to places that {rows} rows do not have")


def put_rows(
    to: tuple[torch.Tensor, torch.Tensor], places_n: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """``to[which][places[i]] = rows[which][i]`` for both; each of two has one stride, and rows are contiguous.

    Raises:
        IndexError: there is no such row.
    """
    size = rows[0].element_size()
    strides = to[0].stride(0) * size, rows[0].stride(0) * size
    n, width = len(rows[0]), rows[0][:1].nbytes
    pointers = _pair(*(x.data_ptr() for x in to)), _pair(*(x.data_ptr() for x in rows))
    given = len(to[0]), places_n.data_ptr(), n, width, _threads()
    if n and _functions().flexmoe_put_rows(*pointers, *strides, *given):
        raise IndexError(f"rows are put to places that {len(to[0])} rows do not have")


_NO_SUCH_SLOT = 1
_pair = ctypes.c_void_p * 2
_threads = torch.get_num_threads


def _rows(x: torch.Tensor) -> tuple[int, int, int]:
    return native.DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0)


@cache
def _functions() -> ctypes.CDLL:
    """The library, with the arguments of the functions of `elementwise.h`."""
    library = native.required()
    pointer, int64, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    rows = (integer, pointer, int64)
    norm_end = (real, pointer, real, integer, pointer, int64, int64, integer, integer)
    library.flexmoe_norm.argtypes = [*rows, pointer, int64, *norm_end]
    library.flexmoe_rotate.argtypes = [
        *rows,
        pointer,
        int64,
        pointer,
        int64,
        pointer,
        pointer,
        *[int64] * 2,
        *[integer] * 5,
        *[pointer] * 2,
        *[int64] * 2,
        pointer,
        *[int64] * 2,
        *[integer] * 3,
    ]
    library.flexmoe_gate.argtypes = [
        *rows,
        pointer,
        int64,
        integer,
        integer,
        real,
        real,
        pointer,
        *[int64] * 2,
        *[integer] * 2,
    ]
    library.flexmoe_add_rows.argtypes = [*rows, int64, *[pointer] * 3, *[int64] * 2, *[integer] * 2]
    library.flexmoe_put_rows.argtypes = [pointer, pointer, *[int64] * 3, pointer, int64, int64, integer]
    library.flexmoe_norm.restype = library.flexmoe_gate.restype = None
    for function in (library.flexmoe_rotate, library.flexmoe_add_rows, library.flexmoe_put_rows):
        function.restype = integer
    return library
