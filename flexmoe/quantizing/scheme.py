"""What a checkpoint is packed in: the formats by name, and how compressed-tensors says so in a `config.json`.

Sources: `quantization/quant_scheme.py` and `config/base.py` of compressed-tensors. vLLM runs experts in FP8 only where the config
names their activations, too; whoever computes with 16-bit activations, as FlexMoE does, reads past that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cost_model.model.arch import ModelArch
from cost_model.model.packing import FORMATS, standard_group
from flexmoe.errors import UsageError
from policies.common.option_names import option

#: The release of compressed-tensors whose fields these are.
_VERSION = "0.20.1"
_LAYOUTS = {
    "int4": "pack-quantized",
    "int8": "pack-quantized",
    "fp8": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """A format and its groups.

    Args:
        format: one of `cost_model.model.packing.FORMATS`.
        group: inputs that share a scale; 0: all of an output. In FP8 a block of so many inputs and outputs.

    Raises:
        UsageError: there is no such format, or it has no such groups.
    """

    format: str
    group: int

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"there is no format {self.format!r}: choose {', '.join(FORMATS)}")
        if self.format == "mxfp4" and self.group != FORMATS["mxfp4"].columns:
            raise UsageError(f"mxfp4 has groups of 32 by definition; leave {option('group_size')} away")
        if self.group < 0:
            raise UsageError(f"{option('group_size')} is {self.group}; it must be at least 1")

    @classmethod
    def of(cls, format: str, arch: ModelArch, group: int | None = None) -> Scheme:
        """For a model; None: the usual group of its widths.

        Raises:
            UsageError: there is no such format, or it has no such groups.
        """
        if group is None and format in FORMATS:
            group = standard_group(arch, format)
        return cls(format, group or 0)

    @property
    def columns(self) -> int:
        """What the inputs of a matrix must be a multiple of; compressed-tensors has no shorter groups."""
        return 1 if self.format == "fp8" else self.group or 1

    def config(self, left: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config`.

        Args:
            left: names of modules that are not packed, with ``{}`` for the number of a layer.
        """
        layout = _LAYOUTS[self.format]
        group = {
            "targets": ["Linear"],
            "weights": self._weights(),
            "input_activations": self._activations(),
            "output_activations": None,
            "format": layout,
        }
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": layout,
            "config_groups": {"group_0": group},
            "ignore": [_pattern(name) for name in left],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": _VERSION,
        }

    def _weights(self) -> dict[str, Any]:
        bits = 4 if self.format in ("int4", "mxfp4") else 8
        weights = _numbers(bits, "int" if self.format in ("int4", "int8") else "float")
        if self.format == "fp8" and self.group:
            return weights | {"strategy": "block", "block_structure": [self.group, self.group]}
        if self.format == "mxfp4":
            weights |= {"scale_dtype": "torch.uint8"}
        return weights | ({"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"})

    def _activations(self) -> dict[str, Any] | None:
        """Those of FP8: rounded when they are used, by token or by as many numbers as a block has inputs."""
        if self.format != "fp8":
            return None
        own = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "token"}
        return _numbers(8, "float") | {"dynamic": True} | own


def _numbers(bits: int, kind: str) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, "strategy": None, "group_size": None}


def _pattern(name: str) -> str:
    """As `ignore` has it: the name itself, or a regular expression for all layers."""
    if "{}" not in name:
        return name
    return "re:" + r"\d+".join(re.escape(part) for part in name.split("{}")) + "$"
