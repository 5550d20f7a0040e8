"""Packed matrices on CUDA by Triton: the values of the codecs in `flexmoe.formats`, bit for bit, one pass over each.

A kernel for each kind of number: integers with scales and zero points wherever they lie (compressed-tensors, GPTQ, AWQ), e4m3
in blocks, e2m1 with powers of two. A value is a product in float32, rounded to the dtype of the scale, then to that of the output.
Imported only where Triton is installed.

Legend: R outputs, C inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from flexmoe.formats.packed_matrix import PackedMatrix

#: Outputs and inputs of a block.
_ROWS, _COLUMNS = 8, 256


@triton.jit
def _bf16_bits(value):
    """The nearest bfloat16 of two the even one, as int32: Triton's interpreter cuts bits off, and takes subnormal ones for 0."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """float32 to the nearest number of another dtype, in float32."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return (_bf16_bits(value) << 16).to(tl.float32, bitcast=True)
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def _store(out, value, at, inside):
    if out.dtype.element_ty == tl.bfloat16:
        value = _bf16_bits(value).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _place(r, PER_WORD: tl.constexpr, IS_AWQ: tl.constexpr):
    """The place in a word of output r: in order, or as AWQ has it, 0 4 1 5 2 6 3 7."""
    at = r % PER_WORD
    if IS_AWQ:
        at = at % 2 * 4 + at // 2
    return at


@triton.jit
def _integers(
    packed, scale, zero, out, first, rows, C, columns, shift,
    packed_r, packed_c, scale_r, scale_g, zero_r, zero_g,
    BITS: tl.constexpr, BY_INPUTS: tl.constexpr, IS_AWQ: tl.constexpr, ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 32 // BITS
    own = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :].to(tl.int64)
    inside = (own < rows) & (c < C)
    r, group = own + first, c // columns
    if BY_INPUTS:
        word = tl.load(packed + r * packed_r + c // PER_WORD * packed_c, mask=inside, other=0)
        number = (word >> (c % PER_WORD * BITS).to(tl.int32)) & ((1 << BITS) - 1)
    else:
        word = tl.load(packed + r // PER_WORD * packed_r + c * packed_c, mask=inside, other=0)
        number = (word >> (_place(r, PER_WORD, IS_AWQ) * BITS).to(tl.int32)) & ((1 << BITS) - 1)
    if ZEROS:
        beside = tl.load(zero + r // PER_WORD * zero_r + group * zero_g, mask=inside, other=0)
        number -= ((beside >> (_place(r, PER_WORD, IS_AWQ) * BITS).to(tl.int32)) & ((1 << BITS) - 1)) + shift
    else:
        number -= 1 << (BITS - 1)
    by = tl.load(scale + r * scale_r + group * scale_g, mask=inside, other=0)
    value = _rounded(number.to(tl.float32) * by.to(tl.float32), scale.dtype.element_ty)
    _store(out, value, own * C + c, inside)


@triton.jit
def _e4m3(
    packed, scale, out, first, rows, C, tall, wide, packed_r, scale_r,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    own = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :].to(tl.int64)
    inside, r = (own < rows) & (c < C), own + first
    code = tl.load(packed + r * packed_r + c, mask=inside, other=0).to(tl.int32)
    rest = code & 0x7F
    size = tl.where(
        rest < 8, rest.to(tl.float32) * 0.001953125, ((rest << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    )
    size = tl.where(rest == 0x7F, float("nan"), size)
    number = tl.where(code > 0x7F, -size, size)
    by = tl.load(scale + r // tall * scale_r + c // wide, mask=inside, other=0)
    value = _rounded(number * by.to(tl.float32), scale.dtype.element_ty)
    _store(out, value, own * C + c, inside)


@triton.jit
def _e2m1(
    packed, scale, out, first, rows, C, columns, packed_r, scale_r,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    own = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :].to(tl.int64)
    inside, r = (own < rows) & (c < C), own + first
    pair = tl.load(packed + r * packed_r + c // 2, mask=inside, other=0).to(tl.int32)
    code = (pair >> (c % 2 * 4).to(tl.int32)) & 15
    exponent, half = (code & 7) >> 1, code & 1
    # Numbers doubled, and half of the power: 2^128, the largest one, is no float.
    size = tl.where(exponent == 0, half, (2 + half) << tl.maximum(exponent - 1, 0)).to(tl.float32)
    stored = tl.load(scale + r * scale_r + c // columns, mask=inside, other=0).to(tl.int32)
    power = tl.where(stored > 1, (stored - 1) << 23, 0x200000 << tl.minimum(stored, 1)).to(tl.float32, bitcast=True)
    value = tl.where(code > 7, -size, size) * power
    _store(out, value, own * C + c, inside)


def unpack(matrix: PackedMatrix, out_RC: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The values of the outputs from ``first`` on, as many as ``out_RC`` has rows; returns it.

    Args:
        matrix: on the device of ``out_RC``.
        out_RC: contiguous.
        first: output of its first row.
    """
    packed, fields, (rows, columns) = matrix.packed, matrix.fields, matrix.shape
    wide = packed.columns or columns
    # Each name is an argument of a kernel.
    block: dict[str, Any] = {
        "out": out_RC,
        "first": first,
        "rows": len(out_RC),
        "C": columns,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
    }
    grid = triton.cdiv(len(out_RC), _ROWS), triton.cdiv(columns, _COLUMNS)
    if packed.codec == "fp8":
        scale = fields["scale"].view(-1, fields["scale"].shape[-1])
        numbers = fields["packed"].view(torch.uint8)
        tall = packed.rows or rows
        _e4m3[grid](numbers, scale, tall=tall, wide=wide, packed_r=numbers.stride(0), scale_r=scale.stride(0), **block)
    elif packed.codec == "mxfp4":
        strides = {"packed_r": fields["packed"].stride(0), "scale_r": fields["scale"].stride(0)}
        _e2m1[grid](fields["packed"], fields["scale"], columns=wide, **strides, **block)
    else:
        _integers[grid](
            fields["packed"],
            fields["scale"],
            fields.get("zero", fields["packed"]),
            columns=wide,
            **_lie(matrix),
            **block,
        )
    return out_RC


def _lie(matrix: PackedMatrix) -> dict[str, Any]:
    """How integers lie: the steps from an output, or a word of outputs, and from an input, a word of them or a group to the next."""
    packed, fields = matrix.packed, matrix.fields
    by_outputs = packed.codec == "integer"  # the first dimension is that of outputs
    steps = {
        f"{name}_{axis}": fields[name].stride(dim) if name in fields else 0
        for name, other in (("packed", "c"), ("scale", "g"), ("zero", "g"))
        for axis, dim in (("r", 0 if by_outputs else 1), (other, 1 if by_outputs else 0))
    }
    return steps | {
        "shift": packed.zero_shift,
        "BITS": packed.bits,
        "BY_INPUTS": packed.codec != "awq",
        "IS_AWQ": packed.codec == "awq",
        "ZEROS": packed.zeros,
    }
