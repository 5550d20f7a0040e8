"""MiniMax-M2: sigmoid routing with a correction, queries and keys normed over all heads, half of each head rotated."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.router import SIGMOID, Router, Routing
from flexmoe.models.sparse.mixtral import Mixtral


class MiniMaxM2(Decoder):
    """MiniMax-M2 and every other config of its family."""

    names = replace(
        Mixtral.names,
        correction="block_sparse_moe.e_score_correction_bias",
        packed_correction="mlp.e_score_correction_bias",
    )

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """The best sigmoids, which are made to add up to one."""
        return Router(top_k=self.arch.top_k, score=SIGMOID)
