"""Qwen2-MoE: a shared expert that a gate weighs, biases of queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names
from flexmoe.models.common.router import Router, Routing


class Qwen2Moe(Decoder):
    """Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B and every other Qwen2-MoE config."""

    names = Names(shared="mlp.shared_expert")

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Routing weights add up to one where ``norm_topk_prob`` is set."""
        return Router(top_k=self.arch.top_k, normalized=bool(config.get("norm_topk_prob")))
