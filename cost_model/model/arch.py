"""The shape of a model from its `config.json`: weights and FLOPs per module, KV bytes per token. No hardware, no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any

from cost_model.model.families import check_model_type, shape_fields
from cost_model.model.known_shapes import known_config, read_config
from cost_model.model.kv_bytes import kv_head_bytes
from cost_model.model.packed_format import PackedFormat
from policies.common.errors import DataError, UsageError

QK_NORMS = ("", "head", "rotated", "projection")
_COUNTS = (
    "num_layers",
    "hidden",
    "ffn",
    "num_experts",
    "top_k",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_position",
    "dtype_bytes",
)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose KV lies in the same pages: alike in their window, and as many as in every other group.

    Args:
        window: tokens that they look back, the query's own included; None is all.
        layers: their numbers.
    """

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArch:
    """A Mixture-of-Experts decoder, as far as bytes and FLOPs depend on it.

    Attributes without a layer mean a sparse layer, one with experts. Where layers may differ there is a method `..._in`.

    Args:
        name: for people; hub id, directory name or "".
        model_type: the family, one of `families.SUPPORTED_MODEL_TYPES`.
        num_layers, hidden, vocab_size, max_position: as in the config.
        ffn: width of one expert.
        num_experts, top_k: experts per layer, and how many a token is routed to.
        num_heads, num_kv_heads, head_dim: attention; a group of query heads shares a KV head.
        sliding_window: tokens that attention looks back, itself included; None is all.
        full_layers: layers that look back to the first token though the model has a window, in ascending order.
        tied: the head is the embedding table.
        dtype_bytes: bytes of one stored weight, where it is not packed.
        norm_eps, rope_theta: constants of the norms and of the rotary embedding.
        rotary_dim: dimensions of a head, its first ones, that the rotary embedding turns; None: all.
        rope_interleaved: it turns neighbours together, not the two halves of a head.
        attention_bias: q, k and v add a bias; so does o, unless not `output_bias`.
        output_bias: of `attention_bias`.
        head_bias: the head adds one, also where its table is tied.
        norm_bias: the norms over the hidden state have a bias beside the weight.
        sinks: each query head has a score in the softmax of attention that belongs to no key.
        expert_bias: the matrices of experts have biases.
        gate_up_alternate: as gpt-oss has experts: rows of gate and up alternate in one matrix, and matrices that are not packed lie
            with inputs before outputs.
        qk_norm: how queries and keys are normed: not (""), each "head" by one weight of `head_dim`, the same once it is
            "rotated", or the whole "projection" by one weight for all heads.
        shared_ffn: width of the MLP that every token of a sparse layer passes beside its experts; 0 where there is none. It is
            part of the attention unit, as the router is.
        shared_gate: its output is weighed by a sigmoid of the token.
        dense_layers: layers whose feed-forward network is one MLP that every token passes, in ascending order. Where all are,
            `num_experts` and `top_k` are 1 and `ffn` is `dense_ffn`.
        dense_ffn: its width; 0 where there is none.
        router_bias: the router adds a bias.
        router_correction: it adds another one for the choice only, which is kept in float32.
        router_float32: its weight is kept, and its logits are computed, in float32 whatever the dtype of the others is.
        rope_switch: longest row that the rotary embedding turns by its first set of factors; a row that grows past it is
            computed anew with the second. None: one set for all.
        group: consecutive experts of a layer that are moved as one; None: as `weight_units.experts_per_unit` has it.
        packed: how matrices lie packed at rest, on the links and on the device; None: none do.

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
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    attention_bias: bool = False
    output_bias: bool = True
    head_bias: bool = False
    norm_bias: bool = False
    sinks: bool = False
    expert_bias: bool = False
    gate_up_alternate: bool = False
    full_layers: tuple[int, ...] = ()
    qk_norm: str = ""
    shared_ffn: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    dense_ffn: int = 0
    router_bias: bool = False
    router_correction: bool = False
    router_float32: bool = False
    rope_switch: int | None = None
    group: int | None = None
    packed: PackedFormat | None = None

    def __post_init__(self) -> None:
        check_model_type(self.model_type)
        optional = [
            field
            for field in ("sliding_window", "rope_switch", "rotary_dim", "group")
            if getattr(self, field) is not None
        ]
        for field in (*_COUNTS, *optional, *(["dense_ffn"] if self.dense_layers else [])):
            if type(getattr(self, field)) is not int or getattr(self, field) < 1:
                raise DataError(f"{field} is {getattr(self, field)!r}; it must be a whole number of at least 1.")
        if self.top_k > self.num_experts:
            raise DataError(f"top_k is {self.top_k}, more than the {self.num_experts} experts of a layer.")
        if self.num_heads % self.num_kv_heads:
            raise DataError(f"num_heads is {self.num_heads}, which is no multiple of num_kv_heads {self.num_kv_heads}.")
        if self.head_dim % 2:
            raise DataError(f"head_dim is {self.head_dim}; the rotary embedding needs an even one.")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise DataError(
                f"the rotary embedding turns {self.rotary_dim} dimensions of a head of {self.head_dim}; they must be even, and "
                "no more than it has."
            )
        if type(self.shared_ffn) is not int or self.shared_ffn < 0:
            raise DataError(f"shared_ffn is {self.shared_ffn!r}; it must be a whole number of at least 0.")
        if self.qk_norm not in QK_NORMS:
            raise DataError(f"qk_norm is {self.qk_norm!r}; it must be one of {', '.join(map(repr, QK_NORMS))}.")
        self._check_dense_layers()
        self._check_layers("full_layers")

    def _check_layers(self, field: str) -> None:
        layers = getattr(self, field)
        whole = type(layers) is tuple and all(type(layer) is int for layer in layers)
        if not whole or list(layers) != sorted({layer for layer in layers if 0 <= layer < self.num_layers}):
            raise DataError(f"{field} is {layers!r}; it must list layers from 0 to {self.num_layers - 1} in order.")

    def _check_dense_layers(self) -> None:
        layers = self.dense_layers
        self._check_layers("dense_layers")
        if len(layers) == self.num_layers and (self.num_experts, self.top_k, self.ffn) != (1, 1, self.dense_ffn):
            raise DataError("every layer of the model is dense, but it has experts.")
        if self.dense_ffn and not layers:
            raise DataError(f"dense_ffn is {self.dense_ffn}, but no layer is dense.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> "ModelArch":
        """The shape from a parsed `config.json`.

        Raises:
            DataError: `families.shape_fields` refuses it, or its values contradict each other.
        """
        return cls(name=name, **shape_fields(config))

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> "ModelArch":
        """The shape from `config.json` in a checkpoint directory.

        Raises:
            InputMissingError: there is no such file, or it cannot be read.
            DataError: it is not JSON, or `from_config` refuses it.
        """
        path = Path(path)
        return cls.from_config(read_config(path / "config.json"), name=path.resolve().name)

    @classmethod
    def from_name(cls, name: str) -> "ModelArch":
        """The shape of a known model by hub id or short name, in any case; shapes ship with the package.

        Raises:
            UsageError: the model is not among the known ones, which are listed.
        """
        return cls.from_config(known_config(name), name=name)

    def check_rows(self, tokens: int) -> None:
        """Shows that rows of so many tokens, prompt and completion, are no longer than the context.

        Raises:
            UsageError: they are.
        """
        if tokens > self.max_position:
            raise UsageError(
                f"rows of {tokens} tokens, prompt and completion, are longer than the context of {self.name or 'the model'}, "
                f"which is {self.max_position} tokens; give shorter prompts or completions"
            )

    @property
    def projection_params(self) -> int:
        """Weights of one layer's q, k, v and o projections, without biases."""
        return 2 * self.hidden * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def router_params(self) -> int:
        """Weights of one layer's router, without biases."""
        return self.hidden * self.num_experts

    @property
    def routing_params(self) -> int:
        """Weights of one layer's router, with its bias and its correction."""
        return self.router_params + self.num_experts * (self.router_bias + self.router_correction)

    @property
    def _float32_params(self) -> int:
        """Weights of one layer's router that are kept in float32."""
        return (self.router_params if self.router_float32 else 0) + self.num_experts * self.router_correction

    @property
    def shared_params(self) -> int:
        """Weights of the MLP that every token of a sparse layer passes beside its experts, with its gate."""
        return 3 * self.hidden * self.shared_ffn + (self.hidden if self.shared_gate else 0)

    @property
    def norm_params(self) -> int:
        """Weights of one norm over the hidden state: two in a layer, and a final one."""
        return self.hidden * (2 if self.norm_bias else 1)

    @property
    def attention_params(self) -> int:
        """Weights of one attention unit: q, k, v, o and their biases, the layer's norms, its router and its shared MLP."""
        biases = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) + self.hidden * self.output_bias
        heads = self.num_heads + self.num_kv_heads if self.qk_norm == "projection" else 2 * bool(self.qk_norm)
        own = self.projection_params + biases * self.attention_bias + 2 * self.norm_params + self.head_dim * heads
        return own + self._sparse_params + (self.num_heads if self.sinks else 0)

    @property
    def _sparse_params(self) -> int:
        """Weights of an attention unit that only a sparse layer has."""
        return self.routing_params + self.shared_params

    @property
    def expert_params(self) -> int:
        """Weights of one expert: gate, up and down projections, without biases."""
        return 3 * self.hidden * self.ffn

    @property
    def expert_bias_params(self) -> int:
        """Biases of one expert."""
        return 2 * self.ffn + self.hidden if self.expert_bias else 0

    @property
    def dense_params(self) -> int:
        """Weights of the MLP of a dense layer; 0 where there is none."""
        return 3 * self.hidden * self.dense_ffn

    @property
    def embed_params(self) -> int:
        """Weights of the embedding table; the head's table has as many."""
        return self.vocab_size * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; a table that embedding and head share counts once."""
        sparse, dense = self.num_layers - len(self.dense_layers), len(self.dense_layers)
        layers = sparse * (self.attention_params + self.num_experts * (self.expert_params + self.expert_bias_params))
        layers += dense * (self.attention_params - self._sparse_params + self.dense_params)
        head = (0 if self.tied else self.embed_params) + (self.vocab_size if self.head_bias else 0)
        return self.embed_params + layers + self.norm_params + head

    @property
    def active_parameters(self) -> int:
        """Weights that a token passes, the embedding table whole: all but the experts that it is not routed to."""
        unused = (self.num_layers - len(self.dense_layers)) * (self.num_experts - self.top_k)
        return self.parameters - unused * self.expert_params

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights at rest; for tied models less than the sum over `weight_units.units_of`."""
        layers = range(self.num_layers)
        modules = sum(
            self.attention_bytes_in(layer) + self.experts_in(layer) * self.expert_bytes_in(layer) for layer in layers
        )
        head = (0 if self.tied else self.embed_params) + (self.vocab_size if self.head_bias else 0)
        return modules + (self.embed_params + self.norm_params + head) * self.dtype_bytes

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one expert."""
        return self._mlp_bytes(self.ffn, "expert") + self.expert_bias_params * self.dtype_bytes

    def expert_bytes_in(self, layer: int) -> int:
        """Stored bytes of one expert of a layer, or of its MLP."""
        return self._mlp_bytes(self.dense_ffn, "dense") if self.is_dense(layer) else self.expert_bytes

    def attention_bytes_in(self, layer: int) -> int:
        """Stored bytes of a layer's attention unit."""
        wide = 0 if self.is_dense(layer) else self._float32_params
        params, packed_bytes = self.attention_params_in(layer) - wide, 0
        if self.packed is not None and self.is_packed("attention"):
            queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            shapes = ((queries, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, queries))
            packed_bytes += sum(self.packed.matrix_bytes(*shape) for shape in shapes)
            params -= self.projection_params
        if self.shared_ffn and not self.is_dense(layer) and self.is_packed("dense"):
            packed_bytes += self._mlp_bytes(self.shared_ffn, "dense")
            params -= 3 * self.hidden * self.shared_ffn
        return params * self.dtype_bytes + 4 * wide + packed_bytes

    def _mlp_bytes(self, width: int, kind: str) -> int:
        if self.packed is None or kind not in self.packed.kinds:
            return 3 * self.hidden * width * self.dtype_bytes
        return 2 * self.packed.matrix_bytes(width, self.hidden) + self.packed.matrix_bytes(self.hidden, width)

    def is_packed(self, kind: str) -> bool:
        """Whether the matrices of attention modules (`attention`), experts (`expert`), or MLPs of dense layers and shared ones
        (`dense`) are."""
        return self.packed is not None and kind in self.packed.kinds

    def computed_bytes(self, stored: int, compute_bytes: int) -> int:
        """Bytes on the compute device of units of so many stored bytes, where numbers take ``compute_bytes``.

        Packed numbers and float32 ones stay as they are, so where there are some this is a bound.
        """
        if self.packed is None and not self._float32_params:
            return stored // self.dtype_bytes * compute_bytes
        return -(-stored * max(compute_bytes, self.dtype_bytes) // self.dtype_bytes)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token in the linear layers it passes: projections, router, chosen and shared experts, and head.

        A multiply-add is two. Biases, norms and attention over the context come on top.
        """
        sparse = self.router_params + self.shared_params + self.top_k * self.expert_params
        layers = self.num_layers * (self.projection_params + sparse)
        return 2 * (layers - len(self.dense_layers) * (sparse - self.dense_params) + self.embed_params)

    def is_dense(self, layer: int) -> bool:
        """Whether every token of a layer passes the same MLP. The MLP is the layer's unit `layers.L.expert.0`."""
        return layer in self.dense_layers

    def experts_in(self, layer: int) -> int:
        """Experts of a layer; the MLP of a dense layer counts as one."""
        return 1 if self.is_dense(layer) else self.num_experts

    def grouped(self, group: int | None) -> "ModelArch":
        """This shape with units of so many experts; None leaves it as it is."""
        return self if group is None else replace(self, group=group)

    def top_k_in(self, layer: int) -> int:
        """How many of them a token passes."""
        return 1 if self.is_dense(layer) else self.top_k

    def ffn_in(self, layer: int) -> int:
        """Width of each of them."""
        return self.dense_ffn if self.is_dense(layer) else self.ffn

    def expert_params_in(self, layer: int) -> int:
        """Weights of each of them."""
        return self.dense_params if self.is_dense(layer) else self.expert_params

    def attention_params_in(self, layer: int) -> int:
        """Weights of a layer's attention unit; a dense layer has no router and no shared MLP."""
        return self.attention_params - (self._sparse_params if self.is_dense(layer) else 0)

    def window_in(self, layer: int) -> int | None:
        """Tokens that a layer's attention looks back, itself included; None is all."""
        return None if layer in self.full_layers else self.sliding_window

    @property
    def windowed_share(self) -> float:
        """Part of the layers that look back through the window."""
        return 0.0 if self.sliding_window is None else 1 - len(self.full_layers) / self.num_layers

    @property
    def kv_groups(self) -> tuple[LayerGroup, ...]:
        """The layers in groups that share pages of KV; one where all are alike."""
        return _layer_groups(self.num_layers, self.sliding_window, self.full_layers)

    def kv_page_bytes(self, page_tokens: int, dtype_bytes: int, *, compressed: bool = False) -> int:
        """Bytes of a page of KV, which has so many tokens in the layers of a group."""
        each = self.kv_bytes_per_token_layer(dtype_bytes, compressed=compressed)
        return page_tokens * len(self.kv_groups[0].layers) * each

    def kv_bytes_per_token_layer(self, dtype_bytes: int = 2, *, compressed: bool = False) -> int:
        """Bytes of K and V that one token keeps in one layer; ``compressed``: as int8 (`cost_model.model.kv_bytes`)."""
        return 2 * self.num_kv_heads * kv_head_bytes(self.head_dim, dtype_bytes, compressed=compressed)

    def kv_bytes_per_token(self, dtype_bytes: int = 2, *, compressed: bool = False) -> int:
        """Bytes of K and V that one token keeps in all layers, while all of them see it."""
        return self.num_layers * self.kv_bytes_per_token_layer(dtype_bytes, compressed=compressed)

    def expected_experts_touched(self, tokens: float) -> float:
        """Experts of a sparse layer that `tokens` tokens reach under uniform routing: E·(1 − (1 − k/E)^T)."""
        missed: float = (1 - self.top_k / self.num_experts) ** tokens
        return self.num_experts * (1 - missed)

    def fingerprint(self) -> dict[str, str | int | list[int]]:
        """What must agree between the model of a policy and the given model; what a model lacks is left out."""
        fields = (
            "model_type",
            "hidden",
            "num_layers",
            "num_experts",
            "top_k",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn",
            "vocab_size",
        )
        optional = {
            "attention_bias": self.attention_bias,
            "sliding_window": self.full_layers and self.sliding_window or 0,
            "full_layers": list(self.full_layers),
            "sinks": self.sinks,
            "expert_bias": self.expert_bias,
            "head_bias": self.head_bias,
            "dense_layers": list(self.dense_layers),
            "dense_ffn": self.dense_ffn,
            "weight_format": self.packed.describe() if self.packed else "",
        }
        return {f: getattr(self, f) for f in fields} | {f: value for f, value in optional.items() if value}

    @property
    def head_row_params(self) -> int:
        """Weights of one row of the head, with its bias."""
        return self.hidden + (1 if self.head_bias else 0)


@lru_cache(maxsize=16)
def _layer_groups(layers: int, window: int | None, full_layers: tuple[int, ...]) -> tuple[LayerGroup, ...]:
    windowed = [] if window is None else [layer for layer in range(layers) if layer not in full_layers]
    full = [layer for layer in range(layers) if layer not in windowed]
    size = gcd(len(full), len(windowed))
    return tuple(
        LayerGroup(own, tuple(alike[at : at + size]))
        for own, alike in ((None, full), (window, windowed))
        for at in range(0, len(alike), size)
    )
