"""What the weights of a model can be packed in on request, and its shape then. No torch.

`flexmoe.quantizing` writes checkpoints of these formats; planner and runtime count their bytes from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import gcd
from types import MappingProxyType

from cost_model.model.arch import ModelArch
from cost_model.model.packed_format import KINDS, PackedFormat
from policies.common.errors import InfeasibleError, UsageError
from policies.common.option_names import option

_METHOD = "compressed-tensors"
#: Families whose gate and up, or queries, keys and values, are one tensor on the hub: it cannot be packed apart.
TOGETHER = frozenset(("gpt_oss", "granitemoe", "phi3"))
#: Formats of integers have groups of the first of these that every width is a multiple of.
GROUPS = (128, 64, 32)
#: As `flexmoe.quantize` writes them; integers in groups of the first of `GROUPS`.
FORMATS: Mapping[str, PackedFormat] = MappingProxyType(
    {
        "int4": PackedFormat(method=_METHOD, codec="integer", bits=4, columns=GROUPS[0]),
        "int8": PackedFormat(method=_METHOD, codec="integer", bits=8, columns=GROUPS[0]),
        "fp8": PackedFormat(method=_METHOD, codec="fp8", bits=8),
        "mxfp4": PackedFormat(method=_METHOD, codec="mxfp4", bits=4, columns=32, scale_bytes=1),
    }
)


def standard_group(arch: ModelArch, format: str) -> int:
    """Inputs that share a scale where nothing else is asked for; 0: all of an output.

    Where no group fits it is the largest: `check_group` says what is wrong with it.
    """
    columns = FORMATS[format].columns
    if FORMATS[format].codec != "integer":
        return columns
    return next((size for size in GROUPS if all(width % size == 0 for width in _widths(arch))), columns)


def check_group(arch: ModelArch, format: str, columns: int) -> None:
    """Shows that the inputs of every matrix are a multiple of what shares a scale; no format has shorter groups.

    Raises:
        UsageError: they are not; the sentence has what fits.
    """
    uneven = sorted(width for width in _widths(arch) if columns and width % columns)
    if not uneven:
        return
    common = gcd(*_widths(arch))
    fitting = [size for size in range(32, min(common, 256) + 1, 32) if common % size == 0]
    choice = f"{option('group_size')} can be {', '.join(map(str, fitting))}" if fitting else "fp8 needs no groups"
    if format == "mxfp4":
        choice = "int4, int8 and fp8 take other widths"
    raise UsageError(
        f"the model has matrices of {' and '.join(map(str, uneven))} inputs, which are no multiple of the {columns} that "
        f"share a scale: {choice}"
    )


def check_apart(arch: ModelArch) -> None:
    """Shows that the matrices of a model can be packed one by one.

    Raises:
        UsageError: some lie together.
    """
    if arch.model_type in TOGETHER:
        raise UsageError(f"matrices of {arch.model_type} lie together in one tensor, which cannot be packed apart")


def check_unpacked(arch: ModelArch, format: str | None) -> None:
    """Shows that the weights of a model can be packed, where that is asked for.

    Args:
        format: that is asked for; None: none is.

    Raises:
        UsageError: they are packed already.
    """
    if format is not None and arch.packed is not None:
        raise UsageError(
            f"{option('compress_weight', format)} packs 16-bit weights, and those of {arch.name or 'the model'} are packed "
            f"already, in {arch.packed.describe()}: leave it out, or give the original checkpoint"
        )


def packed_as(arch: ModelArch, format: str | None) -> ModelArch:
    """The shape under a policy's ``compress_weight``: with its matrices in that format, or as it is where they are already.

    Raises:
        InfeasibleError: they are packed in another format.
        UsageError: the format has no group that fits the widths, or matrices lie together.
    """
    if format is None or (arch.packed is not None and arch.packed.name == format):
        return arch
    if arch.packed is not None:
        raise InfeasibleError(
            f"the policy is for weights in {format}, and those of {arch.name or 'the model'} are packed in "
            f"{arch.packed.describe()}: give the original checkpoint, or a policy for this one"
        )
    return _packed(arch, format)


@lru_cache(maxsize=64)
def _packed(arch: ModelArch, format: str) -> ModelArch:
    check_apart(arch)
    group = standard_group(arch, format)
    check_group(arch, format, group)
    kinds = tuple(kind for kind in KINDS if kind != "dense" or arch.dense_layers or arch.shared_ffn)
    return replace(arch, packed=replace(FORMATS[format], columns=group, kinds=kinds))


def _widths(arch: ModelArch) -> set[int]:
    """Inputs of the matrices that are packed."""
    return {arch.hidden, arch.num_heads * arch.head_dim, arch.ffn, arch.dense_ffn, arch.shared_ffn} - {0}
