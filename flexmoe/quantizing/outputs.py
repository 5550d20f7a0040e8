"""The tensors of a packed checkpoint, what each is made of, and the files that they lie in.

Weights of a unit lie beside each other, those of a role in the order in which they are used, so that few reads bring them.

Legend: R outputs, C inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.checkpoint.safetensors import TensorInfo, dtype_label
from flexmoe.checkpoint.unit_layout import Part
from flexmoe.formats.packed_matrix import SEPARATOR, is_packed
from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import HubMatrix, hub_matrices
from policies.common.memory_units import GIB

#: A file holds no more, unless it holds one unit; what is not yet whole when a job is killed is made again.
SHARD_BYTES = GIB
#: The field of packed integers that gives R and C.
SHAPE = "shape"
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A tensor that is written.

    Attributes:
        name, dtype, shape: as in the header.
        source: the tensor that it is made of.
        first: index of the first element of the matrix in it.
        matrix: (R, C) of the matrix that this is a field of; None: this is a copy of the whole tensor.
        field: of the packed matrix, or `SHAPE`.
        offset: of its first byte, after the header.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: TensorInfo
    first: int = 0
    matrix: tuple[int, int] | None = None
    field: str = ""
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """A file: its tensors in the order of their bytes."""

    file: str
    outputs: tuple[Output, ...]

    @property
    def header(self) -> bytes:
        """Its first bytes."""
        entries = {
            each.name: {
                "dtype": dtype_label(each.dtype),
                "shape": list(each.shape),
                "data_offsets": [each.offset, each.offset + each.nbytes],
            }
            for each in self.outputs
        }
        text = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def data_bytes(self) -> int:
        """Its bytes after the header."""
        return sum(each.nbytes for each in self.outputs)


def shards_of(checkpoint: Checkpoint, family: Decoder, scale_dtype: torch.dtype) -> list[Shard]:
    """The files of a packed checkpoint, the same ones whenever they are asked for.

    Args:
        checkpoint: what is read.
        family: of the packed shape.
        scale_dtype: of scales that are floats.
    """
    groups: list[list[list[Output]]] = [[]]
    used = 0
    for unit in _units(checkpoint, family, scale_dtype):
        size = sum(each.nbytes for each in unit)
        if groups[-1] and used + size > SHARD_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(unit)
        used += size
    return [
        Shard(_file(number, len(groups)), tuple(_placed(_in_order(group)))) for number, group in enumerate(groups, 1)
    ]


def _file(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _units(checkpoint: Checkpoint, family: Decoder, scale_dtype: torch.dtype) -> Iterator[list[Output]]:
    """The tensors of each unit that no unit before has; at the end those that belong to none."""
    matrices = hub_matrices(family.arch, family.names, checkpoint.tensors)
    written: set[str] = set()
    read = {matrix.tensor for matrix in matrices.values()}
    for parts in family.parts(()).values():
        unit: dict[str, tuple[tuple[int, str, int], Output]] = {}
        for part in parts:
            for each in _outputs(part, matrices, checkpoint, scale_dtype):
                if each.name not in written:
                    unit.setdefault(each.name, ((-each.dtype.itemsize, part.role, part.into), each))
        written |= unit.keys()
        read |= {each.source.name for _, each in unit.values()}
        yield [each for _, each in sorted(unit.values(), key=lambda found: found[0])]
    rest = [_copy(info.name, info) for info in checkpoint.tensors.values() if info.name not in read]
    yield sorted(rest, key=lambda each: -each.dtype.itemsize)


def _outputs(
    part: Part, matrices: Mapping[str, HubMatrix], checkpoint: Checkpoint, scale_dtype: torch.dtype
) -> Iterator[Output]:
    """The tensor that a part is read from; beside packed integers also their shape, which others read."""
    if not is_packed(part.role):
        yield _copy(part.tensor, checkpoint.tensors[matrices[part.tensor].tensor])
        return
    module, field = part.tensor.rsplit(".", 1)[0], part.role.rsplit(SEPARATOR, 1)[1]
    matrix = matrices[f"{module}.weight"]
    source = checkpoint.tensors[matrix.tensor]
    own = Output(
        name=part.tensor,
        dtype=scale_dtype if scale_dtype in part.dtypes else part.dtypes[0],
        shape=part.shape,
        source=source,
        first=matrix.first,
        matrix=(matrix.shape[0], matrix.shape[1]),
        field=field,
    )
    yield own
    if own.dtype == torch.int32:
        yield replace(own, name=f"{module}.weight_shape", dtype=torch.int64, shape=(2,), field=SHAPE)


def _copy(name: str, info: TensorInfo) -> Output:
    return Output(name=name, dtype=info.dtype, shape=info.shape, source=info)


def _in_order(units: Sequence[Sequence[Output]]) -> list[Output]:
    """Shapes, which are not read in a run, then unit by unit; where tensors would not be aligned so, by the size of numbers."""
    shapes = [each for unit in units for each in unit if each.field == SHAPE]
    others = [[each for each in unit if each.field != SHAPE] for unit in units]
    largest = max((each.dtype.itemsize for unit in others for each in unit), default=1)
    joined = [each for unit in others for each in unit]
    if any(sum(each.nbytes for each in unit) % largest for unit in others):
        joined.sort(key=lambda each: -each.dtype.itemsize)
    return shapes + joined


def _placed(outputs: Iterable[Output]) -> Iterator[Output]:
    offset = 0
    for each in outputs:
        yield replace(each, offset=offset)
        offset += each.nbytes
