"""Packed matrices among the tensors of a weight unit: the parts that they are read by, and their values when they are used.

Legend: R outputs, C inputs, n tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.checkpoint.unit_layout import Part
from flexmoe.errors import DataError
from flexmoe.formats.codec import Codec, Fields
from flexmoe.formats.columns import Awq, Gptq
from flexmoe.formats.float8 import Float8
from flexmoe.formats.integers import PackedIntegers
from flexmoe.formats.mxfp4 import Mxfp4

CODECS: Mapping[str, Codec] = MappingProxyType(
    {"fp8": Float8(), "integer": PackedIntegers(), "mxfp4": Mxfp4(), "gptq": Gptq(), "awq": Awq()}
)
#: Between a role and the field of its packed form.
SEPARATOR = ":"
_WEIGHT = ".weight"
#: Numbers that are unpacked at a time; what that takes beside them stays in a cache.
_STRETCH = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A matrix ``[R, C]`` in its packed form.

    Args:
        packed: the format.
        fields: its tensors, on one device.
        shape: (R, C).
    """

    packed: PackedFormat
    fields: Fields
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.fields["packed"].device

    def unpack(self, out_RC: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The values of the outputs from ``first`` on, as many as ``out_RC`` has rows, in its dtype; returns it."""
        codec, step = CODECS[self.packed.codec], max(8, _STRETCH // self.shape[1] // 8 * 8)
        for at in range(0, len(out_RC), step):
            codec.unpack(self.packed, self.fields, out_RC[at : at + step], first + at)
        return out_RC


def packed_parts(packed: PackedFormat, part: Part) -> Iterator[Part]:
    """The parts that a matrix is read by instead of one of floats.

    Args:
        part: as it were unpacked; its last two dimensions are R and C.
    """
    if part.whole is not None and len(part.shape) == 3:
        yield from _stacked_parts(packed, part)
        return
    rows, columns = part.shape[-2:]
    module = part.tensor.removesuffix(_WEIGHT)
    number = part.into // (rows * columns)
    for field in CODECS[packed.codec].fields(packed, rows, columns):
        of = None if part.of is None else (prod(part.of) // (rows * columns), *field.shape)
        yield Part(
            role=f"{part.role}{SEPARATOR}{field.name}",
            tensor=f"{module}.{field.suffix}",
            shape=field.shape,
            of=of,
            into=number * prod(field.shape),
            dtypes=field.dtypes,
        )


def _stacked_parts(packed: PackedFormat, part: Part) -> Iterator[Part]:
    """Matrices of experts that lie one behind the other in two tensors, as gpt-oss has them in MXFP4 (`integrations/mxfp4.py` of
    transformers): numbers ``[E, R, C / 32, 16]`` and scales ``[E, R, C / 32]``.

    Raises:
        DataError: in another format.
    """
    if packed.method != "mxfp4" or part.whole is None:
        raise DataError(
            f"{part.tensor} has the matrices of all experts, which is read in mxfp4 and not in {packed.method}"
        )
    count, rows, columns = part.shape
    for field, suffix in zip(CODECS["mxfp4"].fields(packed, rows, columns), ("blocks", "scales")):
        groups = (part.whole[0], rows, columns // packed.columns)
        yield Part(
            role=f"{part.role}{SEPARATOR}{field.name}",
            tensor=f"{part.tensor}_{suffix}",
            shape=(count, *field.shape),
            first_element=part.first_element // (rows * columns) * prod(field.shape),
            whole=(*groups, packed.columns // 2) if suffix == "blocks" else groups,
            dtypes=field.dtypes,
        )


def is_packed(role: str) -> bool:
    """Whether a tensor of this role is a field of a packed matrix."""
    return SEPARATOR in role


def fields_of(tensors: Mapping[str, torch.Tensor], role: str) -> dict[str, torch.Tensor]:
    """The fields of a role's one packed matrix."""
    start = f"{role}{SEPARATOR}"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
