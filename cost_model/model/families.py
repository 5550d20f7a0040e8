"""From a `config.json` to the fields of a shape: the families, and what of them may be packed."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cost_model.model import dense_families, sparse_families
from cost_model.model.config_fields import DTYPE_BYTES, Config
from cost_model.model.packed_format import PackedFormat, packed_format
from policies.common.errors import DataError, Faults, UsageError

#: How weights lie in a checkpoint that can be read; for messages.
STORED_AS = "stored as bfloat16, float16 or float32"
#: Other names of dtypes: PyTorch's and vLLM's.
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


def shape_fields(config: Config, faults: Faults | None = None) -> dict[str, Any]:
    """The fields of `ModelArch`, all but its name, from a parsed `config.json`.

    Sizes must be there; optional fields take the defaults of transformers, and without a dtype it is float32.

    Args:
        faults: keeps what would be raised; the fields are those that could be read.

    Raises:
        DataError: an unsupported family or option, or a missing, bad or contradictory field, which is named.
    """
    if not isinstance(config, Mapping):
        raise DataError(f"the config is {type(config).__name__}; it must be a JSON object.")
    faults = faults or Faults()
    fields: dict[str, Any] = {}
    with faults.step():
        check_model_type(config.get("model_type"))
    with faults.step():
        _check_activation(config)
    with faults.step():
        if config.get("model_type") in SUPPORTED_MODEL_TYPES:
            fields = FAMILIES[config["model_type"]](config)
    with faults.step():
        packed = packed_format(config, _modules(config["model_type"], fields) if fields else {})
        _check_alternating(config, fields, packed)
        fields |= {"packed": packed} if packed else {}
    return fields


def _check_alternating(config: Config, fields: Mapping[str, Any], packed: PackedFormat | None) -> None:
    if packed and fields.get("gate_up_alternate") and (packed.method, packed.kinds) != ("mxfp4", ("expert",)):
        raise DataError(
            f"quantization_config asks for {packed.method} of {' and '.join(packed.kinds)}; {config['model_type']} is read with "
            "its experts in mxfp4, as the hub has it, or in 16 bits."
        )


def _check_activation(config: Config) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise DataError(f"hidden_act is {config['hidden_act']!r}; only 'silu' is supported.")


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


#: A new family is one function there and one entry here.
FAMILIES: Mapping[str, Callable[[Config], dict[str, Any]]] = MappingProxyType(
    {**sparse_families.FAMILIES, **dense_families.FAMILIES}
)
SUPPORTED_MODEL_TYPES = tuple(FAMILIES)


#: The modules of an expert inside a layer, ``{}`` its number, and of the router beside them, where they are not Qwen's.
_QWEN = ("mlp.experts.{}.gate_proj", "mlp.gate")
_MIXTRAL = ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.gate")
_EXPERTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gpt_oss": ("mlp.experts", "mlp.router"),
        "mixtral": _MIXTRAL,
        "phimoe": _MIXTRAL,
        "minimax_m2": _MIXTRAL,
        "hunyuan_v1_moe": (_QWEN[0], "mlp.gate.wg"),
    }
)
#: The MLP that every token passes beside the experts of a layer.
_SHARED = MappingProxyType({"qwen2_moe": "mlp.shared_expert", "hunyuan_v1_moe": "mlp.shared_mlp"})


def _modules(model_type: str, fields: Config) -> dict[str, list[str]]:
    """Names of the linear layers of each kind, as lists of exceptions may name them."""
    expert, router = _EXPERTS.get(model_type, _QWEN)
    layers, dense = range(fields["num_layers"]), fields.get("dense_layers", ())
    sparse = [layer for layer in layers if layer not in dense]
    at = "model.layers.{}."
    mlps = [at.format(layer) + "mlp" for layer in dense]
    if fields.get("shared_ffn"):
        mlps += [at.format(layer) + _SHARED.get(model_type, "mlp.shared_experts") for layer in sparse]
    found = {
        "attention": [at.format(layer) + f"self_attn.{role}_proj" for layer in layers for role in "qkvo"],
        "expert": [
            at.format(layer) + expert.format(number) for layer in sparse for number in (0, fields["num_experts"] - 1)
        ],
        "dense": [f"{mlp}.{role}_proj" for mlp in mlps for role in ("gate", "up", "down")],
        "router": [at.format(layer) + router for layer in sparse],
        "head": ["lm_head"],
    }
    return {kind: names for kind, names in found.items() if names}
