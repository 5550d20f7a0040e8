"""Hunyuan-A13B: softmax routing, a shared expert, and heads that are normed after they are rotated."""

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names


class HunyuanV1Moe(Decoder):
    """Hunyuan-A13B and every other config of its family."""

    names = Names(
        router="mlp.gate.wg.weight",
        packed_router="mlp.gate.wg.weight",
        shared="mlp.shared_mlp",
        q_norm="self_attn.query_layernorm.weight",
        k_norm="self_attn.key_layernorm.weight",
    )
