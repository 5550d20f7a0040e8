"""How matrices of linear layers lie packed in a checkpoint: which of them, in what, and their bytes. No torch.

A checkpoint says so in the `quantization_config` of its `config.json`. Methods differ in how numbers are packed, which
`flexmoe.formats` knows; bytes follow from the few numbers that are here. Sources: `utils/quantization_config.py` of
transformers, `config/format.py` of compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies.common.errors import DataError

#: Kinds of units whose matrices may be packed; embedding, head, router and norms are not.
KINDS = ("attention", "expert", "dense")
_WORD_BITS = 32
_COMPRESSED = "compressed-tensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """Matrices whose numbers take fewer bits than a float, with a scale for each group of them.

    Args:
        method: ``quant_method`` of the config, which names the tensors.
        codec: how numbers are packed: ``fp8``, ``integer``, ``mxfp4``, ``gptq`` or ``awq``.
        bits: of a packed number.
        rows, columns: of the outputs and the inputs that share a scale; 0 is all of them.
        scale_bytes: of a scale.
        zeros: each group has a zero point, too, packed like the numbers.
        zero_shift: what is added to a stored zero point.
        kinds: units whose matrices are packed; the others' are as in any checkpoint.
    """

    method: str
    codec: str
    bits: int
    rows: int = 1
    columns: int = 0
    scale_bytes: int = 2
    zeros: bool = False
    zero_shift: int = 0
    kinds: tuple[str, ...] = KINDS

    @property
    def name(self) -> str:
        """For people, and what a machine's rates are named by."""
        return self.codec if self.codec in ("fp8", "mxfp4") else f"int{self.bits}"

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        """(groups of outputs, groups of inputs) of a matrix."""
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a matrix of so many outputs and inputs: numbers, scales, zero points."""
        of_rows, of_columns = self.groups(rows, columns)
        scales = of_rows * of_columns * self.scale_bytes
        if self.codec in ("gptq", "awq"):
            numbers = _words(columns, self.bits) * rows if self.codec == "gptq" else columns * _words(rows, self.bits)
            return 4 * numbers + scales + 4 * of_columns * _words(rows, self.bits)
        if self.codec == "integer":
            zeros = 4 * _words(of_rows, self.bits) * of_columns if self.zeros else 0
            return 4 * rows * _words(columns, self.bits) + scales + zeros
        return rows * -(-columns * self.bits // 8) + scales

    def describe(self) -> str:
        """What is packed how, for reports."""
        group = f" in groups of {self.columns}" if self.columns else ""
        return f"{self.name}{group} ({', '.join(self.kinds)})"


def packed_format(config: Mapping[str, Any], modules: Mapping[str, Sequence[str]]) -> PackedFormat | None:
    """What a parsed `config.json` says of packed matrices; None where nothing is packed.

    Args:
        modules: names of the modules of each of `KINDS`, and those of ``head`` and ``router``.

    Raises:
        DataError: a method, or a variant of one, that is not read; the sentence names it and what is.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise DataError(f"quantization_config is {type(found).__name__}; it must be a JSON object.")
    method = found.get("quant_method")
    if method is None and "config_groups" in found:
        method = _COMPRESSED
    if not isinstance(method, str) or method not in _METHODS:
        raise _refusal(f"the quantization method {method!r} is not read")
    return _METHODS[method](found, modules)


def _fp8(config: Mapping[str, Any], modules: Mapping[str, Sequence[str]]) -> PackedFormat:
    block = _sizes(config.get("weight_block_size"))
    if block is None:
        raise _refusal(
            f"fp8 with weight_block_size {config.get('weight_block_size')!r} is not read, but blocks of two sizes are"
        )
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _refusal(f"fp8 with fmt {config['fmt']!r} is not read, but e4m3 is")
    rows, columns = block
    return PackedFormat(
        method="fp8",
        codec="fp8",
        bits=8,
        rows=rows,
        columns=columns,
        scale_bytes=4,
        kinds=_left(config, modules, _matches),
    )


def _mxfp4(config: Mapping[str, Any], modules: Mapping[str, Sequence[str]]) -> PackedFormat:
    return PackedFormat(
        method="mxfp4", codec="mxfp4", bits=4, columns=32, scale_bytes=1, kinds=_left(config, modules, _matches)
    )


def _gptq(config: Mapping[str, Any], modules: Mapping[str, Sequence[str]]) -> PackedFormat:
    bits, group = _bits(config, "bits", "gptq"), _group(config, "gptq")
    if config.get("desc_act", False) and group:
        raise _refusal("gptq with desc_act (activation order) is not read, but columns in order are")
    if config.get("dynamic"):
        raise _refusal("gptq with a `dynamic` table of modules is not read")
    layout = config.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise _refusal(f"gptq with checkpoint_format {layout!r} is not read, but gptq and gptq_v2 are")
    kinds = _left(config, modules, _matches, beside=("head", "router"))
    return PackedFormat(
        method="gptq",
        codec="gptq",
        bits=bits,
        columns=group,
        zeros=True,
        zero_shift=1 if layout == "gptq" else 0,
        kinds=kinds,
    )


def _awq(config: Mapping[str, Any], modules: Mapping[str, Sequence[str]]) -> PackedFormat:
    bits, group = _bits(config, "bits", "awq", (4,)), _group(config, "awq")
    version = config.get("version", config.get("format", "gemm"))
    if str(version).lower() != "gemm":
        raise _refusal(f"awq with version {version!r} is not read, but gemm is")
    if config.get("zero_point", True) is not True:
        raise _refusal("awq without zero points is not read")
    kinds = _left(config, modules, _matches, beside=("head", "router"))
    return PackedFormat(method="awq", codec="awq", bits=bits, columns=group, zeros=True, kinds=kinds)


def _compressed_tensors(config: Mapping[str, Any], modules: Mapping[str, Sequence[str]]) -> PackedFormat:
    groups, layout = config.get("config_groups"), config.get("format")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise _refusal("compressed-tensors with several config_groups is not read, but one is")
    (scheme,) = groups.values()
    weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(weights, Mapping) or scheme.get("targets") != ["Linear"]:
        raise _refusal("compressed-tensors is read with `weights` of the target Linear alone")
    layout = scheme.get("format") or layout
    kinds = _left(config, modules, _is_ignored, key="ignore")
    if layout == "pack-quantized" and weights.get("type", "int") == "int":
        return _packed_integers(weights, kinds)
    if layout in ("float-quantized", "naive-quantized") and weights.get("type") == "float":
        return _floats(weights, kinds)
    if layout == "mxfp4-pack-quantized":
        return PackedFormat(method=_COMPRESSED, codec="mxfp4", bits=4, columns=32, scale_bytes=1, kinds=kinds)
    raise _refusal(
        f"compressed-tensors with format {layout!r} is not read, but pack-quantized, float-quantized and "
        "mxfp4-pack-quantized are"
    )


def _packed_integers(weights: Mapping[str, Any], kinds: tuple[str, ...]) -> PackedFormat:
    bits, strategy = _bits(weights, "num_bits", "pack-quantized"), weights.get("strategy")
    if weights.get("actorder") not in (None, "weight", "static", False):
        raise _refusal(f"pack-quantized with actorder {weights['actorder']!r} is not read")
    if strategy not in ("group", "channel"):
        raise _refusal(f"pack-quantized with the strategy {strategy!r} is not read, but group and channel are")
    columns = _group(weights, "pack-quantized") if strategy == "group" else 0
    return PackedFormat(
        method=_COMPRESSED,
        codec="integer",
        bits=bits,
        columns=columns,
        zeros=not weights.get("symmetric", True),
        kinds=kinds,
    )


def _floats(weights: Mapping[str, Any], kinds: tuple[str, ...]) -> PackedFormat:
    strategy, block = weights.get("strategy"), _sizes(weights.get("block_structure"))
    if weights.get("num_bits") != 8 or weights.get("symmetric", True) is not True:
        raise _refusal("float-quantized weights are read with 8 bits, without zero points")
    if strategy == "block" and block is not None:
        return PackedFormat(method=_COMPRESSED, codec="fp8", bits=8, rows=block[0], columns=block[1], kinds=kinds)
    if strategy not in ("tensor", "channel"):
        raise _refusal(f"float-quantized with the strategy {strategy!r} is not read, but tensor, channel and block are")
    return PackedFormat(method=_COMPRESSED, codec="fp8", bits=8, rows=0 if strategy == "tensor" else 1, kinds=kinds)


_METHODS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Sequence[str]]], PackedFormat]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    _COMPRESSED: _compressed_tensors,
}


def _left(
    config: Mapping[str, Any],
    modules: Mapping[str, Sequence[str]],
    is_named: Callable[[str, str], bool],
    key: str = "modules_to_not_convert",
    beside: Iterable[str] = (),
) -> tuple[str, ...]:
    """The kinds that are packed: those that the list of exceptions does not name.

    Args:
        beside: what the method leaves out without being told.
    """
    patterns = config.get(key) or []
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        raise DataError(f"{key} of quantization_config is {patterns!r}; it must be a list of names.")
    kinds = []
    for kind, names in modules.items():
        left = [name for name in names if any(is_named(name, pattern) for pattern in patterns)]
        if left and len(left) < len(names):
            raise _refusal(f"{key} names some modules like {left[0]} and leaves others, which is not read")
        if not left and kind not in beside:
            if kind not in KINDS:
                raise _refusal(f"the {kind} is packed, too, which is not read")
            kinds.append(kind)
    return tuple(kinds)


def _matches(name: str, pattern: str) -> bool:
    """As transformers' `should_convert_module`: from the beginning, at the end, or whole parts in between."""
    return _begins(pattern, name) or name.endswith(pattern) or f".{pattern}." in f".{name}."


def _is_ignored(name: str, pattern: str) -> bool:
    """As compressed-tensors' `match_name`."""
    return _begins(pattern[3:], name) if pattern.startswith("re:") else name == pattern


def _begins(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False


def _bits(config: Mapping[str, Any], key: str, method: str, known: tuple[int, ...] = (4, 8)) -> int:
    bits = config.get(key)
    if type(bits) is not int or bits not in known:
        raise _refusal(f"{method} with {bits!r} bits is not read, but {' and '.join(map(str, known))} are")
    return bits


def _group(config: Mapping[str, Any], method: str) -> int:
    size = config.get("group_size")
    if size == -1:
        return 0
    if type(size) is not int or size < 1:
        raise _refusal(f"{method} with group_size {size!r} is not read")
    return size


def _sizes(values: Any) -> tuple[int, int] | None:
    """Two sizes, or None."""
    if not isinstance(values, list | tuple) or len(values) != 2 or not all(type(v) is int and v > 0 for v in values):
        return None
    return values[0], values[1]


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // _WORD_BITS)


def _refusal(what: str) -> DataError:
    return DataError(
        f"config.json has a quantization_config that cannot be run: {what}. Read are fp8 in blocks, mxfp4, "
        "compressed-tensors (pack-quantized, float-quantized, mxfp4-pack-quantized), gptq and awq; or use the original "
        "checkpoint"
    )
