"""How the bytes of a weight unit lie in files, in host memory and on the compute device.

A unit is bytes with a *stored* layout. On the host it lies as the disk delivers it: page-aligned supersets of the
file extents, one region per extent, adjacent tensors read as one. On the device its tensors lie packed at 256-byte
boundaries, which the GEMM libraries want.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from flexmoe.checkpoint.safetensors import TensorInfo
from policies.common.memory_units import align_down, align_up

DEVICE_ALIGNMENT = 256
#: A router whose weight is kept in float32, whatever the dtype of the others is.
WIDE_ROUTER = "wide router"
#: Roles of tensors that are float32 at rest and in use.
FLOAT32_ROLES = frozenset((WIDE_ROUTER, "correction"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a unit: its role in the model and where the checkpoint keeps it.

    Attributes:
        role: the name that the model's code uses (``gate_up``, ``q`` …).
        tensor: the checkpoint tensor; several parts may be slices of one.
        shape: shape of the part.
        first_element: index of the part's first element in the flattened tensor (packed experts).
        whole: shape of the tensor that the part is a slice of; None: the part is all of it.
        of: shape of the unit's tensor that several parts make up, each a contiguous piece of it; None: this is all of it.
        into: index of the part's first element in that tensor, flattened.
        dtypes: those that the tensor may have; empty: any float, which is cast to the compute dtype when it is used. Others are
            used as they are.
    """

    role: str
    tensor: str
    shape: tuple[int, ...]
    first_element: int = 0
    whole: tuple[int, ...] | None = None
    of: tuple[int, ...] | None = None
    into: int = 0
    dtypes: tuple[torch.dtype, ...] = ()


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

    @property
    def strides(self) -> tuple[int, ...]:
        """Its strides, in numbers."""
        return tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a part lies on the host, and which elements of its role's tensor it is."""

    role: str
    into: int
    place: Place


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
    """Layouts of one unit; ``copies`` are (host offset, device offset, bytes).

    On the device every role is one tensor. On the host it is one where its parts lie in order without gaps, else there are
    tensors ``<role>.<number>``: one for each expert of the unit where the parts of each do, else one for each part. ``pieces``
    are the parts either way.
    """

    extents: tuple[Extent, ...]
    pieces: tuple[Piece, ...]
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
    """The tensors of ``places`` as views of a uint8 buffer, whose size is a multiple of their numbers'."""
    numbers = {dtype: buffer.view(dtype) for dtype in {p.dtype for p in places.values()}}
    tensors = {}
    for role, place in places.items():  # a unit of small experts has dozens: one call each, not a slice and two views
        whole = numbers[place.dtype]
        start = whole.storage_offset() + place.offset // place.dtype.itemsize
        tensors[role] = whole.as_strided(place.shape, place.strides, start)
    return tensors


def tensors_of(tensors: Mapping[str, torch.Tensor], role: str) -> torch.Tensor | list[torch.Tensor]:
    """A role's one tensor, or where it lies in several (`UnitLayout`) those in their order."""
    if role in tensors:
        return tensors[role]
    found: list[torch.Tensor] = []
    while (tensor := tensors.get(f"{role}.{len(found)}")) is not None:
        found.append(tensor)
    return found


def unit_layout(parts: Sequence[Part], tensors: Mapping[str, TensorInfo]) -> UnitLayout:
    """Layout of the unit that consists of ``parts``. Their tensors are aligned, and those of a role have one dtype."""
    found: list[tuple[str, int, Part, torch.dtype]] = []
    for part in parts:
        info = tensors[part.tensor]
        offset = info.offset + part.first_element * info.dtype.itemsize
        found.append((str(info.path), offset, part, info.dtype))
    found.sort(key=lambda f: f[:2])
    extents, pieces, host_bytes = _host_layout(found)
    shapes = {part.role: (dtype, part.of or part.shape) for _, _, part, dtype in found}
    device, device_bytes = pack(shapes)
    return UnitLayout(
        extents=tuple(extents),
        pieces=tuple(pieces),
        host=_host_tensors(pieces, shapes),
        host_bytes=host_bytes,
        device=device,
        device_bytes=device_bytes,
        copies=tuple(_copies(pieces, device)),
        stored_bytes=sum(p.place.nbytes for p in pieces),
    )


@dataclass(slots=True)
class _Region:
    """Parts that follow each other in a file, from byte ``start`` to ``end``: (offset, part, dtype) of each."""

    path: str
    start: int
    end: int
    members: list[tuple[int, Part, torch.dtype]] = field(default_factory=list)


def _host_layout(found: list[tuple[str, int, Part, torch.dtype]]) -> tuple[list[Extent], list[Piece], int]:
    """Merge parts that touch into one extent; give each extent its own page-aligned region."""
    regions: list[_Region] = []
    for path, offset, part, dtype in found:
        if not regions or regions[-1].path != path or regions[-1].end != offset:
            regions.append(_Region(path, offset, offset))
        regions[-1].members.append((offset, part, dtype))
        regions[-1].end = offset + prod(part.shape) * dtype.itemsize
    extents: list[Extent] = []
    pieces: list[Piece] = []
    size = 0
    for region in regions:
        first, last = align_down(region.start), align_up(region.end)
        extents.append(Extent(region.path, first, last - first, size, region.end - first))
        for offset, part, dtype in region.members:
            pieces.append(Piece(part.role, part.into, Place(size + offset - first, dtype, part.shape)))
        size += last - first
    return extents, pieces, size


def _host_tensors(
    pieces: Sequence[Piece], shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Place]:
    """Every role as one tensor where its pieces lie in order without gaps; else the tensor of each expert of the unit where all
    of those do; else each piece by itself."""
    host = {}
    for role, (dtype, shape) in shapes.items():
        own = sorted((p for p in pieces if p.role == role), key=lambda p: p.into)
        each = prod(shape[1:])
        experts = (
            [[p for p in own if p.into // each == number] for number in range(shape[0])] if len(shape) == 3 else []
        )
        if _is_gapless(own):
            host[role] = Place(own[0].place.offset, dtype, shape)
        elif experts and all(map(_is_gapless, experts)):
            places = (Place(parts[0].place.offset, dtype, shape[1:]) for parts in experts)
            host |= {f"{role}.{number}": place for number, place in enumerate(places)}
        else:
            host |= {f"{role}.{number}": p.place for number, p in enumerate(own)}
    return host


def _is_gapless(pieces: Sequence[Piece]) -> bool:
    first = pieces[0]
    return all(p.place.offset - first.place.offset == (p.into - first.into) * p.place.dtype.itemsize for p in pieces)


def _copies(pieces: Sequence[Piece], device: Mapping[str, Place]) -> list[tuple[int, int, int]]:
    """(host offset, device offset, bytes) of every stretch that is contiguous in both layouts."""
    copies: list[tuple[int, int, int]] = []
    for piece in pieces:
        place, home = piece.place, device[piece.role]
        source, target = place.offset, home.offset + piece.into * place.dtype.itemsize
        if copies:
            before = copies[-1]
            if before[0] + before[2] == source and before[1] + before[2] == target:
                copies[-1] = (before[0], before[1], before[2] + place.nbytes)
                continue
        copies.append((source, target, place.nbytes))
    return copies


def expert_copies(unit: UnitLayout, number: int, single: Mapping[str, Place]) -> tuple[tuple[int, int, int], ...]:
    """(offset in the unit's host bytes, offset in ``single``, bytes) of every stretch of one expert of a unit of several.

    Args:
        number: the expert's place in the unit.
        single: where the tensors of the expert alone go.
    """
    copies = []
    for piece in unit.pieces:
        target, size = single[piece.role], piece.place.dtype.itemsize
        first = number * prod(target.shape)  # of the expert, in elements of the unit's tensor
        start = max(first, piece.into)
        count = min(first + prod(target.shape), piece.into + prod(piece.place.shape)) - start
        if count > 0:
            source = piece.place.offset + (start - piece.into) * size
            copies.append((source, target.offset + (start - first) * size, count * size))
    return tuple(copies)
