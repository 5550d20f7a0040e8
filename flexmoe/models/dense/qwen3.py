"""Qwen3 without experts: Llama with heads that are normed."""

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names


class Qwen3(Decoder):
    """Qwen3 0.6B to 32B and every other config of its family."""

    names = Names()
