"""Mixtral: routing weights of the chosen experts add up to one."""

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names


class Mixtral(Decoder):
    """Mixtral 8x7B, 8x22B and every other Mixtral config."""

    names = Names(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{}.w1.weight",
        up="block_sparse_moe.experts.{}.w3.weight",
        down="block_sparse_moe.experts.{}.w2.weight",
    )
