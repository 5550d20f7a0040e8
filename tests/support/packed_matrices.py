"""Packed matrices of drawn numbers: any bits are a matrix."""

from __future__ import annotations

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.packed_matrix import CODECS, PackedMatrix


def packed_matrix(
    packed: PackedFormat,
    rows: int,
    columns: int,
    generator: torch.Generator,
    scale_dtype: torch.dtype = torch.bfloat16,
    spread: float = 3.0,
) -> PackedMatrix:
    """A matrix of random bits.

    Args:
        scale_dtype: of its scales, unless the format has but one.
        spread: standard deviation of the logarithms (base 2) of scales.
    """
    fields = {}
    for field in CODECS[packed.codec].fields(packed, rows, columns):
        dtype = scale_dtype if scale_dtype in field.dtypes else field.dtypes[0]
        fields[field.name] = _drawn(field.shape, dtype, field.name == "scale", generator, spread)
    return PackedMatrix(packed, fields, (rows, columns))


def _drawn(
    shape: tuple[int, ...], dtype: torch.dtype, is_scale: bool, generator: torch.Generator, spread: float
) -> torch.Tensor:
    exponents = torch.randn(shape, generator=generator) * spread - 6
    if is_scale and dtype == torch.uint8:
        return (127 + exponents).round().clamp(0, 255).to(torch.uint8)
    if is_scale:
        return (exponents.exp2() * torch.randn(shape, generator=generator).sign()).to(dtype)
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).view(shape)
