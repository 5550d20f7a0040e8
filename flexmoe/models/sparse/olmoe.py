"""OLMoE: queries and keys are normed over all heads together."""

from collections.abc import Mapping
from typing import Any

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names
from flexmoe.models.common.router import Router, Routing


class Olmoe(Decoder):
    """OLMoE-1B-7B and every other OLMoE config."""

    names = Names()

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Routing weights add up to one where ``norm_topk_prob`` is set."""
        return Router(top_k=self.arch.top_k, normalized=bool(config.get("norm_topk_prob")))
