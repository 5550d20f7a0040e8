"""Model families. A new family is one file in `sparse` or `dense` and one entry below, and its shape in `cost_model.model`."""

from collections.abc import Mapping
from typing import Any

from cost_model.model.arch import ModelArch
from flexmoe.models.common.decoder import Decoder
from flexmoe.models.dense.llama import Llama
from flexmoe.models.dense.mistral import Mistral
from flexmoe.models.dense.phi3 import Phi3
from flexmoe.models.dense.qwen3 import Qwen3
from flexmoe.models.sparse.dots1 import Dots1
from flexmoe.models.sparse.ernie4_5_moe import Ernie45Moe
from flexmoe.models.sparse.glm4_moe import Glm4Moe
from flexmoe.models.sparse.gpt_oss import GptOss
from flexmoe.models.sparse.granitemoe import GraniteMoe
from flexmoe.models.sparse.hunyuan_v1_moe import HunyuanV1Moe
from flexmoe.models.sparse.minimax_m2 import MiniMaxM2
from flexmoe.models.sparse.mixtral import Mixtral
from flexmoe.models.sparse.olmoe import Olmoe
from flexmoe.models.sparse.phimoe import Phimoe
from flexmoe.models.sparse.qwen2_moe import Qwen2Moe
from flexmoe.models.sparse.qwen3_moe import Qwen3Moe

FAMILIES: Mapping[str, type[Decoder]] = {
    "mixtral": Mixtral,
    "phimoe": Phimoe,
    "qwen3_moe": Qwen3Moe,
    "qwen2_moe": Qwen2Moe,
    "olmoe": Olmoe,
    "glm4_moe": Glm4Moe,
    "dots1": Dots1,
    "minimax_m2": MiniMaxM2,
    "ernie4_5_moe": Ernie45Moe,
    "granitemoe": GraniteMoe,
    "hunyuan_v1_moe": HunyuanV1Moe,
    "gpt_oss": GptOss,
    "llama": Llama,
    "mistral": Mistral,
    "qwen3": Qwen3,
    "phi3": Phi3,
}


def family(arch: ModelArch, config: Mapping[str, Any] | None = None) -> Decoder:
    """The family object for a shape.

    Args:
        arch: the shape.
        config: the parsed `config.json`, where there is one.

    Raises:
        DataError: the config asks the family for something that it does not do.
    """
    return FAMILIES[arch.model_type](arch, config)
