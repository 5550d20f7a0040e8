"""Granite 3 MoE: Mixtral with four multipliers, its experts stacked on the hub, a softmax of the chosen experts."""

from collections.abc import Mapping
from typing import Any

from cost_model.model.arch import ModelArch
from flexmoe.models.common.decoder import Decoder, Multipliers
from flexmoe.models.common.names import Names
from flexmoe.models.common.router import SOFTMAX_OF_CHOSEN, Router, Routing


class GraniteMoe(Decoder):
    """Granite 3.0 and 3.1 1B-A400M and 3B-A800M, and every other GraniteMoe config."""

    names = Names(
        router="block_sparse_moe.router.layer.weight",
        gate_up="block_sparse_moe.input_linear.weight",
        down="block_sparse_moe.output_linear.weight",
        packed_router="block_sparse_moe.router.weight",
        packed_gate_up="block_sparse_moe.experts.gate_up_proj",
        packed_down="block_sparse_moe.experts.down_proj",
    )

    def __init__(self, arch: ModelArch, config: Mapping[str, Any] | None = None):
        super().__init__(arch, config)
        values = config or {}
        self.multipliers = Multipliers(
            embedding=float(values.get("embedding_multiplier") or 1.0),
            attention=float(values.get("attention_multiplier") or 1.0),
            residual=_residual(values),
            logits=1.0 / float(values.get("logits_scaling") or 1.0),
        )

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """What the experts add to the residual stream is scaled as what attention adds."""
        return Router(top_k=self.arch.top_k, score=SOFTMAX_OF_CHOSEN, scale=_residual(config))


def _residual(config: Mapping[str, Any]) -> float:
    return float(config.get("residual_multiplier") or 1.0)
