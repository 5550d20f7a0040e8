"""Scales of groups of weights, and the weights as numbers of few bits: what `flexmoe.quantizing` writes and the codecs read.

A scale costs the same at run time whatever its value, so the one with the smallest squared error is taken. The largest weight
of a group is clipped where the others gain more by it. A scale of integers has the sign that makes the largest weight negative:
of 4 bits -8 is a number, and 8 is none.

Legend: R outputs, C inputs, G groups of inputs, n weights that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.bits import packed_words
from flexmoe.formats.codec import Fields
from flexmoe.formats.mxfp4 import BIAS, VALUES

#: Scales that are tried, relative to that with which the largest weight of a group is the lowest integer.
_CLIPPED = {4: tuple(1.04 - 0.04 * step for step in range(12)), 8: (1.0, 0.99, 0.98, 0.97, 0.95, 0.92)}
_E4M3_MAX = 448.0
#: Half-way between the magnitudes that follow each other in e2m1.
_E2M1_BOUNDS = tuple((low + high) / 2 for low, high in zip(VALUES[:7], VALUES[1:8]))
#: What is added to the exponent with which the largest number is 4 to 8, of which more than 6 is clipped; the second clips nothing.
_EXPONENTS = (0, 1)

#: Weights and their scales to the numbers, as floats.
_Round = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def packed_fields(packed: PackedFormat, weights_RC: torch.Tensor, scale_dtype: torch.dtype) -> Fields:
    """The tensors of a matrix in a format that compressed-tensors writes, by field.

    Args:
        packed: ``integer`` without zero points, ``fp8`` or ``mxfp4``.
        weights_RC: float32, finite; whole groups in both directions, but for the last ones of the matrix.
        scale_dtype: of scales that are floats.
    """
    if packed.codec == "integer":
        return _integers(packed, weights_RC, scale_dtype)
    if packed.codec == "fp8":
        return _float8(packed, weights_RC, scale_dtype)
    return _mxfp4(packed, weights_RC)


def _integers(packed: PackedFormat, weights_RC: torch.Tensor, scale_dtype: torch.dtype) -> Fields:
    """Symmetric integers: -2^(bits - 1) to 2^(bits - 1) - 1. Weights that were such numbers before are kept exactly."""
    half = 1 << (packed.bits - 1)
    groups_RGn = weights_RC.unflatten(1, (-1, packed.columns or weights_RC.shape[1]))

    def rounded(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (weights / scale).round_().clamp_(-half, half - 1)

    largest_RG1 = groups_RGn.gather(-1, groups_RGn.abs().argmax(-1, keepdim=True))
    parts = [*(-ratio / half for ratio in _CLIPPED[packed.bits]), 1 / (half - 1)]
    scale_RG1 = _best(groups_RGn, (largest_RG1 * part for part in parts), rounded, scale_dtype)
    numbers_RC = rounded(groups_RGn, scale_RG1).add_(half).to(torch.uint8).flatten(1)
    return {"packed": packed_words(numbers_RC, packed.bits, 1), "scale": scale_RG1.squeeze(-1).to(scale_dtype)}


def _float8(packed: PackedFormat, weights_RC: torch.Tensor, scale_dtype: torch.dtype) -> Fields:
    """e4m3 numbers, the largest of a block at the end of their range: their steps grow with them, so clipping gains nothing."""
    rows, columns = weights_RC.shape
    tall, wide = min(packed.rows or rows, rows), min(packed.columns or columns, columns)
    of_rows, of_columns = -(-rows // tall), -(-columns // wide)
    padded = torch.nn.functional.pad(weights_RC, (0, of_columns * wide - columns, 0, of_rows * tall - rows))
    largest = padded.view(of_rows, tall, of_columns, wide).abs().amax((1, 3))
    scale = _usable(largest / _E4M3_MAX, scale_dtype)
    each_RC = scale.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    numbers_RC = (weights_RC / each_RC).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return {"packed": numbers_RC, "scale": scale.to(scale_dtype)}


def _mxfp4(packed: PackedFormat, weights_RC: torch.Tensor) -> Fields:
    groups_RGn = weights_RC.unflatten(1, (-1, packed.columns))
    largest_RG1 = groups_RGn.abs().amax(-1, keepdim=True)
    # frexp: largest = m · 2^e with m in [1/2, 1), and the largest number of e2m1 is 1.5 · 2^2
    exponent_RG1 = torch.frexp(largest_RG1).exponent - 3
    table = torch.tensor(VALUES, device=weights_RC.device)

    def rounded(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return table[_e2m1(weights / scale)]

    exponents = (exponent_RG1.add(step).clamp_(-BIAS, BIAS) for step in _EXPONENTS)
    one = torch.ones_like(largest_RG1)
    scale_RG1 = _best(groups_RGn, (torch.ldexp(one, each) for each in exponents), rounded, torch.float32)
    codes_RC = _e2m1(groups_RGn / scale_RG1).to(torch.uint8).flatten(1)
    biased_RG = torch.frexp(scale_RG1).exponent.add_(BIAS - 1).to(torch.uint8).squeeze(-1)
    return {"packed": codes_RC[:, ::2] | codes_RC[:, 1::2] << 4, "scale": biased_RG}


def _e2m1(values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest number."""
    bounds = torch.tensor(_E2M1_BOUNDS, device=values.device)
    return torch.bucketize(values.abs(), bounds) + (values < 0) * 8


def _best(
    groups: torch.Tensor, scales: Iterable[torch.Tensor], rounded: _Round, scale_dtype: torch.dtype
) -> torch.Tensor:
    """Of several scales of each group the one with the smallest squared error, in float32 and exact in its dtype."""
    best = least = None
    for scale in scales:
        scale = _usable(scale, scale_dtype)
        error = rounded(groups, scale).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
        if best is None or least is None:
            best, least = scale, error
        else:
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    if best is None:
        raise ValueError("no scale was given")
    return best


def _usable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale as its dtype has it, in float32; 1 for a group of zeros, and no nearer to zero than the smallest normal number."""
    stored = scale.to(dtype).float()
    usable = stored.abs().clamp_(min=torch.finfo(dtype).tiny).copysign_(stored)
    return torch.where(scale == 0, torch.ones_like(stored), usable)
