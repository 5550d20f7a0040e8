"""MXFP4: e2m1 numbers in pairs, the first in the low half of a byte, and a power of two for 32 of them.

Sources: the OCP Microscaling specification 1.0; `integrations/mxfp4.py` of transformers (gpt-oss), compressed-tensors'
`mxfp4-pack-quantized`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.errors import DataError
from flexmoe.formats.codec import Field, Fields

#: The value of each code: sign, two bits of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BIAS = 127


class Mxfp4:
    """``weight_packed`` uint8 ``[R, C / 2]`` and ``weight_scale`` uint8 ``[R, C / 32]``, the exponent plus 127."""

    def fields(self, packed: PackedFormat, rows: int, columns: int) -> Sequence[Field]:
        """The tensors of a matrix."""
        if columns % packed.columns:
            raise DataError(f"a matrix of {columns} inputs cannot be packed in MXFP4: {packed.columns} share a scale")
        return [
            Field(name="packed", suffix="weight_packed", shape=(rows, columns // 2), dtypes=(torch.uint8,)),
            Field(name="scale", suffix="weight_scale", shape=(rows, columns // packed.columns), dtypes=(torch.uint8,)),
        ]

    def unpack(self, packed: PackedFormat, fields: Fields, out_RC: torch.Tensor, first: int) -> None:
        """number · 2^(scale - 127), which bfloat16 and float32 hold exactly."""
        last = first + len(out_RC)
        table = torch.tensor(VALUES, dtype=torch.float32, device=out_RC.device)
        pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=-1)  # of a byte: low half, high half
        values = pairs.index_select(0, fields["packed"][first:last].flatten().int()).view(
            len(out_RC), -1, packed.columns
        )
        exponents = fields["scale"][first:last].to(torch.int32).sub_(BIAS)
        out_RC.copy_(torch.ldexp(values, exponents.unsqueeze(-1)).view(out_RC.shape))
