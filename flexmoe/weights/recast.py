"""Tensors that are not used as they lie in their file: of another dtype than most, or at an offset where no number may begin.

A `RecastFile` is a file that no disk has. In it these tensors follow each other, aligned and in the dtype that is wanted,
and to layouts, reads and the memory plan they are bytes of a file like all others. What is read of it is read from the real
files and cast, a little at a time: no tensor is ever held in two forms.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexmoe.checkpoint.safetensors import TensorInfo
from flexmoe.checkpoint.unit_layout import FLOAT32_ROLES, Part
from flexmoe.system.direct_io import DirectFile
from policies.units import UnitId

#: Bytes that are read before they are cast; each disk thread holds so many.
_CHUNK_BYTES = 256 << 10
#: A number of any dtype may begin at multiples of this.
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """The dtypes of weights at rest.

    Args:
        stored: of most weights; those of this dtype stay as they are.
        cast: of the others, which are as large.
    """

    stored: torch.dtype
    cast: torch.dtype

    @classmethod
    def of(cls, stored: torch.dtype, compute: torch.dtype) -> Rest:
        """Others are cast to the compute dtype at once where that takes as many bytes: then they are rounded once."""
        return cls(stored=stored, cast=compute if compute.itemsize == stored.itemsize else stored)

    def of_role(self, role: str) -> torch.dtype:
        """The dtype that weights of a role stay in."""
        return torch.float32 if role in FLOAT32_ROLES else self.stored

    def cast_of_role(self, role: str) -> torch.dtype:
        """What others of the role are cast to."""
        return torch.float32 if role in FLOAT32_ROLES else self.cast


class RecastFile:
    """The tensors of a checkpoint that have to be cast or moved before use; safe to read from several threads.

    Args:
        found: where each lies, and its dtype here.

    Attributes:
        path: names the file, which does not exist.
        tensors: where each lies here.

    Raises:
        StorageError: a file cannot be opened.
    """

    def __init__(self, found: Iterable[tuple[TensorInfo, torch.dtype]]):
        self.path = "(recast tensors)"
        self.tensors: dict[str, TensorInfo] = {}
        self._sources: list[TensorInfo] = []
        self._starts: list[int] = []
        end = 0
        for info, dtype in found:
            nbytes = info.nbytes // info.dtype.itemsize * dtype.itemsize
            self.tensors[info.name] = replace(info, path=Path(self.path), offset=end, nbytes=nbytes, dtype=dtype)
            self._sources.append(info)
            self._starts.append(end)
            end = -(-(end + nbytes) // _ALIGNMENT) * _ALIGNMENT
        # Of its own: reads of unaligned bytes turn O_DIRECT off for their descriptor.
        self._files = {path: DirectFile(path) for path in {info.path for info in self._sources}}

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo], units: Mapping[UnitId, Sequence[Part]], rest: Rest) -> RecastFile:
        """Of the tensors that `units` consist of; where one of a role has to be cast, all of the role in the unit are."""
        cast: dict[str, torch.dtype] = {}
        moved = set()
        for parts in units.values():
            floats = [part for part in parts if not part.dtypes]
            others = {part.role for part in floats if tensors[part.tensor].dtype != rest.of_role(part.role)}
            cast |= {part.tensor: rest.cast_of_role(part.role) for part in parts if part.role in others}
            moved |= {part.tensor for part in parts if _is_misplaced(tensors[part.tensor], part, rest)}
        ordered = sorted((tensors[name] for name in {*cast, *moved}), key=lambda info: (str(info.path), info.offset))
        return cls((info, cast.get(info.name, info.dtype)) for info in ordered)

    def read_into(self, buffer: memoryview, offset: int, needed: int | None = None) -> None:
        """Fill ``buffer`` from ``offset``; only the first ``needed`` bytes (default all) must exist. Both are whole numbers
        of the dtypes here.

        Raises:
            StorageError: the device reports an error.
            DataError: a file ends too early.
        """
        end = offset + (len(buffer) if needed is None else needed)
        at = bisect_right(self._starts, offset) - 1
        while at < len(self._starts) and self._starts[at] < end:
            source = self._sources[at]
            here = self.tensors[source.name]
            first, last = max(offset, here.offset), min(end, here.offset + here.nbytes)
            if first < last:
                self._cast(
                    source, here, (first - here.offset) // here.dtype.itemsize, buffer[first - offset : last - offset]
                )
            at += 1

    def _cast(self, source: TensorInfo, here: TensorInfo, first: int, buffer: memoryview) -> None:
        """Numbers of a tensor from the ``first`` on, as many as the buffer holds."""
        file, size = self._files[source.path], source.dtype.itemsize
        if source.dtype == here.dtype:
            file.read_into(buffer, source.offset + first * size)
            return
        target = torch.frombuffer(buffer, dtype=here.dtype)
        raw = torch.empty(min(_CHUNK_BYTES, len(target) * size), dtype=torch.uint8)
        for start in range(0, len(target), len(raw) // size):
            into = target[start : start + len(raw) // size]
            piece = raw[: len(into) * size]
            file.read_into(piece.numpy().data, source.offset + (first + start) * size)
            into.copy_(piece.view(source.dtype))


def _is_misplaced(info: TensorInfo, part: Part, rest: Rest) -> bool:
    return bool(info.offset % (info.dtype.itemsize if part.dtypes else rest.of_role(part.role).itemsize))
