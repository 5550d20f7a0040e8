"""Where the configs of the families differ, and what transformers takes for a field that is absent.

Sources: `configuration_*.py` and `modeling_*.py` of each family in transformers. Versions before 5 write `torch_dtype`,
`rope_scaling` and a top-level `rope_theta`; since 5 it is `dtype` and `rope_parameters`.
"""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cost_model.model.packed_format import packed_format
from policies.common.errors import DataError, UsageError

#: How weights lie in a checkpoint that can be read; for messages.
STORED_AS = "stored as bfloat16, float16 or float32"
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Other names of dtypes: PyTorch's and vLLM's.
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
#: What transformers takes where a gpt-oss config says nothing of the rotary embedding.
GPT_OSS_YARN: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
)
#: What transformers takes where a Qwen3 config says nothing of the window.
_QWEN_WINDOW = 4096

Config = Mapping[str, Any]


def shape_fields(config: Config) -> dict[str, Any]:
    """The fields of `ModelArch`, all but its name, from a parsed `config.json`.

    Sizes must be there; optional fields take the defaults of transformers, and without a dtype it is float32.

    Raises:
        DataError: an unsupported family or option, or a missing, bad or contradictory field, which is named.
    """
    if not isinstance(config, Mapping):
        raise DataError(f"the config is {type(config).__name__}; it must be a JSON object.")
    check_model_type(config.get("model_type"))
    if config.get("hidden_act", "silu") != "silu":
        raise DataError(f"hidden_act is {config['hidden_act']!r}; only 'silu' is supported.")
    fields = FAMILIES[config["model_type"]](config)
    packed = packed_format(config, _modules(config["model_type"], fields))
    if packed and fields.get("gate_up_alternate") and (packed.method, packed.kinds) != ("mxfp4", ("expert",)):
        raise DataError(
            f"quantization_config asks for {packed.method} of {' and '.join(packed.kinds)}; {config['model_type']} is read with "
            "its experts in mxfp4, as the hub has it, or in 16 bits."
        )
    return fields | ({"packed": packed} if packed else {})


def dtype_name(dtype: Any) -> str:
    """The name of a compute dtype, "auto" for that of the checkpoint.

    Args:
        dtype: a name, "half" and "float" too, or a `torch.dtype`.

    Raises:
        UsageError: there is none of that name.
    """
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name != "auto" and name not in DTYPE_BYTES:
        raise UsageError(f"unknown dtype {dtype!r}: choose auto, {', '.join(sorted(DTYPE_BYTES))}")
    return name


def check_model_type(model_type: Any) -> None:
    """Refuse a family that is not known.

    Raises:
        DataError: lists those that are.
    """
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise DataError(f"model_type {model_type!r} is not supported; supported families: {supported}.")


def _mixtral(config: Config) -> dict[str, Any]:
    return _decoder(config, num_kv_heads=8, norm_eps=1e-5, rope_theta=1e6) | _uniform_experts(config)


def _phimoe(config: Config) -> dict[str, Any]:
    """Phi-3.5-MoE norms with LayerNorm; beyond its original context the rotary embedding is rescaled (LongRoPE)."""
    fields = _decoder(config, num_kv_heads=8, norm_eps=1e-5, rope_theta=1e6, rope_types=("default", "longrope"))
    return fields | {
        **_uniform_experts(config),
        "norm_bias": True,
        "attention_bias": _flag(config, "attention_bias"),
        "head_bias": _flag(config, "lm_head_bias"),
        "rope_switch": _rope_switch(config),
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
    """Qwen3 may mix dense layers in; `intermediate_size` is theirs alone, and names no weight where there are none."""
    fields = _decoder(config, num_kv_heads=4, norm_eps=1e-6, rope_theta=1e4)
    _flag(config, "norm_topk_prob")  # scales routing weights, no bytes and no FLOPs
    dense_layers = _dense_layers(config, fields["num_layers"])
    return fields | {
        "ffn": _count(config, "moe_intermediate_size"),
        "num_experts": _same_count(config, "num_experts", "num_local_experts"),
        "sliding_window": _qwen_window(config) if _flag(config, "use_sliding_window") else None,
        "attention_bias": _flag(config, "attention_bias"),
        "qk_norm": True,
        "dense_layers": dense_layers,
        "dense_ffn": _count(config, "intermediate_size") if dense_layers else 0,
    }


def _gpt_oss(config: Config) -> dict[str, Any]:
    """gpt-oss looks back through a window in every other layer; its rotary embedding is YaRN's where nothing is said."""
    given = {"rope_parameters": GPT_OSS_YARN} if _lacks_rope(config) else {}
    fields = _decoder(
        {"head_dim": 64, **config, **given},
        num_kv_heads=8,
        norm_eps=1e-5,
        rope_theta=150000.0,
        rope_types=("default", "yarn"),
    )
    types = _layer_types(config, fields["num_layers"])
    window = 128 if "sliding_window" not in config else _optional_count(config, "sliding_window")
    if window is None and "sliding_attention" in types:
        raise DataError("sliding_window in the config is null, but layer_types has layers with a window.")
    full = tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")
    _positive(config, "swiglu_limit", 7.0)
    return fields | {
        "ffn": _count(config, "intermediate_size"),
        "num_experts": _count(config, "num_local_experts"),
        "sliding_window": window if len(full) < len(types) else None,
        "full_layers": full if 0 < len(full) < len(types) else (),
        "attention_bias": config.get("attention_bias") is None or _flag(config, "attention_bias"),
        "sinks": True,
        "router_bias": True,
        "expert_bias": True,
        "gate_up_alternate": True,
    }


def _lacks_rope(config: Config) -> bool:
    return config.get("rope_parameters") is None and config.get("rope_scaling") is None


def _layer_types(config: Config, num_layers: int) -> list[str]:
    """What each layer attends to; without a word every other layer, from the first on, looks back through the window."""
    kinds = ("sliding_attention", "full_attention")
    types = (
        [kinds[layer % 2] for layer in range(num_layers)]
        if config.get("layer_types") is None
        else config["layer_types"]
    )
    if not isinstance(types, list) or len(types) != num_layers or not all(each in kinds for each in types):
        raise DataError(f"layer_types in the config is {types!r}; it must say {' or '.join(kinds)} for each layer.")
    return types


def _qwen_window(config: Config) -> int | None:
    return _optional_count(config, "sliding_window") if "sliding_window" in config else _QWEN_WINDOW


#: The modules of an expert inside a layer, ``{}`` its number, and of the router beside them; all others are called alike.
_EXPERTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gpt_oss": ("mlp.experts", "mlp.router"),
        "mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.gate"),
        "phimoe": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.gate"),
        "qwen3_moe": ("mlp.experts.{}.gate_proj", "mlp.gate"),
    }
)


def _modules(model_type: str, fields: Config) -> dict[str, list[str]]:
    """Names of the linear layers of each kind, as lists of exceptions may name them."""
    expert, router = _EXPERTS[model_type]
    layers, dense = range(fields["num_layers"]), fields.get("dense_layers", ())
    sparse = [layer for layer in layers if layer not in dense]
    at = "model.layers.{}."
    found = {
        "attention": [at.format(layer) + f"self_attn.{role}_proj" for layer in layers for role in "qkvo"],
        "expert": [
            at.format(layer) + expert.format(number) for layer in sparse for number in (0, fields["num_experts"] - 1)
        ],
        "dense": [at.format(layer) + f"mlp.{role}_proj" for layer in dense for role in ("gate", "up", "down")],
        "router": [at.format(layer) + router for layer in sparse],
        "head": ["lm_head"],
    }
    return {kind: names for kind, names in found.items() if names}


#: A new family is one function and one entry here.
FAMILIES: Mapping[str, Callable[[Config], dict[str, Any]]] = MappingProxyType(
    {"gpt_oss": _gpt_oss, "mixtral": _mixtral, "phimoe": _phimoe, "qwen3_moe": _qwen3_moe}
)
SUPPORTED_MODEL_TYPES = tuple(FAMILIES)


def _decoder(
    config: Config,
    *,
    num_kv_heads: int,
    norm_eps: float,
    rope_theta: float,
    rope_types: tuple[str, ...] = ("default",),
) -> dict[str, Any]:
    """What all families spell alike; the keywords are the defaults of the family."""
    hidden = _count(config, "hidden_size")
    num_heads = _count(config, "num_attention_heads")
    head_dim = _optional_count(config, "head_dim")
    if head_dim is None and hidden % num_heads:
        raise DataError(f"the config lacks head_dim, and hidden_size {hidden} is no multiple of {num_heads} heads.")
    if "num_key_value_heads" in config:  # null: as many as query heads
        num_kv_heads = _count(config, "num_key_value_heads", default=num_heads)
    return {
        "model_type": config["model_type"],
        "num_layers": _count(config, "num_hidden_layers"),
        "hidden": hidden,
        "top_k": _count(config, "num_experts_per_tok"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": hidden // num_heads if head_dim is None else head_dim,
        "vocab_size": _count(config, "vocab_size"),
        "max_position": _count(config, "max_position_embeddings"),
        "tied": _flag(config, "tie_word_embeddings"),
        "dtype_bytes": _dtype_bytes(config),
        "norm_eps": _positive(config, "rms_norm_eps", norm_eps),
        "rope_theta": _rope_theta(config, rope_theta, rope_types),
    }


def _uniform_experts(config: Config) -> dict[str, Any]:
    """As Mixtral spells them: every layer has experts, and every layer attends through the same window."""
    return {
        "ffn": _count(config, "intermediate_size"),
        "num_experts": _count(config, "num_local_experts"),
        "sliding_window": _optional_count(config, "sliding_window"),
    }


def _dense_layers(config: Config, num_layers: int) -> tuple[int, ...]:
    """Layers without experts: those listed, and of each `decoder_sparse_step` layers all but the last."""
    step = _count(config, "decoder_sparse_step", default=1)
    listed = [] if config.get("mlp_only_layers") is None else config["mlp_only_layers"]
    if not isinstance(listed, list) or any(type(i) is not int or not 0 <= i < num_layers for i in listed):
        raise DataError(
            f"mlp_only_layers in the config is {listed!r}; it must be a list of layers from 0 to {num_layers - 1}."
        )
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)


def _count(config: Config, field: str, default: int | None = None) -> int:
    """A whole number of at least 1; a missing or null field gives the default where there is one."""
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise DataError(f"the config lacks {field}.")
    if type(value) is not int or value < 1:
        raise DataError(f"{field} in the config is {value!r}; it must be a whole number of at least 1.")
    return value


def _optional_count(config: Config, field: str) -> int | None:
    """The same, or None where the field is missing or null."""
    return None if config.get(field) is None else _count(config, field)


def _same_count(config: Config, *fields: str) -> int:
    """One number under any of several names; the first is the usual one."""
    given = {field: _count(config, field) for field in fields if config.get(field) is not None}
    if len(set(given.values())) > 1:
        values = " and ".join(f"{field} is {value}" for field, value in given.items())
        raise DataError(f"the config contradicts itself: {values}; both name the same number.")
    return next(iter(given.values())) if given else _count(config, fields[0])


def _positive(config: Config, field: str, default: float) -> float:
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise DataError(f"{field} in the config is {value!r}; it must be a positive number.")
    return float(value)


def _flag(config: Config, field: str) -> bool:
    """A missing or null flag is false, as in transformers for all that are read here."""
    value = config.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise DataError(f"{field} in the config is {value!r}; it must be true or false.")
    return value


def _dtype_bytes(config: Config) -> int:
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = "float32" if config.get(field) is None else config[field]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise DataError(f"{field} in the config is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]


def _rope_theta(config: Config, default: float, rope_types: tuple[str, ...]) -> float:
    """The base of the rotary embedding. A scaling that the family is not known for would change the result."""
    source = config
    for field in ("rope_scaling", "rope_parameters"):
        values = {} if config.get(field) is None else config[field]
        if not isinstance(values, Mapping):
            raise DataError(f"{field} in the config is {values!r}; it must be a JSON object.")
        rope_type = values.get("rope_type", values.get("type", "default"))
        if rope_type not in rope_types:
            known = " or ".join(repr(name) for name in rope_types)
            raise DataError(f"{field} in the config asks for rope type {rope_type!r}; only {known} is supported.")
        source = values if values.get("rope_theta") is not None else source
    return _positive(source, "rope_theta", default)


def _rope_switch(config: Config) -> int | None:
    """The original context of a LongRoPE, beyond which it uses its second set of factors."""
    for field in ("rope_parameters", "rope_scaling"):
        values = config.get(field) or {}
        if values.get("rope_type", values.get("type")) == "longrope":
            name = "original_max_position_embeddings"
            return _count(values if values.get(name) is not None else config, name)
    return None
