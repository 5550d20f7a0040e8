"""Tiny gpt-oss checkpoints, in transformers' layout and with experts in MXFP4 as the hub has them."""

import json
import random

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.support.tiny import Recipe, make, transformers_greedy
from tests.support.tiny_families import COMMON

#: Context beyond which YaRN stretches.
ORIGINAL = 64
BASE = COMMON | {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 20,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def shake(model):
    """Norms, biases and sinks are not what they are initialized to, and some gates are beyond their limit."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("bias"):
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if name.endswith(("bias", "sinks")) else 1 + noise)
        if name.endswith("sinks"):
            parameter.mul_(5)
        if name.endswith("gate_up_proj"):
            parameter.mul_(6)


def recipe(**config):
    return Recipe(config, {}, shake, "gpt_oss", BASE)


def drawn(seed):
    """A random config: windows shorter and longer than prompts and around a page, and any pattern of layers."""
    rng = random.Random(seed)
    kv_heads, experts, layers = rng.randint(1, 3), rng.randint(4, 12), rng.randint(2, 5)
    yarn = BASE["rope_parameters"] | {"truncate": rng.random() < 0.5, "factor": rng.choice((2.0, 8.0))}
    return recipe(
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * rng.choice((1, 4, 8)),
        head_dim=rng.choice((8, 16, 24)),
        hidden_size=32 * rng.randint(1, 3),
        intermediate_size=32 * rng.randint(1, 3),
        num_local_experts=experts,
        num_experts_per_tok=rng.randint(1, 4),
        sliding_window=rng.choice((1, 2, 15, 16, 17, 18, 33, 64, 128, 400)),
        layer_types=[rng.choice(("sliding_attention", "full_attention")) for _ in range(layers)],
        attention_bias=rng.random() < 0.8,
        tie_word_embeddings=rng.random() < 0.3,
        rope_parameters=yarn if rng.random() < 0.8 else {"rope_type": "default", "rope_theta": 1e4},
    )


@torch.no_grad()
def pack(variant, directory):
    """The variant with experts in MXFP4, as the hub has it, in ``directory``; its model has their values."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(variant.directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        variant.model.get_parameter(name).copy_(values)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((variant.directory / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (directory / "config.json").write_text(json.dumps(config))
    greedy = [transformers_greedy(variant.model, p, eos_token_id=None) for p in variant.prompts]
    eos_ids = greedy[1][4], greedy[2][3]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids}))
    return type(variant)(directory, variant.model, variant.prompts, greedy, eos_ids)


def made(recipe, tmp_path, lengths, *, packed):
    variant = make(recipe, tmp_path / "checkpoint", lengths)
    return pack(variant, tmp_path / "mxfp4") if packed else variant
