"""Llama: no experts; the MLP of a layer is the unit that is streamed."""

from flexmoe.models.common.decoder import Decoder
from flexmoe.models.common.names import Names


class Llama(Decoder):
    """Llama 2 and 3, CodeLlama and every other Llama config."""

    names = Names()
