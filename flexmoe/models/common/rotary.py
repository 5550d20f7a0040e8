"""Rotary embedding (Su et al. 2021): by what angle each position turns each pair of a head's dimensions.

Legend: T tokens, Dh dimensions of a head that are turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cost_model.model.arch import ModelArch
from cost_model.model.config_fields import rope_type, rope_values
from flexmoe.errors import DataError
from flexmoe.kernels.family import Rope
from flexmoe.models.common.yarn import yarn


@dataclass(frozen=True, slots=True, eq=False)
class Angles:
    """How positions are turned.

    Args:
        frequencies: float32 ``[Dh / 2]``, the angle of each pair of dimensions from one position to the next.
        scale: factor on cosine and sine.
    """

    frequencies: torch.Tensor
    scale: float = 1.0


class Rotary:
    """The rotary embedding of a model.

    Args:
        short: of all rows, or of those of up to ``switch`` tokens.
        long: of longer rows (LongRoPE, Ding et al. 2024); None: there is no other.
        switch: as in `ModelArch.rope_switch`.
    """

    def __init__(self, short: Angles, long: Angles | None = None, switch: int = 0):
        self._short, self._long, self._switch = short, long or short, switch
        self._frequencies: dict[torch.device, torch.Tensor] = {}  # [2, Dh / 2]

    @classmethod
    def of(cls, arch: ModelArch, config: Mapping[str, Any]) -> Rotary:
        """As a config asks for it.

        Raises:
            DataError: a LongRoPE is incomplete.
        """
        values = rope_values(config)
        if arch.rope_switch is not None and rope_type(values) != "default":
            return cls(_longrope(arch, values, "short"), _longrope(arch, values, "long"), arch.rope_switch)
        return cls(SCALINGS[rope_type(values)](periods(arch), arch, values))

    def __call__(self, positions_T: torch.Tensor, lengths_T: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Cosine and sine ``[T, 1, Dh]`` of the positions, on their device; computed in float32, then rounded.

        Args:
            positions_T: place of each token in its row.
            lengths_T: length of the row of each token.
            dtype: of the result.
        """
        device = positions_T.device
        if device not in self._frequencies:
            both = torch.stack([self._short.frequencies, self._long.frequencies])
            self._frequencies[device] = both.to(device)
        short, long = self._frequencies[device]
        if self._long is self._short:
            return _turned(positions_T, short, dtype, self._short.scale)
        is_long_T1 = (lengths_T > self._switch)[:, None]
        scale_T11 = torch.where(is_long_T1, self._long.scale, self._short.scale)[:, None]
        return _turned(positions_T, torch.where(is_long_T1, long, short), dtype, scale_T11)


def periods(arch: ModelArch) -> torch.Tensor:
    """Float32 ``[Dh / 2]``: the powers of the base (Su et al. 2021, equation 15)."""
    size = arch.rotary_dim or arch.head_dim
    return arch.rope_theta ** (torch.arange(0, size, 2).float() / size)


def _default(periods: torch.Tensor, arch: ModelArch, values: Mapping[str, Any]) -> Angles:
    return Angles(1.0 / periods)


def _linear(periods: torch.Tensor, arch: ModelArch, values: Mapping[str, Any]) -> Angles:
    """Positions closer together (Chen et al. 2023)."""
    return Angles(1.0 / periods / values["factor"])


def _llama3(periods: torch.Tensor, arch: ModelArch, values: Mapping[str, Any]) -> Angles:
    """Long wavelengths are stretched, short ones stay, those between are blended (transformers, `modeling_rope_utils`)."""
    factor, low, high = values["factor"], values["low_freq_factor"], values["high_freq_factor"]
    context, frequencies = values["original_max_position_embeddings"], 1.0 / periods
    waves = 2 * math.pi / frequencies
    blend = ((context / waves - low) / (high - low)).clamp(0.0, 1.0)
    return Angles((1 - blend) * frequencies / factor + blend * frequencies)


def _dynamic(periods: torch.Tensor, arch: ModelArch, values: Mapping[str, Any]) -> Angles:
    """Hunyuan's: the base is stretched by a fixed ``alpha``."""
    size = 2 * len(periods)
    base = arch.rope_theta * _number(values, "alpha") ** (size / (size - 2))
    return Angles(1.0 / base ** (torch.arange(0, size, 2).float() / size))


def _yarn(periods: torch.Tensor, arch: ModelArch, values: Mapping[str, Any]) -> Angles:
    return Angles(*yarn(periods, arch.rope_theta, arch.max_position, values))


#: Angles from the periods of the plain embedding, the shape and what the config says, by type. A type is known where a family
#: names it in `cost_model.model`.
SCALINGS: Mapping[str, Callable[[torch.Tensor, ModelArch, Mapping[str, Any]], Angles]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "dynamic": _dynamic,
    "yarn": _yarn,
}


def _longrope(arch: ModelArch, values: Mapping[str, Any], which: str) -> Angles:
    own = periods(arch)
    factors = torch.tensor(_factors(values, f"{which}_factor", len(own)))
    return Angles(1.0 / (factors * own), _longrope_scale(arch, values, which))


def _longrope_scale(arch: ModelArch, values: Mapping[str, Any], which: str) -> float:
    """As the config says for either set, or for both, or by how much longer the context has become."""
    for field in (f"{which}_mscale", "attention_factor"):
        if values.get(field) is not None:
            return _number(values, field)
    original = arch.rope_switch or arch.max_position
    factor = _number(values, "factor", arch.max_position / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _factors(values: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    found = values.get(name)
    if not isinstance(found, list) or len(found) != count or not all(_is_number(x) and x > 0 for x in found):
        raise DataError(f"{name} of the config's rope scaling is {found!r}; it must list {count} positive numbers")
    return tuple(float(x) for x in found)


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    found: Any = default if values.get(name) is None else values[name]
    if not _is_number(found):
        raise DataError(f"{name} of the config's rope scaling is {found!r}; it must be a number")
    return float(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _turned(
    positions_T: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype, scale: float | torch.Tensor
) -> Rope:
    """Cosine and sine of positions turned by ``frequencies``, ``[Dh / 2]`` or one row per token."""
    angles = positions_T.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
