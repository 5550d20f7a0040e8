"""FP8 (e4m3) weights with a scale for each block, channel or matrix.

Sources: `integrations/finegrained_fp8.py` of transformers, `compressors/quantized_compressors/naive_quantized.py` of
compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.codec import FLOATS, Field, Fields


class Float8:
    """``weight`` e4m3 ``[R, C]``, and its scales: by block ``weight_scale_inv``, which is no inverse, or ``weight_scale``."""

    def fields(self, packed: PackedFormat, rows: int, columns: int) -> Sequence[Field]:
        """The tensors of a matrix."""
        of_rows, of_columns = packed.groups(rows, columns)
        shape = (
            (1,)
            if (of_rows, of_columns) == (1, 1) and not packed.rows and not packed.columns
            else (of_rows, of_columns)
        )
        name = "weight_scale_inv" if packed.method == "fp8" else "weight_scale"
        return [
            Field(name="packed", suffix="weight", shape=(rows, columns), dtypes=(torch.float8_e4m3fn,)),
            Field(name="scale", suffix=name, shape=shape, dtypes=FLOATS),
        ]

    def unpack(self, packed: PackedFormat, fields: Fields, out_RC: torch.Tensor, first: int) -> None:
        """number · scale."""
        last, columns = first + len(out_RC), out_RC.shape[1]
        scale = fields["scale"].view(-1, fields["scale"].shape[-1])
        rows = packed.rows or fields["packed"].shape[0]
        of_rows = torch.arange(first, last, device=scale.device).div_(rows, rounding_mode="floor")
        each = scale.index_select(0, of_rows)
        if each.shape[1] > 1:
            each = each.repeat_interleave(packed.columns, dim=1)[:, :columns]
        out_RC.copy_(fields["packed"][first:last].to(scale.dtype).mul_(each))
