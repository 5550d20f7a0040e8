"""Packed matrices on CPU cores (`packed.h`): their values, bit for bit those of the codecs, and products with few tokens.

Legend: R outputs, C inputs, n tokens, e experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.codec import Field
from flexmoe.formats.packed_matrix import CODECS, PackedMatrix
from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.products import check_ends

_CODEC_NUMBERS = {"integer": 0, "fp8": 1, "mxfp4": 2, "gptq": 3, "awq": 4}
_INT_LIMIT = 2**31


def unpack(matrix: PackedMatrix, out_RC: torch.Tensor, first: int = 0, num_threads: int | None = None) -> torch.Tensor:
    """The values of the outputs from ``first`` on, as many as ``out_RC`` has rows; returns it.

    Args:
        matrix: on the CPU.
        out_RC: contiguous, fp32, bf16 or fp16.
        first: output of its first row.
        num_threads: torch's number of threads when absent.

    Raises:
        ValueError: the tensors do not fit together.
        RuntimeError: the library is not available (ask `library.available()` first).
    """
    library = native.required()
    rows, columns = matrix.shape
    if out_RC.dtype not in native.DTYPE_CODES or out_RC.device.type != "cpu" or not out_RC.is_contiguous():
        raise ValueError(f"out must be contiguous fp32, bf16 or fp16 on the CPU, not {out_RC.dtype}")
    if out_RC.dim() != 2 or out_RC.shape[1] != columns or not 0 <= first <= rows - len(out_RC):
        raise ValueError(f"out {[*out_RC.shape]} is no stretch of the outputs of {[*matrix.shape]} from {first} on")
    packed, matrices = _packed(matrix), _matrices([matrix])
    threads = torch.get_num_threads() if num_threads is None else max(1, num_threads)
    stretch = first, first + len(out_RC), out_RC.data_ptr()
    library.flexmoe_unpack(ctypes.byref(packed), matrices, native.DTYPE_CODES[out_RC.dtype], *stretch, threads)
    return out_RC


def packed_products(x_nC: torch.Tensor, matrices: Sequence[PackedMatrix], ends_e: torch.Tensor) -> torch.Tensor:
    """``x · matrix[e]^T`` for the tokens of each expert e, with the values that `unpack` gives in the dtype of ``x``.

    Args:
        x_nC: fp32, bf16 or fp16 on the CPU; the token stride is free, tokens are contiguous.
        matrices: of each expert; one format, shape and layout.
        ends_e: as for `products.grouped_products`.

    Returns:
        torch.Tensor: ``[n, R]``, what `products.grouped_products` gives with the unpacked matrices: of few tokens to the bit, of more
            of them it adds in another order.

    Raises:
        ValueError: the tensors do not fit together.
        RuntimeError: the library is not available (ask `library.available()` first).
        MemoryError: there was no memory for the call.
    """
    library = native.required()
    rows, columns = matrices[0].shape
    _check_tokens(x_nC, columns)
    check_ends(ends_e, len(matrices), len(x_nC))
    packed, addresses = _packed(matrices[0]), _matrices(matrices)
    out_nR = torch.empty(len(x_nC), rows, dtype=x_nC.dtype)
    tokens = native.DTYPE_CODES[x_nC.dtype], x_nC.data_ptr(), x_nC.stride(0)
    sizes = ends_e.data_ptr(), out_nR.data_ptr(), len(matrices), torch.get_num_threads()
    if library.flexmoe_packed_products(ctypes.byref(packed), addresses, *tokens, *sizes):
        raise MemoryError("native products could not allocate their memory")
    return out_nR


def _check_tokens(x_nC: torch.Tensor, columns: int) -> None:
    if x_nC.dtype not in native.DTYPE_CODES or x_nC.device.type != "cpu":
        raise ValueError(f"x must be fp32, bf16 or fp16 on the CPU, not {x_nC.dtype} on {x_nC.device}")
    if x_nC.dim() != 2 or x_nC.shape[1] != columns or (columns > 1 and x_nC.stride(1) != 1):
        raise ValueError(f"x {[*x_nC.shape]} does not fit {columns} inputs, or its tokens are not contiguous")


class _Packed(ctypes.Structure):
    """`Packed` of packed.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("codec", "bits", "scale_dtype", "rows", "columns", "zero_shift", "R", "C")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("packed", "scale", "zero")),
    ]


@lru_cache(256)
def _fields(packed: PackedFormat, rows: int, columns: int) -> Sequence[Field]:
    if not 0 < max(rows, 1) * max(columns, 1) < _INT_LIMIT:
        raise ValueError(f"a matrix [{rows}, {columns}] is too large")
    return CODECS[packed.codec].fields(packed, rows, columns)


def _packed(matrix: PackedMatrix) -> _Packed:
    """What C is told of a format and of the layout of one of its matrices."""
    packed, (rows, columns), fields = matrix.packed, matrix.shape, matrix.fields
    strides = [_step(fields[name]) if name in fields else 0 for name in ("packed", "scale", "zero")]
    return _Packed(
        _CODEC_NUMBERS[packed.codec],
        packed.bits,
        native.DTYPE_CODES.get(fields["scale"].dtype, 0),
        min(packed.rows or rows, rows) or 1,
        min(packed.columns or columns, columns) or 1,
        packed.zero_shift,
        rows,
        columns,
        *strides,
    )


def _step(field: torch.Tensor) -> int:
    """Bytes from one index of the first dimension to the next; a scale of a whole matrix has one dimension."""
    return field.stride(0) * field.element_size() if field.dim() > 1 else 0


def _matrices(matrices: Sequence[PackedMatrix]) -> ctypes.Array[ctypes.c_void_p]:
    """`Matrix` of packed.h for each of some matrices, which are checked."""
    first = matrices[0]
    wanted = _fields(first.packed, *first.shape)
    layout = {name: _layout(field) for name, field in first.fields.items()}
    for field in wanted:
        dtype, shape, strides = layout.get(field.name, (None, (), ()))
        if shape != field.shape or dtype not in field.dtypes or (strides and field.shape[-1] > 1 and strides[-1] != 1):
            raise ValueError(
                f"{field.suffix} of a matrix {[*first.shape]} in {first.packed.name} is {dtype} {[*shape]}"
            )
    addresses: list[int | None] = []
    for matrix in matrices:
        fields = matrix.fields
        if matrix is not first and (
            matrix.packed != first.packed
            or matrix.shape != first.shape
            or {name: _layout(field) for name, field in fields.items()} != layout
        ):
            raise ValueError("the matrices of experts must have one format, shape and layout")
        if any(field.device.type != "cpu" for field in fields.values()):
            raise ValueError("native unpacking takes CPU tensors only")
        zero = fields["zero"].data_ptr() if first.packed.zeros else None
        addresses += (fields["packed"].data_ptr(), fields["scale"].data_ptr(), zero)
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _layout(field: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
    return field.dtype, tuple(field.shape), field.stride()
