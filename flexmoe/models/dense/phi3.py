"""Phi-3: Llama with queries, keys and values in one matrix, gate and up in another, and LongRoPE."""

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names


class Phi3(Decoder):
    """Phi-3, Phi-3.5-mini, Phi-4 and every other Phi3 config."""

    names = Names(qkv="self_attn.qkv_proj.weight", dense_gate_up="mlp.gate_up_proj.weight")
