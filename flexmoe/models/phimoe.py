"""Phi-3.5-MoE: LayerNorm, sparsemixer routing, and a rotary embedding with two sets of factors (LongRoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cost_model.model.arch import ModelArch
from flexmoe.errors import DataError
from flexmoe.kernels.family import Rope, Weights
from flexmoe.models.decoder import Decoder, rotation
from flexmoe.models.names import Names
from flexmoe.models.router import Routing, SparseMixer


@dataclass(frozen=True, slots=True)
class _LongRope:
    """Factors on the periods, and scales of cosine and sine: the first of each pair for rows up to ``switch`` tokens."""

    switch: int
    factors: tuple[tuple[float, ...], tuple[float, ...]]
    scales: tuple[float, float]


class Phimoe(Decoder):
    """Phi-3.5-MoE and every other Phimoe config.

    Raises:
        DataError: another number of experts per token than sparsemixer chooses, or an incomplete LongRoPE.
    """

    names = Names(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{}.w1.weight",
        up="block_sparse_moe.experts.{}.w3.weight",
        down="block_sparse_moe.experts.{}.w2.weight",
        packed_router="mlp.router.weight",
    )

    def __init__(self, arch: ModelArch, config: Mapping[str, Any] | None = None):
        super().__init__(arch, config)
        self._long = _long_rope(arch, config or {})
        self._frequencies: dict[torch.device, torch.Tensor] = {}

    def rope(self, positions_T: torch.Tensor, lengths_T: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Cosine and sine ``[T, 1, Dh]``; every token is turned by the factors that the length of its row asks for."""
        if self._long is None:
            return super().rope(positions_T, lengths_T, dtype)
        device = positions_T.device
        if device not in self._frequencies:
            factors = torch.tensor(self._long.factors, device=device)
            self._frequencies[device] = 1.0 / (factors * self.rope_periods(device))
        short, long = self._frequencies[device]
        is_long_T1 = (lengths_T > self._long.switch)[:, None]
        scale_T11 = torch.where(is_long_T1, self._long.scales[1], self._long.scales[0])[:, None]
        return rotation(positions_T, torch.where(is_long_T1, long, short), dtype, scale_T11)

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Sparsemixer, which chooses two."""
        if self.arch.top_k != 2:
            raise DataError(
                f"num_experts_per_tok is {self.arch.top_k}, but sparsemixer routes every token to exactly 2"
            )
        return SparseMixer(jitter=_number(config, "router_jitter_noise", 0.01))

    def norm(self, x: torch.Tensor, w: Weights, role: str) -> torch.Tensor:
        """LayerNorm with a bias."""
        return F.layer_norm(x, x.shape[-1:], w[role], w[f"{role}_bias"], self.arch.norm_eps)


def _long_rope(arch: ModelArch, config: Mapping[str, Any]) -> _LongRope | None:
    """The LongRoPE of a config; None where its rotary embedding is the plain one."""
    if arch.rope_switch is None:
        return None
    for field in ("rope_parameters", "rope_scaling"):
        values = config.get(field) or {}
        if values.get("rope_type", values.get("type")) == "longrope":
            short, long = (_factors(values, name, arch.head_dim // 2) for name in ("short_factor", "long_factor"))
            short_scale, long_scale = (_number(values, name) for name in ("short_mscale", "long_mscale"))
            return _LongRope(arch.rope_switch, (short, long), (short_scale, long_scale))
    return None


def _factors(values: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    found = values.get(name)
    if not isinstance(found, list) or len(found) != count or not all(_is_number(x) and x > 0 for x in found):
        raise DataError(f"{name} of the config's rope scaling is {found!r}; it must list {count} positive numbers")
    return tuple(float(x) for x in found)


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    found = values.get(name, default)
    if not _is_number(found):
        raise DataError(f"{name} in the config is {found!r}; it must be a number")
    return float(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
