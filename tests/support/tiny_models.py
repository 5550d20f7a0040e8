"""Tiny checkpoints of further families, each with every option on that it can have, and drawn ones."""

from __future__ import annotations

import random
from collections.abc import Callable

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
    "dots1": _recipe(
        "dots1", DEEPSEEK | {"attention_bias": True, "sliding_window": 40, "max_window_layers": 1}, PACKED
    ),
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
            "use_sliding_window": True,
            "sliding_window": 20,
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
    "qwen3-dense": _recipe(
        "qwen3",
        {
            "intermediate_size": 96,
            "head_dim": 24,
            "rope_parameters": LLAMA3,
            "use_sliding_window": True,
            "sliding_window": 40,
            "max_window_layers": 1,
        },
        SHARDED,
    ),
    "phi3": _recipe(
        "phi3",
        {"intermediate_size": 96, "pad_token_id": 0, "max_position_embeddings": 512, "rope_parameters": LONG},
        {},
    ),
}


def drawn(seed: int) -> Recipe:
    """A random config of a random family, in a random layout."""
    rng = random.Random(seed)
    family = list(_DRAWN)[seed % len(_DRAWN)]
    kv_heads, layers = rng.randint(1, 4), rng.randint(2, 4)
    heads, head_dim = kv_heads * rng.choice((1, 2, 3)), rng.choice((8, 16, 24))
    config = COMMON | {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * head_dim,
        "vocab_size": rng.randint(200, 400),
        "tie_word_embeddings": rng.random() < 0.3,
        "pad_token_id": 0,
        "rope_parameters": rng.choice((LLAMA3, LINEAR, {"rope_type": "default", "rope_theta": rng.choice((1e4, 1e6))})),
    }
    layout = rng.choice((PACKED, SHARDED, {}, PACKED | SHARDED))
    return Recipe(config | _DRAWN[family](rng, layers), layout, correct, family, {})


def _drawn_deepseek(rng: random.Random, layers: int) -> dict:
    groups = rng.choice((1, 2, 4))
    experts = groups * rng.randint(2, 6)
    best = rng.randint(1, groups)
    return {
        "moe_intermediate_size": 8 * rng.randint(1, 5),
        "intermediate_size": 8 * rng.randint(2, 12),
        "n_routed_experts": experts,
        "num_experts_per_tok": rng.randint(1, best * experts // groups),
        "n_shared_experts": rng.randint(1, 3),
        "n_group": groups,
        "topk_group": best,
        "routed_scaling_factor": rng.choice((1.0, 2.5)),
        "norm_topk_prob": rng.random() < 0.5,
        "first_k_dense_replace": rng.randint(0, layers - 1),
        "attention_bias": rng.random() < 0.5,
        "use_qk_norm": rng.random() < 0.5,
        "head_dim": rng.choice((8, 16, 24)),
        "sliding_window": None,
    }


def _drawn_windows(rng: random.Random, layers: int) -> dict:
    """A window in all layers, in some or in none, by a number of layers or layer by layer."""
    kinds = ("sliding_attention", "full_attention")
    return {
        "use_sliding_window": rng.random() < 0.7,
        "sliding_window": rng.choice((1, 17, 20, 64)),
        "max_window_layers": rng.randint(0, layers),
    } | ({"layer_types": [rng.choice(kinds) for _ in range(layers)]} if rng.random() < 0.3 else {})


def _drawn_dots1(rng: random.Random, layers: int) -> dict:
    return _drawn_deepseek(rng, layers) | _drawn_windows(rng, layers)


def _drawn_experts(rng: random.Random) -> tuple[int, int]:
    experts = rng.randint(4, 20)
    return experts, rng.randint(1, min(6, experts))


def _drawn_minimax(rng: random.Random, layers: int) -> dict:
    experts, top_k = _drawn_experts(rng)
    head_dim = rng.choice((8, 16, 24))
    return {
        "intermediate_size": 8 * rng.randint(1, 6),
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "head_dim": head_dim,
        "rotary_dim": head_dim // rng.choice((1, 2)),
        "rope_parameters": None,
    }


def _drawn_qwen2(rng: random.Random, layers: int) -> dict:
    experts, top_k = _drawn_experts(rng)
    return {
        "moe_intermediate_size": 8 * rng.randint(1, 6),
        "shared_expert_intermediate_size": 8 * rng.randint(1, 10),
        "intermediate_size": 8 * rng.randint(2, 12),
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": rng.random() < 0.5,
        "qkv_bias": rng.random() < 0.7,
        "mlp_only_layers": rng.sample(range(layers), rng.randint(0, layers - 1)),
    } | _drawn_windows(rng, layers)


def _drawn_olmoe(rng: random.Random, layers: int) -> dict:
    experts, top_k = _drawn_experts(rng)
    return {
        "intermediate_size": 8 * rng.randint(1, 6),
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.3,
    }


def _drawn_ernie(rng: random.Random, layers: int) -> dict:
    experts, top_k = _drawn_experts(rng)
    return {
        "moe_intermediate_size": 8 * rng.randint(1, 6),
        "intermediate_size": 8 * rng.randint(2, 12),
        "moe_num_experts": experts,
        "moe_k": top_k,
        "moe_num_shared_experts": rng.randint(0, 2),
        "moe_layer_start_index": rng.randint(0, layers - 1),
    }


def _drawn_granite(rng: random.Random, layers: int) -> dict:
    experts, top_k = _drawn_experts(rng)
    return {
        "intermediate_size": 8 * rng.randint(1, 6),
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "attention_bias": rng.random() < 0.3,
        "embedding_multiplier": rng.uniform(0.5, 12),
        "attention_multiplier": rng.uniform(0.05, 0.5),
        "residual_multiplier": rng.uniform(0.2, 1),
        "logits_scaling": rng.uniform(0.5, 8),
    }


def _drawn_hunyuan(rng: random.Random, layers: int) -> dict:
    experts, top_k = _drawn_experts(rng)
    return {
        "intermediate_size": 8 * rng.randint(1, 6),
        "num_experts": experts,
        "moe_topk": top_k,
        "head_dim": rng.choice((8, 16, 24)),
        "attention_bias": rng.random() < 0.3,
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 1e4,
            "alpha": rng.choice((10.0, 1000.0)),
            "factor": 1.0,
        },
    }


def _drawn_dense(rng: random.Random, layers: int) -> dict:
    return {"intermediate_size": 8 * rng.randint(2, 20), "attention_bias": rng.random() < 0.3}


def _drawn_mistral(rng: random.Random, layers: int) -> dict:
    return {"intermediate_size": 8 * rng.randint(2, 20), "sliding_window": rng.choice((None, 20, 64))}


def _drawn_phi3(rng: random.Random, layers: int) -> dict:
    """Heads of 16 dimensions, as the factors want them."""
    heads = rng.randint(2, 6)
    return {
        "intermediate_size": 8 * rng.randint(2, 20),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": 16 * heads,
        "rope_parameters": rng.choice(
            (LONG, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
        ),
    }


_DRAWN: dict[str, Callable[[random.Random, int], dict]] = {
    "glm4_moe": _drawn_deepseek,
    "dots1": _drawn_dots1,
    "minimax_m2": _drawn_minimax,
    "qwen2_moe": _drawn_qwen2,
    "olmoe": _drawn_olmoe,
    "ernie4_5_moe": _drawn_ernie,
    "granitemoe": _drawn_granite,
    "hunyuan_v1_moe": _drawn_hunyuan,
    "llama": _drawn_dense,
    "mistral": _drawn_mistral,
    "qwen3": _drawn_dense,
    "phi3": _drawn_phi3,
}
