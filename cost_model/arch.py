"""The shape of a model from its `config.json`: bytes and FLOPs per unit, KV bytes per token. No hardware, no torch."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from policies.errors import DataError, InputMissingError, UsageError
from policies.placement import Unit

SUPPORTED_MODEL_TYPES = ("mixtral",)
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SHAPES = Path(__file__).parent / "shapes"
SHAPE_OF_HUB_ID = {
    "mistralai/mixtral-8x7b-v0.1": "mixtral-8x7b",
    "mistralai/mixtral-8x7b-instruct-v0.1": "mixtral-8x7b",
    "mistralai/mixtral-8x22b-v0.1": "mixtral-8x22b",
    "mistralai/mixtral-8x22b-instruct-v0.1": "mixtral-8x22b-instruct",
}
_COUNTS = (
    "num_layers", "hidden", "ffn", "num_experts", "top_k", "num_heads", "num_kv_heads", "head_dim",
    "vocab_size", "max_position", "dtype_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArch:
    """A Mixture-of-Experts decoder, as far as bytes and FLOPs depend on it.

    Args:
        name: for people; hub id, directory name or "".
        model_type: the family, one of `SUPPORTED_MODEL_TYPES`.
        num_layers, hidden, vocab_size, max_position: as in the config.
        ffn: width of one expert.
        num_experts, top_k: experts per layer, and how many a token is routed to.
        num_heads, num_kv_heads, head_dim: attention; a group of query heads shares a KV head.
        sliding_window: tokens that attention looks back, itself included; None is all.
        tied: the head is the embedding table.
        dtype_bytes: bytes of one stored weight.
        norm_eps, rope_theta: constants of the RMS norms and of the rotary embedding.

    Raises:
        DataError: a value is out of range, or two contradict each other; the sentence names the field.
    """

    name: str
    model_type: str
    num_layers: int
    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    sliding_window: int | None
    tied: bool
    dtype_bytes: int
    norm_eps: float
    rope_theta: float

    def __post_init__(self):
        _check_model_type(self.model_type)
        for field in _COUNTS if self.sliding_window is None else (*_COUNTS, "sliding_window"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 1:
                raise DataError(f"{field} is {getattr(self, field)!r}; it must be a whole number of at least 1.")
        if self.top_k > self.num_experts:
            raise DataError(f"top_k is {self.top_k}, more than the {self.num_experts} experts of a layer.")
        if self.num_heads % self.num_kv_heads:
            raise DataError(f"num_heads is {self.num_heads}, which is no multiple of num_kv_heads {self.num_kv_heads}.")
        if self.head_dim % 2:
            raise DataError(f"head_dim is {self.head_dim}; the rotary embedding needs an even one.")

    @classmethod
    def from_config(cls, config: Mapping, name: str = "") -> "ModelArch":
        """The shape from a parsed `config.json`; the one place that knows how configs of a family differ.

        Optional fields take the defaults of transformers. Without a dtype, float32 is assumed.

        Raises:
            DataError: an unsupported family or option, or a missing or bad field, which is named.
        """
        if not isinstance(config, Mapping):
            raise DataError(f"the config is {type(config).__name__}; it must be a JSON object.")
        _check_model_type(config.get("model_type"))
        if config.get("hidden_act", "silu") != "silu":
            raise DataError(f"hidden_act is {config['hidden_act']!r}; only 'silu' is supported.")
        hidden = _count(config, "hidden_size")
        num_heads = _count(config, "num_attention_heads")
        head_dim = _count(config, "head_dim", default=None)
        if head_dim is None and hidden % num_heads:
            raise DataError(f"the config lacks head_dim, and hidden_size {hidden} is no multiple of {num_heads} heads.")
        return cls(
            name=name,
            model_type=config["model_type"],
            num_layers=_count(config, "num_hidden_layers"),
            hidden=hidden,
            ffn=_count(config, "intermediate_size"),
            num_experts=_count(config, "num_local_experts"),
            top_k=_count(config, "num_experts_per_tok"),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(config, num_heads),
            head_dim=hidden // num_heads if head_dim is None else head_dim,
            vocab_size=_count(config, "vocab_size"),
            max_position=_count(config, "max_position_embeddings"),
            sliding_window=_count(config, "sliding_window", default=None),
            tied=_tied(config),
            dtype_bytes=_dtype_bytes(config),
            norm_eps=_positive(config, "rms_norm_eps", default=1e-5),
            rope_theta=_rope_theta(config),
        )

    @classmethod
    def from_dir(cls, path: str | os.PathLike) -> "ModelArch":
        """The shape from `config.json` in a checkpoint directory.

        Raises:
            InputMissingError: there is no such file, or it cannot be read.
            DataError: it is not JSON, or `from_config` refuses it.
        """
        path = Path(path)
        return cls.from_config(_read_config(path / "config.json"), name=path.resolve().name)

    @classmethod
    def from_name(cls, name: str) -> "ModelArch":
        """The shape of a known model by hub id or short name, in any case; shapes ship with the package.

        Raises:
            UsageError: the model is not among the known ones, which are listed.
        """
        short_names = sorted(path.stem for path in SHAPES.glob("*.json"))
        shape = SHAPE_OF_HUB_ID.get(name.lower(), name.lower())
        if shape not in short_names:
            raise UsageError(
                f"the shape of {name!r} is not known; give a directory with a config.json, or one of "
                f"{', '.join([*short_names, *SHAPE_OF_HUB_ID])}."
            )
        return cls.from_config(_read_config(SHAPES / f"{shape}.json"), name=name)

    @property
    def projection_params(self) -> int:
        """Weights of one layer's q, k, v and o projections."""
        return 2 * self.hidden * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def router_params(self) -> int:
        """Weights of one layer's router."""
        return self.hidden * self.num_experts

    @property
    def attention_params(self) -> int:
        """Weights of one attention unit: q, k, v, o, the layer's two norms, and its router."""
        return self.projection_params + 2 * self.hidden + self.router_params

    @property
    def expert_params(self) -> int:
        """Weights of one expert: gate, up and down projections."""
        return 3 * self.hidden * self.ffn

    @property
    def embed_params(self) -> int:
        """Weights of the embedding table; the head has as many."""
        return self.vocab_size * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; a table that embedding and head share counts once."""
        layers = self.num_layers * (self.attention_params + self.num_experts * self.expert_params)
        return layers + self.hidden + self.embed_params * (1 if self.tied else 2)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights at rest; for tied models less than the sum over `units`."""
        return self.parameters * self.dtype_bytes

    @property
    def attention_bytes(self) -> int:
        """Stored bytes of one attention unit."""
        return self.attention_params * self.dtype_bytes

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one expert."""
        return self.expert_params * self.dtype_bytes

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token in the linear layers it passes: projections, router, chosen experts and head.

        A multiply-add is two. Attention over the context comes on top.
        """
        layer = self.projection_params + self.router_params + self.top_k * self.expert_params
        return 2 * (self.num_layers * layer + self.embed_params)

    def kv_bytes_per_token_layer(self, dtype_bytes: int = 2) -> int:
        """Bytes of K and V that one token keeps in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * dtype_bytes

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of K and V that one token keeps in all layers."""
        return self.num_layers * self.kv_bytes_per_token_layer(dtype_bytes)

    def expected_experts_touched(self, tokens: float) -> float:
        """Experts of a layer that `tokens` tokens reach under uniform routing: E·(1 − (1 − k/E)^T)."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)

    def fingerprint(self) -> dict[str, str | int]:
        """What must agree between the model of a policy and the model at hand."""
        fields = (
            "model_type", "hidden", "num_layers", "num_experts", "top_k", "num_heads", "num_kv_heads", "head_dim",
            "ffn", "vocab_size",
        )  # fmt: skip
        return {field: getattr(self, field) for field in fields}

    @property
    def num_head_chunks(self) -> int:
        """The fewest equal row chunks of the head that are each no larger than the largest attention or expert unit.

        So the head never asks for a larger slot. The final norm, stored with the first chunk, takes the place of a row.
        """
        max_rows = max(self.expert_params, self.attention_params) // self.hidden
        chunks = -(-self.vocab_size // max_rows)
        while max(-(-self.vocab_size // chunks), self.vocab_size // chunks + 1) > max_rows:
            chunks += 1
        return chunks

    def head_rows(self, index: int) -> tuple[int, int]:
        """(start, stop) of the vocabulary rows in head chunk `index`; chunks differ by at most one row."""
        chunks = self.num_head_chunks
        return index * self.vocab_size // chunks, (index + 1) * self.vocab_size // chunks

    def units(self) -> list[Unit]:
        """All units in schedule order, with their stored bytes.

        A tied model's head chunks refer to the embedding table again: as units they are placed and moved on their own,
        so the sum over units counts the table twice, while `parameters` and `total_bytes` count it once.
        """
        units = [Unit("embed", -1, "embed", self.embed_params * self.dtype_bytes)]
        for layer in range(self.num_layers):
            units.append(Unit(f"layers.{layer}.attention", layer, "attention", self.attention_bytes))
            for expert in range(self.num_experts):
                units.append(Unit(f"layers.{layer}.expert.{expert}", layer, "expert", self.expert_bytes))
        for index in range(self.num_head_chunks):
            start, stop = self.head_rows(index)
            rows = stop - start + (1 if index == 0 else 0)  # the final norm is as long as a row
            units.append(Unit(f"head.{index}", self.num_layers, "head", rows * self.hidden * self.dtype_bytes))
        return units


_REQUIRED = object()


def _check_model_type(model_type) -> None:
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise DataError(f"model_type {model_type!r} is not supported; supported families: {supported}.")


def _count(config: Mapping, field: str, default=_REQUIRED) -> int | None:
    """A whole number of at least 1; a missing or null field gives the default where there is one."""
    value = config.get(field)
    if value is None:
        if default is _REQUIRED:
            raise DataError(f"the config lacks {field}.")
        return default
    if type(value) is not int or value < 1:
        raise DataError(f"{field} in the config is {value!r}; it must be a whole number of at least 1.")
    return value


def _positive(config: Mapping, field: str, default: float) -> float:
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise DataError(f"{field} in the config is {value!r}; it must be a positive number.")
    return float(value)


def _num_kv_heads(config: Mapping, num_heads: int) -> int:
    """transformers takes null for as many as query heads, and an absent field for 8."""
    if "num_key_value_heads" not in config:
        return 8
    return _count(config, "num_key_value_heads", default=num_heads)


def _tied(config: Mapping) -> bool:
    tied = config.get("tie_word_embeddings")
    if tied is None:
        return False
    if not isinstance(tied, bool):
        raise DataError(f"tie_word_embeddings in the config is {tied!r}; it must be true or false.")
    return tied


def _dtype_bytes(config: Mapping) -> int:
    """`torch_dtype` before transformers 5, `dtype` since."""
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(field) or "float32"
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise DataError(f"{field} in the config is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]


def _rope_theta(config: Mapping) -> float:
    """Top level before transformers 5, in `rope_parameters` since. Scaling would change the result: it is refused."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for field, values in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(values, Mapping):
            raise DataError(f"{field} in the config is {values!r}; it must be a JSON object.")
        rope_type = values.get("rope_type", values.get("type", "default"))
        if rope_type != "default":
            raise DataError(f"{field} in the config asks for rope type {rope_type!r}; only 'default' is supported.")
    source = parameters if parameters.get("rope_theta") is not None else config
    return _positive(source, "rope_theta", default=1e6)


def _read_config(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputMissingError(f"the model's config {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the model's config {path} is not valid JSON: {error}.") from error
