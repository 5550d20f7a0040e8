"""Packed matrices of drawn numbers: any bits are a matrix."""

from __future__ import annotations

import itertools

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.packed_matrix import CODECS, PackedMatrix

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def integer(bits: int, columns: int, zeros: bool = False) -> PackedFormat:
    """compressed-tensors' integers."""
    return PackedFormat(method="compressed-tensors", codec="integer", bits=bits, columns=columns, zeros=zeros)


def fp8(rows: int, columns: int) -> PackedFormat:
    """Blocks of so many outputs and inputs."""
    return PackedFormat(method="fp8", codec="fp8", bits=8, rows=rows, columns=columns, scale_bytes=4)


def by_columns(codec: str, bits: int, columns: int, shift: int = 0) -> PackedFormat:
    """GPTQ or AWQ."""
    return PackedFormat(method=codec, codec=codec, bits=bits, columns=columns, zeros=True, zero_shift=shift)


MXFP4 = PackedFormat(method="mxfp4", codec="mxfp4", bits=4, columns=32, scale_bytes=1)
#: Formats, and shapes: a row, less than a vector, no whole number of groups, several blocks of what is transposed at once.
CASES = {
    **{
        f"int{bits}-{columns}{'-zeros' * zeros}": (
            integer(bits, columns, zeros),
            ((1, 1), (3, 33), (37, 300), (130, 256)),
        )
        for bits, columns, zeros in itertools.product((4, 8), (0, 7, 32, 128), (False, True))
    },
    **{
        f"fp8-{rows}x{columns}": (fp8(rows, columns), ((1, 1), (5, 31), (200, 300)))
        for rows, columns in ((128, 128), (0, 0), (1, 0), (3, 5))
    },
    "mxfp4": (MXFP4, ((1, 32), (37, 96), (66, 512))),
    **{
        f"gptq{bits}-{columns}-v{2 - shift}": (
            by_columns("gptq", bits, columns, shift),
            ((8, 8), (40, 264), (72, 1032)),
        )
        for bits, columns, shift in itertools.product((4, 8), (0, 12, 128), (0, 1))
    },
    **{f"awq-{columns}": (by_columns("awq", 4, columns), ((8, 8), (40, 72), (264, 264))) for columns in (0, 12, 128)},
}


def seeded(seed: int = 0) -> torch.Generator:
    """Random numbers, the same each time."""
    return torch.Generator().manual_seed(seed)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit, but NaN is NaN."""
    bits = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
    return bool(((found.view(bits) == wanted.view(bits)) | (found.isnan() & wanted.isnan())).all())


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


def every_number(dtype: torch.dtype) -> tuple[PackedMatrix, PackedMatrix]:
    """All numbers of e4m3 with scales of a dtype, and those of e2m1 with every power of two."""
    numbers = torch.arange(256, dtype=torch.uint8)
    scale = torch.rand(64, 1, generator=seeded()).exp2().to(dtype)
    floats = {"packed": numbers.repeat(64, 1).view(torch.float8_e4m3fn), "scale": scale}
    powers = {"packed": numbers.view(1, -1).repeat(256, 1), "scale": numbers.view(-1, 1).repeat(1, 16)}
    return PackedMatrix(fp8(1, 0), floats, (64, 256)), PackedMatrix(MXFP4, powers, (256, 512))
