"""Qwen3-MoE: heads are normed, layers may be dense, and the config says whether routing weights add up to one."""

from collections.abc import Mapping
from typing import Any

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names
from flexmoe.models.common.router import Router, Routing


class Qwen3Moe(Decoder):
    """Qwen3-30B-A3B, 235B-A22B and every other Qwen3-MoE config."""

    names = Names()

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Routing weights add up to one where ``norm_topk_prob`` is set."""
        return Router(top_k=self.arch.top_k, normalized=bool(config.get("norm_topk_prob")))
