"""gpt-oss: sinks and windows in attention, YaRN, experts with biases whose gate and up alternate and are clamped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cost_model.model.arch import ModelArch
from cost_model.model.families import GPT_OSS_YARN
from flexmoe.kernels.expert_weights import ExpertProducts
from flexmoe.kernels.family import Rope, Weights
from flexmoe.models.decoder import Decoder, rotation
from flexmoe.models.names import Names
from flexmoe.models.router import SOFTMAX_OF_CHOSEN, Router, Routing
from flexmoe.models.yarn import yarn


class GptOss(Decoder):
    """gpt-oss-20b, 120b and every other gpt-oss config."""

    names = Names(packed_router="mlp.router.weight", stacked_only=True)

    def __init__(self, arch: ModelArch, config: Mapping[str, Any] | None = None):
        super().__init__(arch, config)
        config = config or {}
        self._limit, self._alpha = config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)
        self._yarn = config.get("rope_parameters") or config.get("rope_scaling") or GPT_OSS_YARN

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """The best experts by logit, weighted by the softmax of their logits."""
        return Router(top_k=self.arch.top_k, score=SOFTMAX_OF_CHOSEN)

    def rope(self, positions_T: torch.Tensor, lengths_T: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Cosine and sine ``[T, 1, Dh]``, by YaRN unless the config asks for the plain embedding."""
        periods = self.rope_periods(torch.device("cpu"))
        frequencies, scale = 1.0 / periods, 1.0
        if self._yarn.get("rope_type", self._yarn.get("type")) == "yarn":
            frequencies, scale = yarn(periods, self.arch.rope_theta, self.arch.max_position, self._yarn)
        return rotation(positions_T, frequencies.to(positions_T.device), dtype, scale)

    def feed_forward(self, x_nD: torch.Tensor, w: ExpertProducts) -> torch.Tensor:
        """Output ``[n, D]``; gate and up are clamped, and up is raised by one."""
        gate_nF, up_nF = w.gate_up(x_nD)
        gate_nF, up_nF = gate_nF.clamp(max=self._limit), up_nF.clamp(-self._limit, self._limit)
        return w.down(torch.sigmoid(gate_nF * self._alpha).mul_(gate_nF).mul_(up_nF.add_(1)))

    def norm(self, x: torch.Tensor, w: Weights, role: str) -> torch.Tensor:
        """RMSNorm in float32, whose weight is applied before rounding."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.arch.norm_eps)
        return (w[role].float() * wide).to(x.dtype)
