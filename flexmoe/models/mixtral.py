"""Mixtral: the weights of the chosen experts add up to one; everything else is the common decoder."""

import torch

from flexmoe.models.decoder import Decoder, best_experts
from flexmoe.models.names import Names


class Mixtral(Decoder):
    """Mixtral 8x7B, 8x22B and every other Mixtral config."""

    names = Names(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{}.w1.weight",
        up="block_sparse_moe.experts.{}.w3.weight",
        down="block_sparse_moe.experts.{}.w2.weight",
    )

    def route(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts and their weights, both ``[T, K]``."""
        return best_experts(logits_TE, self.arch.top_k, normalized=True)
