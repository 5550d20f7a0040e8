"""Phi-3.5-MoE: LayerNorm and sparsemixer routing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from flexmoe.errors import DataError
from flexmoe.kernels.family import Weights
from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.router import Routing, SparseMixer
from flexmoe.models.sparse.mixtral import Mixtral


class Phimoe(Decoder):
    """Phi-3.5-MoE and every other Phimoe config.

    Raises:
        DataError: another number of experts per token than sparsemixer chooses, or an incomplete LongRoPE.
    """

    names = replace(
        Mixtral.names,
        packed_router="mlp.router.weight",
    )

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """Sparsemixer, which chooses two."""
        if self.arch.top_k != 2:
            raise DataError(
                f"num_experts_per_tok is {self.arch.top_k}, but sparsemixer routes every token to exactly 2"
            )
        jitter = config.get("router_jitter_noise", 0.01)
        if isinstance(jitter, bool) or not isinstance(jitter, (int, float)):
            raise DataError(f"router_jitter_noise in the config is {jitter!r}; it must be a number")
        return SparseMixer(jitter=float(jitter))

    def norm(self, x: torch.Tensor, w: Weights, role: str) -> torch.Tensor:
        """LayerNorm with a bias."""
        return F.layer_norm(x, x.shape[-1:], w[role], w[f"{role}_bias"], self.arch.norm_eps)
