"""Fields of a parsed `config.json`, checked: sizes, numbers, flags, and what all decoders spell alike."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from policies.common.errors import DataError

Config = Mapping[str, Any]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Kinds of rotary embedding that every family may have; `flexmoe.models.rotary` computes them.
ROPE_TYPES = ("default", "linear", "llama3")


def decoder_fields(
    config: Config,
    *,
    num_kv_heads: int | None,
    norm_eps: float,
    rope_theta: float,
    rope_types: tuple[str, ...] = ROPE_TYPES,
    rotary_share: float = 1.0,
    head_dim: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """What all families spell alike; the keywords are the defaults of the family.

    Args:
        num_kv_heads: None: as many as query heads.
        head_dim: None: the heads have ``hidden_size`` together.
        rotary_share: of a head's dimensions, those that the rotary embedding turns.
    """
    hidden = count(config, "hidden_size")
    num_heads = count(config, "num_attention_heads")
    if "head_dim" in config:
        head_dim = optional_count(config, "head_dim")
    if head_dim is None and hidden % num_heads:
        raise DataError(f"the config lacks head_dim, and hidden_size {hidden} is no multiple of {num_heads} heads.")
    head_dim = head_dim or hidden // num_heads
    if "num_key_value_heads" in config:  # null: as many as query heads
        num_kv_heads = count(config, "num_key_value_heads", default=num_heads)
    return {
        "model_type": config["model_type"],
        "num_layers": count(config, "num_hidden_layers"),
        "hidden": hidden,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads or num_heads,
        "head_dim": head_dim,
        "vocab_size": count(config, "vocab_size"),
        "max_position": count(config, "max_position_embeddings"),
        "sliding_window": None,
        "tied": flag(config, "tie_word_embeddings", tied),
        "dtype_bytes": dtype_bytes(config),
        "norm_eps": positive(config, "rms_norm_eps", norm_eps),
        "rope_theta": _rope_theta(config, rope_theta, rope_types),
        "rotary_dim": _rotary_dim(config, head_dim, rotary_share),
    }


def dense_mlp(config: Config, num_layers: int) -> dict[str, Any]:
    """A model without experts: every layer has one MLP, which counts as its only expert."""
    width = count(config, "intermediate_size")
    layers = tuple(range(num_layers))
    return {"dense_layers": layers, "dense_ffn": width, "ffn": width, "num_experts": 1, "top_k": 1}


def dense_before(config: Config, field: str, num_layers: int, default: int) -> tuple[int, ...]:
    """The first layers, as many as a field says: those have no experts."""
    first = default if config.get(field) is None else config[field]
    if type(first) is not int or not 0 <= first < num_layers:
        raise DataError(
            f"{field} in the config is {first!r}; it must be a number of layers from 0 to {num_layers - 1}."
        )
    return tuple(range(first))


def windows(
    config: Config, window: int | None, num_layers: int, windowed: Callable[[int], bool] = lambda layer: True
) -> dict[str, Any]:
    """The window, None where no layer has one, and the layers that look back to the first token though others have it.

    Args:
        windowed: which layers have it, where the config does not list the layers.

    Raises:
        DataError: the list does not name one of two kinds for each layer.
    """
    kinds = ("sliding_attention", "full_attention")
    listed = config.get("layer_types")
    types = [kinds[not windowed(layer)] for layer in range(num_layers)] if listed is None else listed
    if not isinstance(types, list) or len(types) != num_layers or not all(each in kinds for each in types):
        raise DataError(f"layer_types in the config is {types!r}; it must say {' or '.join(kinds)} for each layer.")
    full = tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")
    if window is None or len(full) == num_layers:
        return {"sliding_window": None, "full_layers": ()}
    return {"sliding_window": window, "full_layers": full}


def refuse(config: Config, **wanted: Any) -> None:
    """Show that fields that the family does not read have the only value that is supported, or are absent.

    Raises:
        DataError: names the field.
    """
    for field, value in wanted.items():
        if config.get(field, value) not in (value, None):
            raise DataError(f"{field} in the config is {config[field]!r}; only {value!r} is supported.")


def count(config: Config, field: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of at least ``least``; a missing or null field gives the default where there is one."""
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise DataError(f"the config lacks {field}.")
    if type(value) is not int or value < least:
        raise DataError(f"{field} in the config is {value!r}; it must be a whole number of at least {least}.")
    return value


def optional_count(config: Config, field: str) -> int | None:
    """The same, or None where the field is missing or null."""
    return None if config.get(field) is None else count(config, field)


def same_count(config: Config, *fields: str) -> int:
    """One number under any of several names; the first is the usual one."""
    given = {field: count(config, field) for field in fields if config.get(field) is not None}
    if len(set(given.values())) > 1:
        values = " and ".join(f"{field} is {value}" for field, value in given.items())
        raise DataError(f"the config contradicts itself: {values}; both name the same number.")
    return next(iter(given.values())) if given else count(config, fields[0])


def positive(config: Config, field: str, default: float | None = None) -> float:
    """A number above zero; a missing or null field gives the default where there is one."""
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise DataError(f"the config lacks {field}.")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise DataError(f"{field} in the config is {value!r}; it must be a positive number.")
    return float(value)


def flag(config: Config, field: str, default: bool = False) -> bool:
    """True or false; a missing or null flag gives the default."""
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise DataError(f"{field} in the config is {value!r}; it must be true or false.")
    return value


def dtype_bytes(config: Config) -> int:
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = "float32" if config.get(field) is None else config[field]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise DataError(f"{field} in the config is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]


def rope_values(config: Config) -> dict[str, Any]:
    """What a config says of the rotary embedding, the newer spelling first: `rope_parameters`, then `rope_scaling`.

    Raises:
        DataError: one of them is no JSON object.
    """
    found: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        values = {} if config.get(field) is None else config[field]
        if not isinstance(values, Mapping):
            raise DataError(f"{field} in the config is {values!r}; it must be a JSON object.")
        found |= values
    return found


def rope_type(values: Mapping[str, Any]) -> Any:
    """The kind of rotary embedding, under either name."""
    return values.get("rope_type", values.get("type", "default"))


def rope_switch(config: Config, types: tuple[str, ...] = ("longrope",)) -> int | None:
    """The original context of a LongRoPE, beyond which it uses its second set of factors."""
    values, name = rope_values(config), "original_max_position_embeddings"
    if rope_type(values) not in types:
        return None
    return count(values if values.get(name) is not None else config, name)


def _rope_theta(config: Config, default: float, rope_types: tuple[str, ...]) -> float:
    """The base of the rotary embedding. A scaling that the family is not known for would change the result."""
    values = rope_values(config)
    if rope_type(values) not in rope_types:
        known = " or ".join(repr(name) for name in rope_types)
        raise DataError(f"the config asks for rope type {rope_type(values)!r}; only {known} is supported.")
    if rope_type(values) != "default":
        for field in _ROPE_NUMBERS.get(rope_type(values), ()):
            positive(values, field)
    return positive(values if values.get("rope_theta") is not None else config, "rope_theta", default)


#: What a scaling needs beside its type.
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rotary_dim(config: Config, head_dim: int, default: float) -> int | None:
    """Dimensions of a head that are turned; None is all of them."""
    field = "partial_rotary_factor"
    values = rope_values(config)
    share = positive(values if values.get(field) is not None else config, field, default)
    size = int(head_dim * share)
    return None if size == head_dim else size
