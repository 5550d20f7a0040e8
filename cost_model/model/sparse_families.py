"""Where the configs of families with experts differ, and what transformers takes for a field that is absent.

Sources: `configuration_*.py` and `modeling_*.py` of each family in transformers. Versions before 5 write `torch_dtype`,
`rope_scaling` and a top-level `rope_theta`; since 5 it is `dtype` and `rope_parameters`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cost_model.model.config_fields import (
    ROPE_TYPES,
    Config,
    count,
    decoder_fields,
    dense_before,
    flag,
    optional_count,
    positive,
    refuse,
    rope_switch,
    rope_type,
    rope_values,
    same_count,
    windows,
)
from policies.common.errors import DataError

#: What transformers takes where a gpt-oss config says nothing.
_GPT_OSS_WINDOW = 128
_GPT_OSS_ROPE: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
)
#: What transformers takes where a Qwen config says nothing of the window.
_QWEN_WINDOW = 4096


def _mixtral(config: Config) -> dict[str, Any]:
    return decoder_fields(config, num_kv_heads=8, norm_eps=1e-5, rope_theta=1e6) | _uniform_experts(config)


def _phimoe(config: Config) -> dict[str, Any]:
    """Phi-3.5-MoE norms with LayerNorm; beyond its original context the rotary embedding is rescaled (LongRoPE)."""
    fields = decoder_fields(config, num_kv_heads=8, norm_eps=1e-5, rope_theta=1e6, rope_types=("default", "longrope"))
    return fields | {
        **_uniform_experts(config),
        "norm_bias": True,
        "attention_bias": flag(config, "attention_bias"),
        "head_bias": flag(config, "lm_head_bias"),
        "rope_switch": rope_switch(config),
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
    """Qwen3 may mix dense layers in; `intermediate_size` is theirs alone, and names no weight where there are none."""
    fields = decoder_fields(config, num_kv_heads=4, norm_eps=1e-6, rope_theta=1e4)
    return fields | {
        **_qwen_experts(config, fields["num_layers"]),
        "sliding_window": _qwen_window(config) if flag(config, "use_sliding_window") else None,
        "attention_bias": flag(config, "attention_bias"),
        "qk_norm": "head",
    }


def _gpt_oss(config: Config) -> dict[str, Any]:
    """gpt-oss looks back through a window in every other layer; its rotary embedding is YaRN's where nothing is said."""
    config = gpt_oss_config(config)
    values = rope_values(config)
    if rope_type(values) == "yarn":
        count(values, "original_max_position_embeddings")
    fields = decoder_fields(
        config, num_kv_heads=8, norm_eps=1e-5, rope_theta=150000.0, rope_types=("default", "yarn"), head_dim=64
    )
    positive(config, "swiglu_limit", 7.0)
    positive(config, "swiglu_alpha", 1.702)
    window = count(config, "sliding_window")
    return fields | {
        **windows(config, window, fields["num_layers"], lambda layer: layer % 2 == 0),
        "top_k": count(config, "num_experts_per_tok"),
        "ffn": count(config, "intermediate_size"),
        "num_experts": count(config, "num_local_experts"),
        "attention_bias": flag(config, "attention_bias", True),
        "sinks": True,
        "router_bias": True,
        "expert_bias": True,
        "gate_up_alternate": True,
    }


def gpt_oss_config(config: Config) -> Config:
    """The config with what transformers takes where it says nothing."""
    given = {name: value for name, value in config.items() if value is not None}
    if "rope_scaling" in given or "rope_parameters" in given:
        return {"sliding_window": _GPT_OSS_WINDOW, **given}
    return {"sliding_window": _GPT_OSS_WINDOW, "rope_parameters": _GPT_OSS_ROPE, **given}


def _qwen2_moe(config: Config) -> dict[str, Any]:
    """Beside the experts of a layer there is a shared one, which a gate weighs; only q, k and v have a bias. Every other of
    the first layers looks back through the window."""
    fields = decoder_fields(config, num_kv_heads=16, norm_eps=1e-6, rope_theta=1e4)
    last = count(config, "max_window_layers", 28, least=0)
    window = _qwen_window(config) if flag(config, "use_sliding_window") else None
    return fields | {
        **_qwen_experts(config, fields["num_layers"]),
        **windows(config, window, fields["num_layers"], lambda layer: layer % 2 == 0 and layer < last),
        "attention_bias": flag(config, "qkv_bias", True),
        "output_bias": False,
        "shared_ffn": count(config, "shared_expert_intermediate_size", 5632),
        "shared_gate": True,
    }


def _olmoe(config: Config) -> dict[str, Any]:
    """Queries and keys are normed over all heads together."""
    refuse(config, clip_qkv=None)
    flag(config, "norm_topk_prob")
    return decoder_fields(config, num_kv_heads=None, norm_eps=1e-5, rope_theta=1e4) | {
        "ffn": count(config, "intermediate_size"),
        "num_experts": same_count(config, "num_experts", "num_local_experts"),
        "top_k": count(config, "num_experts_per_tok"),
        "attention_bias": flag(config, "attention_bias"),
        "qk_norm": "projection",
    }


def _glm4_moe(config: Config) -> dict[str, Any]:
    """GLM-4.5 to 4.7: routing as DeepSeek-V3, half of each head is rotated, the first layers are dense."""
    fields = decoder_fields(config, num_kv_heads=8, norm_eps=1e-5, rope_theta=1e4, rotary_share=0.5)
    return fields | {
        **_deepseek_experts(config, fields["num_layers"], first_dense=1),
        "router_float32": True,
        "attention_bias": flag(config, "attention_bias"),
        "output_bias": False,
        "qk_norm": "head" if flag(config, "use_qk_norm") else "",
    }


def _dots1(config: Config) -> dict[str, Any]:
    """dots.llm1: routing as DeepSeek-V3, heads are normed."""
    fields = decoder_fields(config, num_kv_heads=32, norm_eps=1e-6, rope_theta=1e4)
    layers = fields["num_layers"]
    first = count(config, "max_window_layers", 62, least=0)
    return fields | {
        **_deepseek_experts(config, layers, first_dense=0),
        **windows(config, _qwen_window(config), layers, lambda layer: layer >= first),
        "router_float32": True,
        "attention_bias": flag(config, "attention_bias"),
        "qk_norm": "head",
    }


def _minimax_m2(config: Config) -> dict[str, Any]:
    """Half of each head is rotated; queries and keys are normed over all heads together."""
    share = count(config, "rotary_dim") / count(config, "head_dim", 128) if config.get("rotary_dim") else 1.0
    fields = decoder_fields(config, num_kv_heads=8, norm_eps=1e-6, rope_theta=5e6, rotary_share=share, head_dim=128)
    return fields | {
        "ffn": count(config, "intermediate_size"),
        "num_experts": same_count(config, "num_local_experts", "num_experts"),
        "top_k": count(config, "num_experts_per_tok"),
        "router_correction": True,
        "qk_norm": "projection",
    }


def _ernie4_5_moe(config: Config) -> dict[str, Any]:
    """Neighbours of a head's dimensions are rotated together; a softmax router with a correction."""
    refuse(config, use_bias=False, moe_layer_interval=1)
    fields = decoder_fields(config, num_kv_heads=4, norm_eps=1e-5, rope_theta=5e5, tied=True)
    layers = fields["num_layers"]
    if config.get("moe_layer_end_index", -1) not in (-1, None, layers - 1):
        raise DataError(
            f"moe_layer_end_index in the config is {config['moe_layer_end_index']!r}; only -1 is supported."
        )
    positive(config, "moe_norm_min", 1e-12)
    dense_layers = dense_before(config, "moe_layer_start_index", layers, 1)
    width = count(config, "moe_intermediate_size")
    shared = 2 if config.get("moe_num_shared_experts") is None else config["moe_num_shared_experts"]
    return fields | {
        "ffn": width,
        "num_experts": same_count(config, "moe_num_experts", "num_experts"),
        "top_k": same_count(config, "moe_k", "num_experts_per_tok"),
        "shared_ffn": width * shared if shared else 0,
        "router_correction": True,
        "router_float32": True,
        "rope_interleaved": True,
        "dense_layers": dense_layers,
        "dense_ffn": count(config, "intermediate_size") if dense_layers else 0,
    }


def _granitemoe(config: Config) -> dict[str, Any]:
    """Granite 3 MoE: Mixtral with four multipliers, and routing weights of the chosen experts alone."""
    if config.get("quantization_config") is not None:
        raise DataError("packed weights of granitemoe are not read, because its experts lie stacked; use the original.")
    fields = decoder_fields(config, num_kv_heads=None, norm_eps=1e-6, rope_theta=1e4) | _uniform_experts(config)
    for field in ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"):
        positive(config, field, 1.0)
    return fields | {"sliding_window": None, "attention_bias": flag(config, "attention_bias")}


def _hunyuan_v1_moe(config: Config) -> dict[str, Any]:
    """Heads are normed after they are rotated; a shared expert beside those of the router."""
    experts, top_k, ffn = (
        _alike(config, *names)
        for names in (
            ("num_experts", "num_local_experts"),
            ("moe_topk", "num_experts_per_tok"),
            ("intermediate_size",),
        )
    )
    for field in ("moe_intermediate_size", "num_shared_expert"):
        wanted = ffn if field == "moe_intermediate_size" else 1
        if config.get(field) is not None and _alike(config, field) != wanted:
            raise DataError(f"{field} in the config is {config[field]!r}; only {wanted} is supported.")
    fields = decoder_fields(
        config, num_kv_heads=None, norm_eps=1e-5, rope_theta=1e4, rope_types=(*ROPE_TYPES, "dynamic")
    )
    return fields | {
        "ffn": ffn,
        "num_experts": experts,
        "top_k": top_k,
        "shared_ffn": ffn,
        "router_float32": True,
        "attention_bias": flag(config, "attention_bias"),
        "qk_norm": "rotated",
    }


#: A new family with experts is one function and one entry here.
FAMILIES: Mapping[str, Callable[[Config], dict[str, Any]]] = MappingProxyType(
    {
        "mixtral": _mixtral,
        "phimoe": _phimoe,
        "qwen3_moe": _qwen3_moe,
        "qwen2_moe": _qwen2_moe,
        "olmoe": _olmoe,
        "glm4_moe": _glm4_moe,
        "dots1": _dots1,
        "minimax_m2": _minimax_m2,
        "ernie4_5_moe": _ernie4_5_moe,
        "granitemoe": _granitemoe,
        "hunyuan_v1_moe": _hunyuan_v1_moe,
        "gpt_oss": _gpt_oss,
    }
)


def _uniform_experts(config: Config) -> dict[str, Any]:
    """As Mixtral spells them: every layer has experts, and every layer attends through the same window."""
    return {
        "ffn": count(config, "intermediate_size"),
        "num_experts": count(config, "num_local_experts"),
        "top_k": count(config, "num_experts_per_tok"),
        "sliding_window": optional_count(config, "sliding_window"),
    }


def _qwen_experts(config: Config, num_layers: int) -> dict[str, Any]:
    """As Qwen spells them; layers may be dense."""
    flag(config, "norm_topk_prob")  # scales routing weights, no bytes and no FLOPs
    dense_layers = _listed_dense_layers(config, num_layers)
    return {
        "ffn": count(config, "moe_intermediate_size"),
        "num_experts": same_count(config, "num_experts", "num_local_experts"),
        "top_k": count(config, "num_experts_per_tok"),
        "dense_layers": dense_layers,
        "dense_ffn": count(config, "intermediate_size") if dense_layers else 0,
    }


def _deepseek_experts(config: Config, num_layers: int, *, first_dense: int) -> dict[str, Any]:
    """As DeepSeek-V3 spells them: groups of experts, a correction, shared experts that are one MLP, dense layers first."""
    dense_layers = dense_before(config, "first_k_dense_replace", num_layers, first_dense)
    width, experts = count(config, "moe_intermediate_size"), same_count(config, "n_routed_experts", "num_local_experts")
    groups, best = count(config, "n_group", 1), count(config, "topk_group", 1)
    if experts % groups or best > groups or (groups > 1 and experts < 2 * groups):
        raise DataError(f"the config asks for the best {best} of {groups} groups of {experts} experts.")
    positive(config, "routed_scaling_factor", 1.0)
    flag(config, "norm_topk_prob", True)
    return {
        "ffn": width,
        "num_experts": experts,
        "top_k": count(config, "num_experts_per_tok"),
        "shared_ffn": width * count(config, "n_shared_experts", 1),
        "router_correction": True,
        "dense_layers": dense_layers,
        "dense_ffn": count(config, "intermediate_size") if dense_layers else 0,
    }


def _qwen_window(config: Config) -> int | None:
    return optional_count(config, "sliding_window") if "sliding_window" in config else _QWEN_WINDOW


def _listed_dense_layers(config: Config, num_layers: int) -> tuple[int, ...]:
    """Layers without experts: those listed, and of each `decoder_sparse_step` layers all but the last."""
    step = count(config, "decoder_sparse_step", default=1)
    listed = [] if config.get("mlp_only_layers") is None else config["mlp_only_layers"]
    if not isinstance(listed, list) or any(type(i) is not int or not 0 <= i < num_layers for i in listed):
        raise DataError(
            f"mlp_only_layers in the config is {listed!r}; it must be a list of layers from 0 to {num_layers - 1}."
        )
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)


def _alike(config: Config, *fields: str) -> int:
    """A number that a config may give for each layer, where it is the same for all."""
    given = {}
    for field in fields:
        value = config.get(field)
        values = set(value) if isinstance(value, list) and all(type(each) is int for each in value) else {value}
        if len(values) > 1:
            raise DataError(f"{field} in the config differs between layers, which is not supported.")
        given[field] = values.pop() if values else None
    return same_count(given, *fields)
