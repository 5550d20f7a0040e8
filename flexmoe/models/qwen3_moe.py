"""Qwen3-MoE: heads are normed, layers may be dense, and the config says whether routing weights add up to one."""

from collections.abc import Mapping
from typing import Any

import torch

from cost_model.model.arch import ModelArch
from flexmoe.models.decoder import Decoder, best_experts
from flexmoe.models.names import Names


class Qwen3Moe(Decoder):
    """Qwen3-30B-A3B, 235B-A22B and every other Qwen3-MoE config."""

    names = Names(
        router="mlp.gate.weight",
        gate="mlp.experts.{}.gate_proj.weight",
        up="mlp.experts.{}.up_proj.weight",
        down="mlp.experts.{}.down_proj.weight",
    )

    def __init__(self, arch: ModelArch, config: Mapping[str, Any] | None = None):
        super().__init__(arch, config)
        self._normalized = bool((config or {}).get("norm_topk_prob"))

    def route(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts and their weights, both ``[T, K]``; the weights add up to one where ``norm_topk_prob`` is set."""
        return best_experts(logits_TE, self.arch.top_k, normalized=self._normalized)
