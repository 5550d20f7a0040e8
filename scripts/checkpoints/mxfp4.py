"""Experts of gpt-oss as its checkpoints on the hub have them: blocks of 32 numbers of 4 bits with a power of two each.

The numbers are random ones, decided by seed and name alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch

from flexmoe.errors import UsageError

#: What the config says of itself, and of the weights that are not packed.
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
_BLOCK = 32
_BLOCKS, _SCALES = "_blocks", "_scales"
#: Root of the mean square of the sixteen numbers, and what the exponent 0 is stored as.
_NUMBERS_RMS, _BIAS = 2.93, 127


def packed_shapes(shapes: Mapping[str, tuple[int, ...]], model_type: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors with blocks and scales in the place of the experts' matrices ``[E, inputs, outputs]``.

    Raises:
        UsageError: another family, or inputs that blocks do not divide.
    """
    if model_type != "gpt_oss":
        raise UsageError(
            f"only gpt_oss has experts in MXFP4 of its own, not {model_type}: `flexmoe.quantize` packs others"
        )
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if not name.endswith("_proj") or ".experts." not in name:
            found[name] = shape
            continue
        experts, inputs, outputs = shape
        if inputs % _BLOCK:
            raise UsageError(f"{inputs} inputs of {name} are not whole blocks of {_BLOCK}")
        found[name + _BLOCKS] = experts, outputs, inputs // _BLOCK, _BLOCK // 2
        found[name + _SCALES] = experts, outputs, inputs // _BLOCK
    return found


def packed_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random blocks, or scales that give the matrix a standard deviation of about 1/sqrt(inputs): uint8."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if name.endswith(_BLOCKS):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    exponent = _BIAS + math.floor(-math.log2(_NUMBERS_RMS * math.sqrt(shape[-1] * _BLOCK)))
    return torch.randint(exponent, exponent + 2, shape, dtype=torch.uint8, generator=generator)
