"""What is in a checkpoint's files: bytes and dtypes by kind, and files that a download left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.checkpoint.safetensors import TensorInfo, dtype_label
from flexmoe.formats.packed_matrix import SEPARATOR, is_packed
from flexmoe.kernels.family import Family
from flexmoe.models.loader import decoder_of
from policies.units import UnitId

#: Kinds of weights, in the order in which they are shown.
KINDS = ("experts", "dense MLPs", "shared experts", "attention", "routers", "norms", "embedding", "head", "not read")
_OF_UNITS = {"embed": "embedding", "attention": "attention", "head": "head"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Tensors of one kind.

    Args:
        nbytes: in files.
        tensors: how many.
        dtypes: as headers call them, those of the most bytes first.
        packed: matrices are packed numbers with scales.
    """

    nbytes: int
    tensors: int
    dtypes: tuple[str, ...]
    packed: bool = False


def stored_by_kind(checkpoint: Checkpoint, math: Family | None) -> dict[str, Stored]:
    """The tensors of a checkpoint by kind, those of `KINDS` that are there.

    Args:
        math: the family; None where there is none, and then all tensors are one kind, "weights".
    """
    if math is None:
        return {"weights": _stored(checkpoint.tensors.values())} if checkpoint.tensors else {}
    kinds: dict[str, str] = {}
    packed = set()
    own = decoder_of(checkpoint).tensors
    for unit, parts in math.parts(own).items():
        for part in parts:
            if part.tensor in own:
                kind = kinds.setdefault(own[part.tensor].name, _kind(math, unit, part.role))
                packed.update([kind] * is_packed(part.role))
    found: dict[str, list[TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        found.setdefault(kinds.get(name, "not read"), []).append(info)
    return {kind: _stored(found[kind], packed=kind in packed) for kind in KINDS if kind in found}


def stopped_downloads(directory: Path) -> int:
    """Files that a download has begun and not finished, in the directory or in its cache of downloads."""
    beside = [directory, directory / ".cache" / "huggingface" / "download", directory.parent.parent / "blobs"]
    return sum(1 for place in beside if place.is_dir() for path in place.iterdir() if path.name.endswith(".incomplete"))


def _kind(math: Family, unit: UnitId, role: str) -> str:
    name = role.split(SEPARATOR)[0]
    if "norm" in name:
        return "norms"
    if "router" in name or name == "correction":
        return "routers"
    if "shared" in name:
        return "shared experts"
    if unit.kind == "expert":
        return "dense MLPs" if math.arch.is_dense(unit.layer) else "experts"
    return _OF_UNITS[unit.kind]


def _stored(infos: Iterable[TensorInfo], *, packed: bool = False) -> Stored:
    sizes: Counter[str] = Counter()
    count = 0
    for info in infos:
        sizes[dtype_label(info.dtype)] += info.nbytes
        count += 1
    dtypes = tuple(name for name, _ in sizes.most_common())
    return Stored(nbytes=sum(sizes.values()), tensors=count, dtypes=dtypes, packed=packed)


def total_bytes(stored: Mapping[str, Stored]) -> int:
    """Bytes of all kinds."""
    return sum(each.nbytes for each in stored.values())
