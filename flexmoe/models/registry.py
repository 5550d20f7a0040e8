"""Model families. A new family is one file here and one entry below, and its shape in `cost_model.model.families`."""

from collections.abc import Mapping
from typing import Any

from cost_model.model.arch import ModelArch
from flexmoe.models.decoder import Decoder
from flexmoe.models.gpt_oss import GptOss
from flexmoe.models.mixtral import Mixtral
from flexmoe.models.phimoe import Phimoe
from flexmoe.models.qwen3_moe import Qwen3Moe

FAMILIES: Mapping[str, type[Decoder]] = {"gpt_oss": GptOss, "mixtral": Mixtral, "phimoe": Phimoe, "qwen3_moe": Qwen3Moe}


def family(arch: ModelArch, config: Mapping[str, Any] | None = None) -> Decoder:
    """The family object for a shape.

    Args:
        arch: the shape.
        config: the parsed `config.json`, where there is one.

    Raises:
        DataError: the config asks the family for something that it does not do.
    """
    return FAMILIES[arch.model_type](arch, config)
