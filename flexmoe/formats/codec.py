"""What a packed format stores of a matrix, and how its numbers come back.

A matrix ``[R, C]`` of R outputs and C inputs is a few tensors beside each other in the checkpoint: numbers, scales and
perhaps zero points. A codec names them and gives their shapes, and makes the matrix of them again, a stretch of outputs
at a time. Where a codec is not told otherwise, a value is (number - zero point) · scale, rounded once in the dtype of the scale.

Legend: R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cost_model.model.packed_format import PackedFormat

#: Tensors of a packed matrix, by field.
Fields = Mapping[str, torch.Tensor]
#: Dtypes that a scale may have.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A tensor of a packed matrix.

    Args:
        name: ``packed``, ``scale`` or ``zero``.
        suffix: of its name in the checkpoint, after the module's.
        shape: its shape.
        dtypes: those that it may have.
    """

    name: str
    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class Codec(Protocol):
    """How one method packs numbers."""

    def fields(self, packed: PackedFormat, rows: int, columns: int) -> Sequence[Field]:
        """The tensors of a matrix ``[rows, columns]``.

        Raises:
            DataError: a matrix of this shape cannot be packed so.
        """

    def unpack(self, packed: PackedFormat, fields: Fields, out_RC: torch.Tensor, first: int) -> None:
        """Values of the outputs from ``first`` on, as many as ``out_RC`` has rows, rounded to its dtype."""
