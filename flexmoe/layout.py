"""How the bytes of a weight unit lie in files, in host memory and on the compute device.

A unit is bytes with a *stored* layout. On the host it lies as the disk delivers it: page-aligned supersets of the
file extents, one region per extent, adjacent tensors read as one. On the device its tensors lie packed at 256-byte
boundaries, which the GEMM libraries want.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from flexmoe.checkpoint import TensorInfo
from flexmoe.errors import DataError
from flexmoe.storage import align_down, align_up

DEVICE_ALIGNMENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of a unit: its role in the model and where the checkpoint keeps it.

    Attributes:
        role: the name that the model's code uses (``gate``, ``q`` …).
        tensor: the checkpoint tensor; several parts may be slices of one.
        shape: shape of the part.
        first_element: index of the part's first element in the flattened tensor (packed experts).
        whole: shape of the tensor that the part is a slice of; None: the part is all of it.
    """

    role: str
    tensor: str
    shape: tuple[int, ...]
    first_element: int = 0
    whole: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor inside a byte buffer."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Extent:
    """Page-aligned bytes of a file that go to ``buffer_offset``; the first ``needed`` bytes must exist."""

    path: str
    offset: int
    length: int
    buffer_offset: int
    needed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitLayout:
    """Layouts of one unit; ``copies`` are (host offset, device offset, bytes)."""

    extents: tuple[Extent, ...]
    host: Mapping[str, Place]
    host_bytes: int
    device: Mapping[str, Place]
    device_bytes: int
    copies: tuple[tuple[int, int, int], ...]
    stored_bytes: int


def pack(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[dict[str, Place], int]:
    """Places at 256-byte boundaries, one after the other, and the bytes they take."""
    places, offset = {}, 0
    for role, (dtype, shape) in shapes.items():
        places[role] = Place(offset, dtype, shape)
        offset += -(-places[role].nbytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
    return places, offset


def views(buffer: torch.Tensor, places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """The tensors of ``places`` as views of a uint8 buffer."""
    return {r: buffer[p.offset : p.offset + p.nbytes].view(p.dtype).view(p.shape) for r, p in places.items()}


def unit_layout(parts: Sequence[Part], tensors: Mapping[str, TensorInfo]) -> UnitLayout:
    """Layout of the unit that consists of ``parts``.

    Raises:
        DataError: a tensor starts at an offset that its dtype cannot be read from.
    """
    found = []
    for part in parts:
        info = tensors[part.tensor]
        offset = info.offset + part.first_element * info.dtype.itemsize
        if offset % info.dtype.itemsize:
            raise DataError(f"{info.path}: tensor {part.tensor!r} starts at byte {offset}, unaligned for {info.dtype}")
        found.append((str(info.path), offset, Place(0, info.dtype, part.shape), part.role))
    extents, host, host_bytes = _host_layout(sorted(found, key=lambda f: f[:2]))
    device, device_bytes = pack({r: (p.dtype, p.shape) for r, p in host.items()})
    copies = tuple((host[r].offset, device[r].offset, host[r].nbytes) for r in host)
    return UnitLayout(
        extents=tuple(extents),
        host=host,
        host_bytes=host_bytes,
        device=device,
        device_bytes=device_bytes,
        copies=copies,
        stored_bytes=sum(p.nbytes for p in host.values()),
    )


def _host_layout(found: list[tuple[str, int, Place, str]]) -> tuple[list[Extent], dict[str, Place], int]:
    """Merge tensors that touch into one extent; give each extent its own page-aligned region."""
    regions: list[list] = []  # path, first byte, end byte, members
    for path, offset, place, role in found:
        end = offset + place.nbytes
        if regions and regions[-1][0] == path and regions[-1][2] == offset:
            regions[-1][2] = end
        else:
            regions.append([path, offset, end, []])
        regions[-1][3].append((offset, place, role))
    extents, host, size = [], {}, 0
    for path, start, end, members in regions:
        first, last = align_down(start), align_up(end)
        extents.append(Extent(path, first, last - first, size, end - first))
        for offset, place, role in members:
            host[role] = Place(size + offset - first, place.dtype, place.shape)
        size += last - first
    return extents, host, size
