"""Shapes of synthetic checkpoints: sizes, the config of a family, and the tensors that its files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cost_model.model.arch import ModelArch
from flexmoe.errors import DataError, UsageError
from flexmoe.models.common.names import unit_parts
from flexmoe.models.registry import FAMILIES, family
from policies.units import UnitId

#: Arguments of the config of each size; one without a `model_type` is a Mixtral.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "demo": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "bench": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "qwen3-like": {
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 12,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32000,
        "norm_topk_prob": True,
    },
    "gpt-oss-like": {
        "model_type": "gpt_oss",
        "hidden_size": 1440,
        "intermediate_size": 1440,
        "num_hidden_layers": 12,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "phi-like": {
        "model_type": "phimoe",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "attention_bias": True,
        "lm_head_bias": True,
    },
}
#: What a family calls an argument, by what Mixtral calls it.
_SPELLING: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "qwen3_moe": {"num_local_experts": "num_experts", "intermediate_size": "moe_intermediate_size"},
        "qwen2_moe": {"num_local_experts": "num_experts", "intermediate_size": "moe_intermediate_size"},
        "olmoe": {"num_local_experts": "num_experts"},
        "hunyuan_v1_moe": {"num_local_experts": "num_experts"},
        "glm4_moe": {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"},
        "dots1": {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"},
        "ernie4_5_moe": {
            "num_local_experts": "moe_num_experts",
            "num_experts_per_tok": "moe_k",
            "intermediate_size": "moe_intermediate_size",
        },
    }
)
#: What the family's models on the hub have and its config's defaults have not.
_OPTIONS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "phimoe": {"attention_bias": True, "lm_head_bias": True},
        "qwen3_moe": {"norm_topk_prob": True},
        "dots1": {"n_shared_experts": 1},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A tensor of the hub's layout: its name, the unit that has it and what it is there (a role of `flexmoe.models`)."""

    name: str
    unit: UnitId
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOnDisk:
    """A tensor of a file: its shape, and the tensors of the hub's layout that it holds one after another."""

    shape: tuple[int, ...]
    matrices: dict[str, Matrix] = field(default_factory=dict)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of each of them."""
        if len(self.matrices) == 1:
            return self.shape
        return prod(self.shape[:-1]) // len(self.matrices), self.shape[-1]


def as_family(config_kwargs: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The arguments of a config of the same size in another family, which gets what its models on the hub have."""
    own = config_kwargs.get("model_type", "mixtral")
    if own == model_type:
        return dict(config_kwargs)
    neutral = {spelled: name for name, spelled in _SPELLING.get(own, {}).items()}
    left = {name: value for name, value in config_kwargs.items() if name not in _OPTIONS.get(own, ())}
    common = {neutral.get(name, name): value for name, value in left.items()}
    return with_changes({"model_type": model_type} | _OPTIONS.get(model_type, {}), common | {"model_type": model_type})


def with_changes(config_kwargs: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a config with others added or replaced, which are spelled as Mixtral's."""
    spelled = _SPELLING.get(config_kwargs.get("model_type", "mixtral"), {})
    return dict(config_kwargs) | {spelled.get(name, name): value for name, value in changes.items()}


def model_config(config_kwargs: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedConfig:
    """The config of a checkpoint.

    Args:
        config_kwargs: arguments of the family's config in transformers, and its `model_type`; without one, Mixtral's.
        dtype: of the weights.

    Raises:
        UsageError: an unknown family, or a shape that contradicts itself.
    """
    defaults = {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    kwargs = defaults | dict(config_kwargs)
    model_type = kwargs.pop("model_type", "mixtral")
    if model_type not in FAMILIES:
        raise UsageError(f"there is no family {model_type!r}: choose one of {', '.join(sorted(FAMILIES))}")
    try:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        config = AutoConfig.for_model(model_type, **kwargs, architectures=[name], dtype=dtype)
        model_arch(config)
    except (TypeError, ValueError, StrictDataclassError, DataError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise UsageError(f"no {model_type} model has this shape: {why}") from error
    return config


def tensors_on_disk(config: PreTrainedConfig, *, packed: bool = False) -> dict[str, TensorOnDisk]:
    """Every tensor of a checkpoint by name, in the order in which a sweep needs them."""
    arch, names = model_arch(config), FAMILIES[config.model_type].names
    hub, disk = (unit_parts(arch, names, packed=layout) for layout in (False, packed))
    found: dict[str, TensorOnDisk] = {}
    for unit, parts in disk.items():
        sources = [Matrix(name=part.tensor, unit=unit, role=part.role) for part in hub[unit]]
        for part in parts:
            tensor = found.setdefault(part.tensor, TensorOnDisk(shape=part.whole or part.shape))
            same = [s for s in sources if s.name == part.tensor]
            stacked = [s for s in sources if s.role == part.role]  # one expert after another
            for source in same or stacked:
                tensor.matrices.setdefault(source.name, source)  # of a shared table the embedding, not the head
    return found


def tensor_shapes(config: PreTrainedConfig, *, packed: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint by name."""
    return {name: tensor.shape for name, tensor in tensors_on_disk(config, packed=packed).items()}


def model_arch(config: PreTrainedConfig) -> ModelArch:
    """The shape of a config, with every expert a unit of its own.

    Raises:
        DataError: it contradicts itself, or asks the family for something that it does not do.
    """
    values = json.loads(config.to_json_string())
    arch = ModelArch.from_config(values).grouped(1)
    family(arch, values)
    return arch
