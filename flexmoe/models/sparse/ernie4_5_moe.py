"""ERNIE-4.5: softmax routing with a correction, shared experts, neighbours of a head's dimensions rotated together."""

from collections.abc import Mapping
from typing import Any

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names
from flexmoe.models.common.router import Router, Routing


class Ernie45Moe(Decoder):
    """ERNIE-4.5-21B-A3B, 300B-A47B and every other text config of its family."""

    names = Names(
        correction="mlp.moe_statics.e_score_correction_bias",
        packed_correction="mlp.gate.moe_statics.e_score_correction_bias",
        correction_rank=2,
    )

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """The sum of a token's weights is taken to be at least ``moe_norm_min``."""
        least = config.get("moe_norm_min")
        return Router(top_k=self.arch.top_k, least_sum=1e-12 if least is None else float(least))
