"""What a checkpoint calls the weights of each unit, in the layout of the hub and in the packed one.

Attention, norms, embedding and head are called alike in all families; what a layer has of them (biases, norms of heads,
a router or a dense MLP) the shape says. `Names` is what families spell differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cost_model.arch import ModelArch
from flexmoe.layout import Part

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names inside a layer, after ``model.layers.<layer>.``.

    Attributes:
        router, gate, up, down: one tensor per matrix, as on the hub; ``{}`` is the expert's number.
        packed_router, packed_gate_up, packed_down: the experts of a layer stacked, ``[E, 2F, D]`` (gate first) and
            ``[E, D, F]``, as transformers writes them with ``save_original_format=False``.
        dense_gate, dense_up, dense_down: the MLP of a layer without experts, alike in both layouts.
    """

    router: str
    gate: str
    up: str
    down: str
    packed_router: str = "mlp.gate.weight"
    packed_gate_up: str = "mlp.experts.gate_up_proj"
    packed_down: str = "mlp.experts.down_proj"
    dense_gate: str = "mlp.gate_proj.weight"
    dense_up: str = "mlp.up_proj.weight"
    dense_down: str = "mlp.down_proj.weight"

    def are_packed(self, on_disk: Iterable[str]) -> bool:
        """Whether these names of tensors are those of the packed layout."""
        return any(name.endswith(self.packed_gate_up) for name in on_disk)


def unit_parts(arch: ModelArch, names: Names, *, packed: bool) -> dict[str, list[Part]]:
    """The parts of every unit of a shape."""
    return {unit.name: list(_parts(arch, names, packed, unit.kind, unit.layer, unit.name)) for unit in arch.units()}


def _parts(arch: ModelArch, names: Names, packed: bool, kind: str, layer: int, unit: str) -> Iterator[Part]:
    if kind == "embed":
        return iter([Part(role="embed", tensor=_EMBEDDING, shape=(arch.vocab_size, arch.hidden))])
    if kind == "attention":
        return _attention(arch, names, packed, layer)
    number = int(unit.rsplit(".", 1)[1])
    if kind == "head":
        return _head(arch, number)
    if arch.is_dense(layer):
        return _dense(arch, names, layer)
    return _expert(arch, names, packed, layer, number)


def _attention(arch: ModelArch, names: Names, packed: bool, layer: int) -> Iterator[Part]:
    at, hidden, size = f"model.layers.{layer}.", arch.hidden, arch.head_dim
    queries, keys = arch.num_heads * size, arch.num_kv_heads * size
    for role, shape in {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
    }.items():
        yield Part(role=role, tensor=f"{at}self_attn.{role}_proj.weight", shape=shape)
        if arch.attention_bias:
            yield Part(role=f"{role}_bias", tensor=f"{at}self_attn.{role}_proj.bias", shape=shape[:1])
    for role in ("q_norm", "k_norm") if arch.qk_norm else ():
        yield Part(role=role, tensor=f"{at}self_attn.{role}.weight", shape=(size,))
    yield from _norm(arch, "input_norm", f"{at}input_layernorm")
    yield from _norm(arch, "post_norm", f"{at}post_attention_layernorm")
    if not arch.is_dense(layer):
        router = names.packed_router if packed else names.router
        yield Part(role="router", tensor=at + router, shape=(arch.num_experts, hidden))


def _norm(arch: ModelArch, role: str, name: str) -> Iterator[Part]:
    yield Part(role=role, tensor=f"{name}.weight", shape=(arch.hidden,))
    if arch.norm_bias:
        yield Part(role=f"{role}_bias", tensor=f"{name}.bias", shape=(arch.hidden,))


def _expert(arch: ModelArch, names: Names, packed: bool, layer: int, expert: int) -> Iterator[Part]:
    at, up, down = f"model.layers.{layer}.", (arch.ffn, arch.hidden), (arch.hidden, arch.ffn)
    if not packed:
        for role, name, shape in (("gate", names.gate, up), ("up", names.up, up), ("down", names.down, down)):
            yield Part(role=role, tensor=at + name.format(expert), shape=shape)
        return
    size = arch.ffn * arch.hidden
    both, downs = (arch.num_experts, 2 * arch.ffn, arch.hidden), (arch.num_experts, *down)
    for role, index in (("gate", 2 * expert), ("up", 2 * expert + 1)):
        yield Part(role=role, tensor=at + names.packed_gate_up, shape=up, first_element=index * size, whole=both)
    yield Part(role="down", tensor=at + names.packed_down, shape=down, first_element=expert * size, whole=downs)


def _dense(arch: ModelArch, names: Names, layer: int) -> Iterator[Part]:
    at, up, down = f"model.layers.{layer}.", (arch.dense_ffn, arch.hidden), (arch.hidden, arch.dense_ffn)
    yield Part(role="gate", tensor=at + names.dense_gate, shape=up)
    yield Part(role="up", tensor=at + names.dense_up, shape=up)
    yield Part(role="down", tensor=at + names.dense_down, shape=down)


def _head(arch: ModelArch, chunk: int) -> Iterator[Part]:
    first, last = arch.head_rows(chunk)
    table, rows = (arch.vocab_size, arch.hidden), last - first
    name = _EMBEDDING if arch.tied else "lm_head.weight"
    yield Part(role="head", tensor=name, shape=(rows, arch.hidden), first_element=first * arch.hidden, whole=table)
    if arch.head_bias:
        yield Part(role="head_bias", tensor="lm_head.bias", shape=(rows,), first_element=first, whole=table[:1])
    if chunk == 0:
        yield from _norm(arch, "norm", "model.norm")
