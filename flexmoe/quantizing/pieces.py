"""A file of a packed checkpoint in pieces, which cores make side by side: bytes that are copied, rows of a matrix that are packed.

Legend: R outputs, C inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.checkpoint.files import open_file, read_bytes
from flexmoe.errors import DataError
from flexmoe.formats.packed_matrix import PackedMatrix
from flexmoe.formats.rounding import packed_fields
from flexmoe.quantizing.outputs import SHAPE, Output, Shard
from policies.common import file_io

#: Numbers of a piece: with what is computed beside them they stay in a core's cache, and a call of torch takes long enough
#: that the interpreter's lock does not hold up other cores.
NUMBERS = 1 << 19
_COPIED_BYTES = 8 << 20
HEADER = "the header"


class Stretch(NamedTuple):
    """Bytes of a file, whose they are, and their hash when they were made."""

    tensor: str
    offset: int
    length: int
    digest: str


@dataclass(frozen=True, slots=True)
class Made:
    """A piece that has been written.

    Attributes:
        stretches: where.
        error, norm: sums of squares over its weights: of what packing changed, and of the weights.
    """

    stretches: tuple[Stretch, ...]
    error: float = 0.0
    norm: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that were written."""
        return sum(stretch.length for stretch in self.stretches)


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes ``first`` to ``last`` of a tensor."""

    output: Output
    first: int
    last: int

    def make(self, descriptor: int, data_start: int, packed: PackedFormat) -> Made:
        """Write it to a file whose tensors begin at ``data_start``."""
        source = self.output.source
        with open_file(source.path) as (file, _):
            data = read_bytes(file, self.last - self.first, source.offset + self.first)
        return Made((write(descriptor, self.output.name, data, data_start + self.output.offset + self.first),))


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows ``first`` to ``last`` of a matrix, for all of its fields."""

    fields: Mapping[str, Output]
    first: int
    last: int

    def make(self, descriptor: int, data_start: int, packed: PackedFormat) -> Made:
        """Write it to a file whose tensors begin at ``data_start``.

        Raises:
            DataError: a weight is not finite.
        """
        weights_RC = self._weights()
        own = packed_fields(packed, weights_RC, self.fields["scale"].dtype)
        stretches = [
            write(descriptor, output.name, bytes_of(own[field]), data_start + self._offset(output, packed))
            for field, output in self.fields.items()
            if field != SHAPE
        ]
        if self.first == 0 and SHAPE in self.fields:
            output = self.fields[SHAPE]
            data = bytes_of(torch.tensor(output.matrix, dtype=output.dtype))
            stretches.append(write(descriptor, output.name, data, data_start + output.offset))
        unpacked_RC = PackedMatrix(packed, own, (len(weights_RC), weights_RC.shape[1])).unpack(
            torch.empty_like(weights_RC)
        )
        error = unpacked_RC.sub_(weights_RC).square_().sum(dtype=torch.float64)
        return Made(tuple(stretches), float(error), float(weights_RC.square().sum(dtype=torch.float64)))

    def _weights(self) -> torch.Tensor:
        output = self.fields["packed"]
        source, columns = output.source, (output.matrix or (0, 0))[1]
        size = source.dtype.itemsize
        start = source.offset + (output.first + self.first * columns) * size
        with open_file(source.path) as (file, _):
            data = read_bytes(file, (self.last - self.first) * columns * size, start)
        weights = torch.frombuffer(bytearray(data), dtype=source.dtype).view(-1, columns).float()
        if not bool(weights.isfinite().all()):
            raise DataError(
                f"tensor {source.name!r} in {str(source.path)!r} has weights that are not finite, which cannot be packed: "
                "the file is damaged, or the model is"
            )
        return weights

    def _offset(self, output: Output, packed: PackedFormat) -> int:
        row = self.first // packed.rows if output.field == "scale" else self.first
        return output.offset + row * (output.nbytes // output.shape[0])


def pieces(shard: Shard, packed: PackedFormat) -> Iterator[Copied | Packed]:
    """All of a file but its header, in the order of its bytes as far as may be; the same ones whenever they are asked for."""
    matrices: dict[tuple[str, int], dict[str, Output]] = {}
    for each in shard.outputs:
        if each.matrix is None:
            for first in range(0, each.nbytes, _COPIED_BYTES):
                yield Copied(each, first, min(each.nbytes, first + _COPIED_BYTES))
        else:
            matrices.setdefault((each.source.name, each.first), {})[each.field] = each
    for fields in matrices.values():
        rows, columns = fields["packed"].matrix or (0, 0)
        step = max(1, NUMBERS // columns // packed.rows) * packed.rows
        for first in range(0, rows, step):
            yield Packed(fields, first, min(rows, first + step))


def write(descriptor: int, tensor: str, data: bytes, offset: int) -> Stretch:
    """Write bytes of a tensor at an offset of the file."""
    file_io.write_at(descriptor, data, offset)
    return Stretch(tensor, offset, len(data), digest(data))


def digest(data: bytes) -> str:
    """A hash that finds what a disk or memory has changed."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Its numbers as they lie in a file."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
