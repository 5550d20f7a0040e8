"""Where the configs of families without experts differ, and what transformers takes for a field that is absent.

Sources: `configuration_*.py` and `modeling_*.py` of each family in transformers.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cost_model.model.config_fields import (
    Config,
    count,
    decoder_fields,
    dense_mlp,
    flag,
    optional_count,
    refuse,
    rope_switch,
    windows,
)
from policies.common.errors import DataError

#: Names of LongRoPE in configs of Phi-3.
_LONG = ("longrope", "su", "yarn")


def _llama(config: Config) -> dict[str, Any]:
    refuse(config, mlp_bias=False)
    fields = decoder_fields(config, num_kv_heads=None, norm_eps=1e-6, rope_theta=1e4)
    return fields | {**dense_mlp(config, fields["num_layers"]), "attention_bias": flag(config, "attention_bias")}


def _mistral(config: Config) -> dict[str, Any]:
    """Llama with a window."""
    fields = decoder_fields(config, num_kv_heads=8, norm_eps=1e-6, rope_theta=1e4)
    window = optional_count(config, "sliding_window") if "sliding_window" in config else 4096
    found = windows(config, window, fields["num_layers"])
    if found != {"sliding_window": window, "full_layers": ()}:
        raise DataError(
            f"layer_types in the config say that some layers have no window, and a mistral has {window} in all."
        )
    return fields | {**dense_mlp(config, fields["num_layers"]), **found}


def _qwen3(config: Config) -> dict[str, Any]:
    """Llama with heads that are normed."""
    fields = decoder_fields(config, num_kv_heads=32, norm_eps=1e-6, rope_theta=1e4, head_dim=128)
    layers = fields["num_layers"]
    window = optional_count(config, "sliding_window") if "sliding_window" in config else 4096
    window, first = (
        window if flag(config, "use_sliding_window") else None,
        count(config, "max_window_layers", 28, least=0),
    )
    return fields | {
        **dense_mlp(config, layers),
        **windows(config, window, layers, lambda layer: layer >= first),
        "attention_bias": flag(config, "attention_bias"),
        "qk_norm": "head",
    }


def _phi3(config: Config) -> dict[str, Any]:
    """Llama with q, k and v in one matrix, gate and up in another, and LongRoPE."""
    if config.get("quantization_config") is not None:
        raise DataError("packed weights of phi3 are not read, because its q, k and v are one matrix; use the original.")
    fields = decoder_fields(config, num_kv_heads=None, norm_eps=1e-5, rope_theta=1e4, rope_types=("default", *_LONG))
    return fields | {
        **dense_mlp(config, fields["num_layers"]),
        "sliding_window": optional_count(config, "sliding_window"),
        "rope_switch": rope_switch(config, _LONG),
    }


#: A new family without experts is one function and one entry here.
FAMILIES: Mapping[str, Callable[[Config], dict[str, Any]]] = MappingProxyType(
    {"llama": _llama, "mistral": _mistral, "qwen3": _qwen3, "phi3": _phi3}
)
