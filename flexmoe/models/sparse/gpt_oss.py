"""gpt-oss: sinks and windows in attention, YaRN, experts with biases whose gate and up alternate and are clamped."""

from collections.abc import Mapping
from typing import Any

import torch

from cost_model.model.arch import ModelArch
from cost_model.model.sparse_families import gpt_oss_config
from flexmoe.kernels.elementwise import clamped_gate
from flexmoe.kernels.expert_weights import ExpertProducts
from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names
from flexmoe.models.common.router import SOFTMAX_OF_CHOSEN, Router, Routing


class GptOss(Decoder):
    """gpt-oss-20b, 120b and every other gpt-oss config."""

    names = Names(
        router="mlp.router.weight",
        packed_router="mlp.router.weight",
        gate_up="mlp.experts.gate_up_proj",
        down="mlp.experts.down_proj",
    )

    norm_weight_first = True

    def __init__(self, arch: ModelArch, config: Mapping[str, Any] | None = None):
        config = gpt_oss_config(config or {})
        super().__init__(arch, config)
        self._limit, self._alpha = config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """The best experts by logit, weighted by the softmax of their logits."""
        return Router(top_k=self.arch.top_k, score=SOFTMAX_OF_CHOSEN)

    def feed_forward(self, x_nD: torch.Tensor, w: ExpertProducts) -> torch.Tensor:
        """Output ``[n, D]``; gate and up are clamped, and up is raised by one."""
        gate_nF, up_nF = w.gate_up(x_nD)
        return w.down(clamped_gate(gate_nF, up_nF, self._limit, self._alpha))
