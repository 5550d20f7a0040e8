"""compressed-tensors' `pack-quantized`: integers with 2^(bits - 1) added, in words along the inputs.

Source: `compressors/quantized_compressors/pack_quantized.py` of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.bits import unpacked, words
from flexmoe.formats.codec import FLOATS, Field, Fields


class PackedIntegers:
    """``weight_packed`` ``[R, words]``, ``weight_scale`` ``[R, groups]``, ``weight_zero_point`` ``[words of R, groups]``."""

    def fields(self, packed: PackedFormat, rows: int, columns: int) -> Sequence[Field]:
        """The tensors of a matrix."""
        _, groups = packed.groups(rows, columns)
        found = [
            Field(
                name="packed",
                suffix="weight_packed",
                shape=(rows, words(columns, packed.bits)),
                dtypes=(torch.int32,),
            ),
            Field(name="scale", suffix="weight_scale", shape=(rows, groups), dtypes=FLOATS),
        ]
        if packed.zeros:
            shape = (words(rows, packed.bits), groups)
            found.append(Field(name="zero", suffix="weight_zero_point", shape=shape, dtypes=(torch.int32,)))
        return found

    def unpack(self, packed: PackedFormat, fields: Fields, out_RC: torch.Tensor, first: int) -> None:
        """(number - zero point) · scale; without zero points the number is signed."""
        last, columns = first + len(out_RC), out_RC.shape[1]
        scale = fields["scale"][first:last]
        numbers = unpacked(fields["packed"][first:last], packed.bits, 1, columns)
        half = 1 << (packed.bits - 1)
        values = numbers.to(torch.int16).sub_(half)
        if packed.zeros:
            per_word = 32 // packed.bits
            begin = first // per_word
            zeros = unpacked(fields["zero"][begin : -(-last // per_word)], packed.bits, 0, last - begin * per_word)
            zeros = zeros[first - begin * per_word :].to(torch.int16) - half
            values = values.sub_(spread(zeros, packed.columns, columns))
        out_RC.copy_(values.to(scale.dtype).mul_(spread(scale, packed.columns, columns)))


def spread(groups: torch.Tensor, size: int, columns: int) -> torch.Tensor:
    """``[R, groups]`` for each of the columns; size 0 is one group of all."""
    if groups.shape[1] == 1:
        return groups.expand(-1, columns)
    return groups.repeat_interleave(size, dim=1)[:, :columns]
