"""What a checkpoint calls the weights of each unit, in the layout of the hub and in the packed one.

Attention, norms, embedding and head are called alike in all families; what a layer has of them (biases, norms of heads,
a router or a dense MLP) the shape says. `Names` is what families spell differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import head_rows, units_of
from flexmoe.checkpoint.unit_layout import WIDE_ROUTER, Part
from policies.units import KINDS, UnitId

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names inside a layer, after ``model.layers.<layer>.``.

    Attributes:
        router, gate, up, down: one tensor per matrix, as on the hub; ``{}`` is the expert's number.
        packed_router, packed_gate_up, packed_down: the experts of a layer stacked, ``[E, 2F, D]`` (gate first) and
            ``[E, D, F]``, as transformers writes them with ``save_original_format=False``.
        dense_gate, dense_up, dense_down: the MLP of a layer without experts, alike in both layouts.
        stacked_only: there is no other layout than the packed one, and what is not quantized is ``[E, D, 2F]`` and ``[E, F, D]``.
        correction, packed_correction: what the router adds for the choice only.
    """

    router: str = ""
    gate: str = ""
    up: str = ""
    down: str = ""
    packed_router: str = "mlp.gate.weight"
    packed_gate_up: str = "mlp.experts.gate_up_proj"
    packed_down: str = "mlp.experts.down_proj"
    dense_gate: str = "mlp.gate_proj.weight"
    dense_up: str = "mlp.up_proj.weight"
    dense_down: str = "mlp.down_proj.weight"
    correction: str = "mlp.gate.e_score_correction_bias"
    packed_correction: str = "mlp.gate.e_score_correction_bias"
    stacked_only: bool = False

    def are_packed(self, on_disk: Iterable[str]) -> bool:
        """Whether these names of tensors are those of the packed layout."""
        return self.stacked_only or any(name.endswith(self.packed_gate_up) for name in on_disk)


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
        return _matrices(
            arch.hidden, arch.dense_ffn, [(at + names.dense_gate, at + names.dense_up, at + names.dense_down)]
        )
    if packed:
        return _slices(arch, names, at, unit.experts)
    own = [tuple(at + name.format(e) for name in (names.gate, names.up, names.down)) for e in unit.experts]
    return _matrices(arch.hidden, arch.ffn, own)


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
    if arch.sinks:
        yield Part(role="sinks", tensor=f"{at}self_attn.sinks", shape=(arch.num_heads,))
    yield from _norm(arch, "input_norm", f"{at}input_layernorm")
    yield from _norm(arch, "post_norm", f"{at}post_attention_layernorm")
    if not arch.is_dense(layer):
        router = names.packed_router if packed else names.router
        role = WIDE_ROUTER if arch.router_float32 else "router"
        yield Part(role=role, tensor=at + router, shape=(arch.num_experts, hidden))
        if arch.router_bias:
            bias = router.removesuffix(".weight") + ".bias"
            yield Part(role="router_bias", tensor=at + bias, shape=(arch.num_experts,))
        if arch.router_correction:
            name = names.packed_correction if packed else names.correction
            yield Part(role="correction", tensor=at + name, shape=(arch.num_experts,))


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


def _slices(arch: ModelArch, names: Names, at: str, experts: range) -> Iterator[Part]:
    """Experts that lie packed on disk: one stretch of each of the layer's two tensors, and of each of their biases."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "gate_up": (names.packed_gate_up, (2 * arch.ffn, arch.hidden)),
        "down": (names.packed_down, (arch.hidden, arch.ffn)),
    }
    if arch.expert_bias:
        shapes |= {f"{role}_bias": (f"{name}_bias", shape[:1]) for role, (name, shape) in shapes.items()}
    for role, (name, shape) in shapes.items():
        stored = shape[::-1] if names.stacked_only and not arch.is_packed("expert") else shape
        first, whole = experts[0] * prod(shape), (arch.num_experts, *stored)
        yield Part(role=role, tensor=at + name, shape=(len(experts), *stored), first_element=first, whole=whole)


def _head(arch: ModelArch, chunk: int) -> Iterator[Part]:
    first, last = head_rows(arch, chunk)
    table, rows = (arch.vocab_size, arch.hidden), last - first
    name = _EMBEDDING if arch.tied else "lm_head.weight"
    yield Part(role="head", tensor=name, shape=(rows, arch.hidden), first_element=first * arch.hidden, whole=table)
    if arch.head_bias:
        yield Part(role="head_bias", tensor="lm_head.bias", shape=(rows,), first_element=first, whole=table[:1])
    if chunk == 0:
        yield from _norm(arch, "norm", "model.norm")
