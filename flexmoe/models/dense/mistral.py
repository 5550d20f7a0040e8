"""Mistral: Llama with a window."""

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names


class Mistral(Decoder):
    """Mistral 7B and every other Mistral config."""

    names = Names()
