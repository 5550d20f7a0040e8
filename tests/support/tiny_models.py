"""Tiny checkpoints of further families, each with every option on that it can have, and drawn ones."""

from __future__ import annotations

import torch

from tests.support.tiny import PACKED, SHARDED, Recipe
from tests.support.tiny_families import COMMON, shake

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
DEEPSEEK = {
    "moe_intermediate_size": 24,
    "intermediate_size": 80,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "head_dim": 24,
}
#: Short and long factors of a LongRoPE that differ much, for heads of 16 dimensions of which 12 are turned.
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
}


def correct(model) -> None:
    """Norms, biases, and what routers add for the choice, are not what they are initialized to."""
    shake(model)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def _recipe(family: str, config: dict, save: dict, edit=correct) -> Recipe:
    return Recipe(config, save, edit, family, COMMON)


#: Per family a checkpoint as on the hub, and where experts can lie stacked one of those.
RECIPES = {
    "glm4": _recipe("glm4_moe", DEEPSEEK | {"attention_bias": True, "use_qk_norm": True}, SHARDED),
    "glm4-packed": _recipe(
        "glm4_moe",
        DEEPSEEK | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "partial_rotary_factor": 0.5},
        PACKED,
    ),
    "dots1": _recipe("dots1", DEEPSEEK | {"attention_bias": True, "sliding_window": None}, PACKED),
    "minimax": _recipe(
        "minimax_m2",
        {"intermediate_size": 32, "num_local_experts": 16, "num_experts_per_tok": 4, "head_dim": 24, "rotary_dim": 12},
        SHARDED,
    ),
    "minimax-packed": _recipe(
        "minimax_m2",
        {"intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
        PACKED,
    ),
    "olmoe": _recipe(
        "olmoe",
        {"intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4, "rope_parameters": LINEAR},
        SHARDED,
    ),
    "qwen2": _recipe(
        "qwen2_moe",
        {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 56,
            "intermediate_size": 80,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "mlp_only_layers": [1],
        },
        SHARDED,
    ),
    "ernie": _recipe(
        "ernie4_5_moe",
        {
            "moe_intermediate_size": 24,
            "intermediate_size": 80,
            "moe_num_experts": 12,
            "moe_k": 3,
            "moe_num_shared_experts": 2,
        },
        SHARDED,
    ),
    "ernie-packed": _recipe(
        "ernie4_5_moe",
        {
            "moe_intermediate_size": 32,
            "intermediate_size": 64,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 0,
            "tie_word_embeddings": False,
        },
        PACKED,
    ),
    "granite": _recipe(
        "granitemoe",
        {
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.11,
            "residual_multiplier": 0.4,
            "logits_scaling": 1.5,
        },
        SHARDED,
    ),
    "granite-packed": _recipe(
        "granitemoe",
        {
            "intermediate_size": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
            "attention_multiplier": 0.25,
        },
        PACKED,
    ),
    "hunyuan": _recipe(
        "hunyuan_v1_moe",
        {
            "intermediate_size": 32,
            "num_experts": 8,
            "moe_topk": 3,
            "head_dim": 24,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 100.0, "factor": 1.0},
        },
        SHARDED,
    ),
    "llama": _recipe(
        "llama",
        {"intermediate_size": 96, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        SHARDED,
    ),
    "mistral": _recipe("mistral", {"intermediate_size": 96, "sliding_window": 40, "head_dim": 24}, {}),
    "qwen3-dense": _recipe("qwen3", {"intermediate_size": 96, "head_dim": 24, "rope_parameters": LLAMA3}, SHARDED),
    "phi3": _recipe(
        "phi3",
        {"intermediate_size": 96, "pad_token_id": 0, "max_position_embeddings": 512, "rope_parameters": LONG},
        {},
    ),
}
