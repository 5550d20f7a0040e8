"""What a checkpoint calls the weights of each unit, in the layout of the hub and in the packed one.

Attention, norms, embedding and head are called alike in all families; what a layer has of them (biases, norms of heads,
a router or a dense MLP) the shape says. `Names` is what families spell differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import head_rows, units_of
from flexmoe.checkpoint.unit_layout import WIDE_ROUTER, Part
from policies.units import KINDS, UnitId

#: Before the names of a decoder that is part of a larger model.
_PART_OF_MODEL = re.compile(r"^(model\.)?language_model\.")
Stored = TypeVar("Stored")

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names inside a layer, after ``model.layers.<layer>.``.

    Attributes:
        router, gate, up, down: one tensor per matrix, as on the hub; ``{}`` is the expert's number.
        gate_up: where the hub has the experts of a layer stacked, too, under this name and ``down``.
        packed_router, packed_gate_up, packed_down: the experts of a layer stacked, ``[E, 2F, D]`` (gate first) and
            ``[E, D, F]``, as transformers writes them with ``save_original_format=False``.
        dense_gate, dense_up, dense_down: the MLP of a layer without experts, alike in both layouts.
        dense_gate_up: where they are one matrix, gate first, the name of it.
        qkv: where queries, keys and values have one matrix, in this order, the name of it.
        q_norm, k_norm: of queries and keys.
        shared: the MLP that every token passes beside its experts.
        shared_gate: what weighs it.
        correction, packed_correction: what the router adds for the choice only.
        correction_rank: dimensions of that tensor; all but the last are 1.
    """

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{}.gate_proj.weight"
    up: str = "mlp.experts.{}.up_proj.weight"
    down: str = "mlp.experts.{}.down_proj.weight"
    gate_up: str = ""
    packed_router: str = "mlp.gate.weight"
    packed_gate_up: str = "mlp.experts.gate_up_proj"
    packed_down: str = "mlp.experts.down_proj"
    dense_gate: str = "mlp.gate_proj.weight"
    dense_up: str = "mlp.up_proj.weight"
    dense_down: str = "mlp.down_proj.weight"
    dense_gate_up: str = ""
    qkv: str = ""
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate.weight"
    correction: str = "mlp.gate.e_score_correction_bias"
    packed_correction: str = "mlp.gate.e_score_correction_bias"
    correction_rank: int = 1

    def are_packed(self, on_disk: Iterable[str]) -> bool:
        """Whether these names of tensors are those of the packed layout."""
        return any(name.endswith(self.packed_gate_up) for name in on_disk)


def decoder_tensors(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Stored]:
    """What a checkpoint has of the decoder, by the names of a model that is nothing else.

    Args:
        tensors: by their names on disk. The decoder may be a part of a larger model (`language_model.`), and layers behind
            the last one may only predict further tokens (``num_nextn_predict_layers``); those are left out.
        config: the parsed `config.json`.
    """
    last, further = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers") or 0
    unread = tuple(f"model.layers.{last + at}." for at in range(further)) if isinstance(last, int) else ()
    found = {}
    for name, tensor in tensors.items():
        own = _PART_OF_MODEL.sub("", name)
        own = own if own == name or own.startswith(("model.", "lm_head.")) else f"model.{own}"
        if not own.startswith(unread):
            found[own] = tensor
    return found


def unit_parts(
    arch: ModelArch, names: Names, *, packed: bool, kinds: Sequence[str] = KINDS
) -> dict[UnitId, list[Part]]:
    """The parts of every unit of these kinds of a shape."""
    units = [unit.id for unit in units_of(arch) if unit.kind in kinds]
    return {unit: list(_parts(arch, names, packed, unit)) for unit in units}


@dataclass(frozen=True, slots=True)
class HubMatrix:
    """Where a checkpoint has what the hub's layout has in a tensor of its own.

    Attributes:
        tensor: its name there.
        first: index of the first element in it.
        shape: of the tensor in the hub's layout, or of a part of it.
    """

    tensor: str
    first: int
    shape: tuple[int, ...]


def hub_matrices(arch: ModelArch, names: Names, on_disk: Iterable[str]) -> dict[str, HubMatrix]:
    """The tensors of the hub's layout by name, in a checkpoint of floats of either layout."""
    stored = unit_parts(arch, names, packed=names.are_packed(on_disk))
    found: dict[str, HubMatrix] = {}
    for unit, parts in unit_parts(arch, names, packed=False).items():
        own = {(part.role, part.into): part for part in stored[unit]}
        for part in parts:
            there = own.get((part.role, part.into)) or own[part.role, 0]  # all experts in one
            first = there.first_element + part.into - there.into
            found.setdefault(part.tensor, HubMatrix(there.tensor, first, part.shape))
    return found


def _parts(arch: ModelArch, names: Names, packed: bool, unit: UnitId) -> Iterator[Part]:
    kind, layer = unit.kind, unit.layer
    if kind == "embed":
        return iter([Part(role="embed", tensor=_EMBEDDING, shape=(arch.vocab_size, arch.hidden))])
    if kind == "attention":
        return _attention(arch, names, packed, layer)
    if kind == "head":
        return _head(arch, unit.first)
    at = f"model.layers.{layer}."
    if arch.is_dense(layer):
        return _dense(arch, names, at)
    if packed:
        return _slices(arch, at + names.packed_gate_up, at + names.packed_down, unit.experts)
    if names.gate_up:
        return _slices(arch, at + names.gate_up, at + names.down, unit.experts)
    own = [tuple(at + name.format(e) for name in (names.gate, names.up, names.down)) for e in unit.experts]
    return _matrices(arch.hidden, arch.ffn, own)


def _attention(arch: ModelArch, names: Names, packed: bool, layer: int) -> Iterator[Part]:
    at, hidden = f"model.layers.{layer}.", arch.hidden
    heads = {"q": arch.num_heads, "k": arch.num_kv_heads, "v": arch.num_kv_heads}
    shapes = {role: (count * arch.head_dim, hidden) for role, count in heads.items()}
    whole, first = (sum(rows for rows, _ in shapes.values()), hidden), 0
    for role, shape in shapes.items():
        if names.qkv:
            yield Part(role=role, tensor=at + names.qkv, shape=shape, first_element=first, whole=whole)
            first += shape[0] * hidden
        else:
            yield from _projection(f"{at}self_attn.{role}_proj", role, shape, arch.attention_bias)
    out = (hidden, arch.num_heads * arch.head_dim)
    yield from _projection(f"{at}self_attn.o_proj", "o", out, arch.attention_bias and arch.output_bias)
    if arch.sinks:
        yield Part(role="sinks", tensor=f"{at}self_attn.sinks", shape=(arch.num_heads,))
    if arch.qk_norm:
        together = arch.qk_norm == "projection"
        for role, name, count in (("q_norm", names.q_norm, heads["q"]), ("k_norm", names.k_norm, heads["k"])):
            yield Part(role=role, tensor=at + name, shape=((count if together else 1) * arch.head_dim,))
    yield from _norm(arch, "input_norm", f"{at}input_layernorm")
    yield from _norm(arch, "post_norm", f"{at}post_attention_layernorm")
    if not arch.is_dense(layer):
        yield from _router(arch, names, packed, at)
        yield from _shared(arch, names, at)


def _projection(name: str, role: str, shape: tuple[int, int], bias: bool) -> Iterator[Part]:
    yield Part(role=role, tensor=f"{name}.weight", shape=shape)
    if bias:
        yield Part(role=f"{role}_bias", tensor=f"{name}.bias", shape=shape[:1])


def _router(arch: ModelArch, names: Names, packed: bool, at: str) -> Iterator[Part]:
    router, experts = at + (names.packed_router if packed else names.router), arch.num_experts
    role = WIDE_ROUTER if arch.router_float32 else "router"
    yield Part(role=role, tensor=router, shape=(experts, arch.hidden))
    if arch.router_bias:
        yield Part(role="router_bias", tensor=f"{router.removesuffix('.weight')}.bias", shape=(experts,))
    if arch.router_correction:
        name = names.packed_correction if packed else names.correction
        whole = (1,) * (names.correction_rank - 1) + (experts,)
        yield Part(role="correction", tensor=at + name, shape=(experts,), whole=whole)


def _shared(arch: ModelArch, names: Names, at: str) -> Iterator[Part]:
    if not arch.shared_ffn:
        return
    own = tuple(f"{at}{names.shared}.{role}_proj.weight" for role in ("gate", "up", "down"))
    for part in _matrices(arch.hidden, arch.shared_ffn, [own]):
        yield replace(part, role=f"shared {part.role}")
    if arch.shared_gate:
        yield Part(role="shared gate", tensor=at + names.shared_gate, shape=(1, arch.hidden))


def _dense(arch: ModelArch, names: Names, at: str) -> Iterator[Part]:
    if not names.dense_gate_up:
        own = (at + names.dense_gate, at + names.dense_up, at + names.dense_down)
        return _matrices(arch.hidden, arch.dense_ffn, [own])
    both, down = (2 * arch.dense_ffn, arch.hidden), (arch.hidden, arch.dense_ffn)
    return iter(
        [
            Part(role="gate_up", tensor=at + names.dense_gate_up, shape=both, of=(1, *both)),
            Part(role="down", tensor=at + names.dense_down, shape=down, of=(1, *down)),
        ]
    )


def _norm(arch: ModelArch, role: str, name: str) -> Iterator[Part]:
    yield Part(role=role, tensor=f"{name}.weight", shape=(arch.hidden,))
    if arch.norm_bias:
        yield Part(role=f"{role}_bias", tensor=f"{name}.bias", shape=(arch.hidden,))


def _matrices(hidden: int, ffn: int, experts: Sequence[Sequence[str]]) -> Iterator[Part]:
    """Experts of which each matrix is a tensor: gate before up in one tensor ``[n, 2F, D]``, and down ``[n, D, F]``."""
    count, size, both = len(experts), ffn * hidden, (len(experts), 2 * ffn, hidden)
    for at, (gate, up, _) in enumerate(experts):
        yield Part(role="gate_up", tensor=gate, shape=(ffn, hidden), of=both, into=2 * at * size)
        yield Part(role="gate_up", tensor=up, shape=(ffn, hidden), of=both, into=(2 * at + 1) * size)
    for at, (_, _, down) in enumerate(experts):
        yield Part(role="down", tensor=down, shape=(hidden, ffn), of=(count, hidden, ffn), into=at * size)


def _slices(arch: ModelArch, gate_up: str, down: str, experts: range) -> Iterator[Part]:
    """Experts that lie stacked on disk: one stretch of each of the layer's two tensors, and of each of their biases."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "gate_up": (gate_up, (2 * arch.ffn, arch.hidden)),
        "down": (down, (arch.hidden, arch.ffn)),
    }
    if arch.expert_bias:
        shapes |= {f"{role}_bias": (f"{name}_bias", shape[:1]) for role, (name, shape) in shapes.items()}
    for role, (name, shape) in shapes.items():
        stored = shape[::-1] if arch.gate_up_alternate and not arch.is_packed("expert") else shape
        first, whole = experts[0] * prod(shape), (arch.num_experts, *stored)
        yield Part(role=role, tensor=name, shape=(len(experts), *stored), first_element=first, whole=whole)


def _head(arch: ModelArch, chunk: int) -> Iterator[Part]:
    first, last = head_rows(arch, chunk)
    table, rows = (arch.vocab_size, arch.hidden), last - first
    name = _EMBEDDING if arch.tied else "lm_head.weight"
    yield Part(role="head", tensor=name, shape=(rows, arch.hidden), first_element=first * arch.hidden, whole=table)
    if arch.head_bias:
        yield Part(role="head_bias", tensor="lm_head.bias", shape=(rows,), first_element=first, whole=table[:1])
    if chunk == 0:
        yield from _norm(arch, "norm", "model.norm")
