"""Tiny checkpoints of every family that runs: one whose every option is on, and random ones."""

from __future__ import annotations

import random
from functools import partial

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.support.tiny import BASE, PACKED, SHARDED, Recipe

FAMILIES = ("mixtral", "phimoe", "qwen3_moe")
#: Rows of up to so many tokens use the short factors in the LongRoPE of every Phimoe here.
SWITCH = 64
COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}


def long_rope(head_dim: int, scales: tuple[float, float] = (1.1, 1.25)) -> dict:
    """A LongRoPE whose two sets of factors differ much."""
    half = head_dim // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + 0.5 * i for i in range(half)],
        "short_mscale": scales[0],
        "long_mscale": scales[1],
    }


def use_long_factors(model) -> None:
    """Make the rotary module of a Phimoe take ``long_factor`` for a sequence that is longer than the original context.

    Transformers computes the frequencies without the sequence's length, which always gives the short factors.
    """
    rotary = model.model.rotary_emb
    as_it_is = rotary.forward

    def forward(x, position_ids):
        length = int(position_ids.max()) + 1
        rotary.rope_init_fn = partial(ROPE_INIT_FUNCTIONS["longrope"], seq_len=length)
        return as_it_is(x, position_ids)

    rotary.forward = forward


def shake(model) -> None:
    """Norms and biases are not what they are initialized to, so that a forgotten one shows; see `use_long_factors`."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if name.endswith("bias") else 1 + noise)
    if getattr(model.config, "rope_parameters", {}).get("rope_type") == "longrope":
        use_long_factors(model)


#: Per family, a checkpoint that has everything the family can have; each layout once more often than the other.
RECIPES = {
    "mixtral-packed": Recipe(
        {"num_key_value_heads": 4, "rope_theta": 1e4, "sliding_window": 40}, PACKED, shake, base=BASE
    ),
    "mixtral-8x22b": Recipe(
        {
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "hidden_size": 96,
            "rope_theta": 1e6,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        SHARDED,
        shake,
        base=BASE,
    ),
    "qwen3": Recipe(
        {
            "moe_intermediate_size": 24,
            "intermediate_size": 80,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "head_dim": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "num_hidden_layers": 4,
        },
        SHARDED,
        shake,
        "qwen3_moe",
        COMMON,
    ),
    "qwen3-packed": Recipe(
        {
            "moe_intermediate_size": 32,
            "intermediate_size": 64,
            "num_experts": 32,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 40,
        },
        PACKED,
        shake,
        "qwen3_moe",
        COMMON,
    ),
    "phi": Recipe(
        {
            "intermediate_size": 96,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": long_rope(16),
            "router_jitter_noise": 0.2,
        },
        SHARDED,
        shake,
        "phimoe",
        COMMON,
    ),
    "phi-packed": Recipe(
        {
            "intermediate_size": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "lm_head_bias": True,
            "tie_word_embeddings": True,
            "sliding_window": 50,
            "num_key_value_heads": 1,
        },
        PACKED,
        shake,
        "phimoe",
        COMMON,
    ),
}


def drawn(seed: int) -> Recipe:
    """A random config of a random family, in a random layout."""
    rng = random.Random(seed)
    family, kv_heads, experts = FAMILIES[seed % 3], rng.randint(1, 8), rng.randint(4, 32)
    heads, head_dim = kv_heads * rng.choice((1, 2, 3)), rng.choice((8, 10, 16, 24))
    config = COMMON | {
        "num_hidden_layers": rng.randint(2, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": rng.randint(200, 400),
        "hidden_size": heads * head_dim,
        "rms_norm_eps": rng.choice((1e-5, 1e-6)),
        "tie_word_embeddings": rng.random() < 0.3,
        "sliding_window": rng.choice((None, 20, 64)),
        "num_experts_per_tok": rng.randint(1, min(8, experts)),
    }
    theta = {"rope_type": "default", "rope_theta": rng.choice((1e4, 1e6))}
    config |= {"mixtral": _drawn_mixtral, "phimoe": _drawn_phi, "qwen3_moe": _drawn_qwen3}[family](
        rng, experts, head_dim
    )
    layout = rng.choice((PACKED, SHARDED, {}, PACKED | SHARDED))
    return Recipe({"rope_parameters": theta} | config, layout, shake, family, {})


def _drawn_mixtral(rng: random.Random, experts: int, head_dim: int) -> dict:
    return {"num_local_experts": experts, "intermediate_size": 8 * rng.randint(2, 12), "head_dim": head_dim}


def _drawn_phi(rng: random.Random, experts: int, head_dim: int) -> dict:
    rope = (
        {"rope_parameters": long_rope(head_dim, (rng.uniform(1, 1.3), rng.uniform(1, 1.3)))}
        if rng.random() < 0.7
        else {}
    )
    return rope | {
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "intermediate_size": 8 * rng.randint(2, 12),
        "attention_bias": rng.random() < 0.5,
        "lm_head_bias": rng.random() < 0.5,
        "router_jitter_noise": rng.choice((0.01, 0.3)),
    }


def _drawn_qwen3(rng: random.Random, experts: int, head_dim: int) -> dict:
    layers = rng.randint(2, 5)
    return {
        "num_experts": experts,
        "moe_intermediate_size": 8 * rng.randint(1, 6),
        "intermediate_size": 8 * rng.randint(2, 12),
        "num_hidden_layers": layers,
        "mlp_only_layers": rng.sample(range(layers), rng.randint(0, layers - 1)),
        "norm_topk_prob": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.3,
        "head_dim": rng.choice((8, 16, 24, 40)),
        "use_sliding_window": rng.random() < 0.3,
    }
