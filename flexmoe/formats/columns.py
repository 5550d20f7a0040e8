"""GPTQ and AWQ: integers with zero points, stored input by input, so that a column of words holds several outputs or inputs.

Sources: `quantize/qlinear` of GPTQModel, `modules/linear/gemm.py` and `utils/packing_utils.py` of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.errors import DataError
from flexmoe.formats.bits import unpacked, words
from flexmoe.formats.codec import FLOATS, Field, Fields

#: The place in an AWQ word of each output in turn.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Gptq:
    """``qweight`` ``[words of C, R]``, ``qzeros`` ``[groups, words of R]``, ``scales`` ``[groups, R]``."""

    def fields(self, packed: PackedFormat, rows: int, columns: int) -> Sequence[Field]:
        """The tensors of a matrix."""
        _check_words(packed, rows, columns)
        return _fields(packed, rows, columns, (words(columns, packed.bits), rows))

    def unpack(self, packed: PackedFormat, fields: Fields, out_RC: torch.Tensor, first: int) -> None:
        """(number - zero point) · scale; the zero points of the first version are stored less one."""
        last, columns = first + len(out_RC), out_RC.shape[1]
        numbers = unpacked(fields["packed"][:, first:last], packed.bits, 0, columns)
        _scaled(packed, fields, numbers, out_RC, first, None)


class Awq:
    """``qweight`` ``[C, words of R]``, ``qzeros`` ``[groups, words of R]``, ``scales`` ``[groups, R]``."""

    def fields(self, packed: PackedFormat, rows: int, columns: int) -> Sequence[Field]:
        """The tensors of a matrix."""
        _check_words(packed, rows, columns)
        return _fields(packed, rows, columns, (columns, words(rows, packed.bits)))

    def unpack(self, packed: PackedFormat, fields: Fields, out_RC: torch.Tensor, first: int) -> None:
        """(number - zero point) · scale."""
        stretch, begin = _words_of(packed, first, first + len(out_RC))
        numbers = unpacked(
            fields["packed"][:, stretch], packed.bits, 1, (stretch.stop - stretch.start) * 32 // packed.bits, AWQ_ORDER
        )
        _scaled(packed, fields, numbers[:, begin : begin + len(out_RC)], out_RC, first, AWQ_ORDER)


def _check_words(packed: PackedFormat, rows: int, columns: int) -> None:
    whole = 32 // packed.bits
    if rows % whole or columns % whole:
        raise DataError(
            f"a matrix of {rows} outputs and {columns} inputs is not packed by {packed.codec}: both must be multiples of {whole}"
        )


def _fields(packed: PackedFormat, rows: int, columns: int, shape: tuple[int, int]) -> Sequence[Field]:
    _, groups = packed.groups(rows, columns)
    return [
        Field(name="packed", suffix="qweight", shape=shape, dtypes=(torch.int32,)),
        Field(name="zero", suffix="qzeros", shape=(groups, words(rows, packed.bits)), dtypes=(torch.int32,)),
        Field(name="scale", suffix="scales", shape=(groups, rows), dtypes=FLOATS),
    ]


def _words_of(packed: PackedFormat, first: int, last: int) -> tuple[slice, int]:
    """The words of outputs, and the place of the first in its word."""
    per_word = 32 // packed.bits
    return slice(first // per_word, -(-last // per_word)), first % per_word


def _scaled(
    packed: PackedFormat,
    fields: Fields,
    numbers_CR: torch.Tensor,
    out_RC: torch.Tensor,
    first: int,
    order: tuple[int, ...] | None,
) -> None:
    last, columns = first + len(out_RC), out_RC.shape[1]
    stretch, begin = _words_of(packed, first, last)
    count = (stretch.stop - stretch.start) * 32 // packed.bits
    zeros = unpacked(fields["zero"][:, stretch], packed.bits, 1, count, order)[:, begin : begin + len(out_RC)]
    zeros, scale = zeros.to(torch.int16) + packed.zero_shift, fields["scale"][:, first:last]
    if len(scale) > 1:
        zeros, scale = (each.repeat_interleave(packed.columns, dim=0)[:columns] for each in (zeros, scale))
    values = numbers_CR.to(torch.int16).sub_(zeros).to(scale.dtype).mul_(scale)
    out_RC.copy_(values.T)
