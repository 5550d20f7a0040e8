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
        config = config or {}
        if arch.top_k != 2:
            raise DataError(f"num_experts_per_tok is {arch.top_k}, but sparsemixer routes every token to exactly 2")
        self._jitter = _number(config, "router_jitter_noise", 0.01)
        self._long = _long_rope(arch, config)
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

    def route(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparsemixer (Liu et al. 2023) without its sampling: the two best experts, each weighted among its near equals."""
        scores_TE = logits_TE.float()
        first_T1, weight_T1 = self._best(scores_TE, scores_TE)
        rest_TE = scores_TE.scatter(-1, first_T1, float("-inf"))
        second_T1, next_weight_T1 = self._best(rest_TE, scores_TE)
        return torch.cat([first_T1, second_T1], dim=-1), torch.cat([weight_T1, next_weight_T1], dim=-1)

    def norm(self, x: torch.Tensor, w: Weights, role: str) -> torch.Tensor:
        """LayerNorm with a bias."""
        return F.layer_norm(x, x.shape[-1:], w[role], w[f"{role}_bias"], self.arch.norm_eps)

    def _best(self, candidates_TE: torch.Tensor, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best candidate, and its softmax weight among those that are within 2·jitter of it, relatively."""
        best_T1, expert_T1 = candidates_TE.max(dim=-1, keepdim=True)
        distance_TE = (best_T1 - scores_TE) / scores_TE.abs().clamp(min=best_T1)
        near_TE = candidates_TE.masked_fill(distance_TE > 2 * self._jitter, float("-inf"))
        return expert_T1, torch.softmax(near_TE, dim=-1).gather(-1, expert_T1)


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
