"""What the families share: a pre-norm decoder with grouped-query attention, rotary embedding and gated experts.

A family is a subclass in a file of its own. It gives the names of its weights and its router, and replaces the norm or
the rotary embedding where it has another one. What else families differ in follows from the shape: a bias, a norm of
heads or a dense MLP is there when its weight is.

Legend: T tokens, D hidden, F expert width, E experts, K chosen experts, H query heads, G KV heads, Dh head size,
R rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from cost_model.memory.memory_plan import EXPERT_CHUNK_TOKENS
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import experts_per_unit, units_of
from flexmoe.checkpoint.unit_layout import WIDE_ROUTER, Part
from flexmoe.formats.packed_matrix import PackedMatrix, fields_of, packed_parts
from flexmoe.kernels.elementwise import NewKV, add_and_norm, rms_norm, rotate, silu_gate
from flexmoe.kernels.expert_weights import ExpertProducts, ExpertWeights, PackedShape
from flexmoe.kernels.family import Rope, Weights
from flexmoe.kernels.linear import linear
from flexmoe.models.common.names import Names, unit_parts
from flexmoe.models.common.rotary import Rotary
from flexmoe.models.common.router import Choice, Router, Routing
from policies.units import UnitId

#: Beginning of the roles of the MLP that every token of a layer passes beside its experts.
_SHARED = "shared "
#: What may be packed of a unit; norms, biases and routers are not.
_PACKED_ROLES = frozenset(("q", "k", "v", "o", "gate_up", "down", "shared gate_up", "shared down"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Multipliers:
    """Constants that scale hidden states and change neither bytes nor FLOPs.

    Args:
        embedding: on rows of the embedding table.
        attention: on the scores of attention; None: one over the root of the size of a head.
        residual: on what attention adds to the residual stream. What experts add is scaled by their router.
        logits: on the input of the head.
    """

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0


class Decoder:
    """A family's mathematics over weights that it is handed per unit, and the checkpoint names of those weights.

    Args:
        arch: the shape.
        config: the parsed `config.json`, for constants that change neither bytes nor FLOPs. Without one (a shape that is
            known by name, random weights) they take the defaults of transformers.

    Attributes:
        names: the family's names of weights.
        norm_weight_first: the weight of a norm is applied before rounding, not after it.
        multipliers: constants on the way of the hidden states.
    """

    names: ClassVar[Names]
    norm_weight_first: ClassVar[bool] = False
    multipliers = Multipliers()

    def __init__(self, arch: ModelArch, config: Mapping[str, Any] | None = None) -> None:
        self.arch = arch
        self._routing, self._rotary = self.routing(config or {}), Rotary.of(arch, config or {})

    @property
    def gated_by_silu(self) -> bool:
        """Whether `feed_forward` is ``down · (silu(gate) · up)``."""
        return type(self).feed_forward is Decoder.feed_forward

    def routing(self, config: Mapping[str, Any]) -> Routing:
        """The router of all layers: the best softmax probabilities, which are made to add up to one.

        Raises:
            DataError: the config asks for something else than the family's router does.
        """
        return Router(top_k=self.arch.top_k)

    def route(self, logits_TE: torch.Tensor, correction_E: torch.Tensor | None = None) -> Choice:
        """Chosen experts and their weights (float32), both ``[T, K]``; the correction is that of the layer."""
        return self._routing(logits_TE, correction_E)

    def router_correction(self, w: Weights) -> torch.Tensor | None:
        """What a layer's router adds to the scores for the choice, float32 ``[E]``, copied from its attention unit."""
        return w["correction"].clone() if "correction" in w else None

    def parts(self, on_disk: Iterable[str]) -> dict[UnitId, list[Part]]:
        """Parts of every unit, given the names in the checkpoint (they tell the layout: per expert or packed)."""
        return self._as_stored(unit_parts(self.arch, self.names, packed=self.names.are_packed(on_disk)))

    def _as_stored(self, units: dict[UnitId, list[Part]]) -> dict[UnitId, list[Part]]:
        """Parts of units, those of packed matrices in the form that the checkpoint has of them."""
        packed = self.arch.packed
        if packed is None:
            return units
        return {
            unit: [
                own for part in parts for own in (packed_parts(packed, part) if self._is_packed(unit, part) else [part])
            ]
            for unit, parts in units.items()
        }

    def _is_packed(self, unit: UnitId, part: Part) -> bool:
        kind = "dense" if unit.kind == "expert" and self.arch.is_dense(unit.layer) else unit.kind
        kind = "dense" if part.role.startswith(_SHARED) else kind
        return self.arch.is_packed(kind) and part.role in _PACKED_ROLES

    def expert_weights(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> ExpertWeights:
        """The weights of a layer's experts, or of its MLP, of the tensors of a unit."""
        arch, dense = self.arch, self.arch.is_dense(layer)
        packed = arch.packed if arch.is_packed("dense" if dense else "expert") else None
        shape = PackedShape(packed, arch.hidden, arch.ffn_in(layer), arch.gate_up_alternate) if packed else None
        return ExpertWeights.of(tensors, shape, arch.gate_up_alternate, arch.gate_up_alternate and not packed)

    def _matrix(self, w: Weights, role: str, rows: int, columns: int) -> torch.Tensor | PackedMatrix:
        """A matrix of an attention module."""
        packed = self.arch.packed
        if packed is None or not self.arch.is_packed("attention"):
            return w[role]
        return PackedMatrix(packed, fields_of(w, role), (rows, columns))

    def expert_parts(self, on_disk: Iterable[str]) -> dict[UnitId, list[Part]]:
        """Parts of every single expert that belongs to a unit of several, by what it is as a unit of its own."""
        if experts_per_unit(self.arch) == 1:
            return {}
        single = unit_parts(self.arch.grouped(1), self.names, packed=self.names.are_packed(on_disk), kinds=("expert",))
        units = {unit.id for unit in units_of(self.arch)}
        return self._as_stored({unit: parts for unit, parts in single.items() if unit not in units})

    def expected_tensors(self, on_disk: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes that a complete checkpoint in the layout of ``on_disk`` must have."""
        return {p.tensor: p.whole or p.shape for parts in self.parts(on_disk).values() for p in parts}

    def rope(self, positions_T: torch.Tensor, lengths_T: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Cosine and sine ``[T, 1, Dh]`` of the positions, on their device; computed in float32, then rounded.

        Args:
            positions_T: place of each token in its row.
            lengths_T: length of the row of each token, for embeddings that depend on it.
            dtype: of the result.
        """
        return self._rotary(positions_T, lengths_T, dtype)

    def embedded(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The residual stream that rows of the embedding table begin."""
        return x_TD if self.multipliers.embedding == 1.0 else x_TD * self.multipliers.embedding

    def project(
        self, h_TD: torch.Tensor, w: Weights, rope: Rope, new: NewKV | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[T, H, Dh]``, keys and values ``[T, G, Dh]`` of hidden states; queries and keys are rotated.

        Keys and values of the tokens that ``new`` names are written there; what is returned of these keys is undefined.
        """
        x_TD, arch = self.norm(h_TD, w, "input_norm"), self.arch
        counts = (("q", arch.num_heads), ("k", arch.num_kv_heads), ("v", arch.num_kv_heads))
        q, k, v = (
            linear(x_TD, self._matrix(w, role, count * arch.head_dim, arch.hidden), w.get(f"{role}_bias"))
            for role, count in counts
        )
        q, k, v = self._heads(q, w, "q_norm"), self._heads(k, w, "k_norm"), v.unflatten(-1, (-1, arch.head_dim))
        if arch.qk_norm == "rotated":
            q, k = rotate(q, k, v, rope, interleaved=arch.rope_interleaved)
            q, k = self.norm(q, w, "q_norm"), self.norm(k, w, "k_norm")
            if new is not None:
                new.put(k, v)
        else:
            q, k = rotate(q, k, v, rope, new, interleaved=arch.rope_interleaved)
        if self.multipliers.attention is not None:  # kernels scale by the root of the size of a head
            q = q * (self.multipliers.attention * arch.head_dim**0.5)
        return q, k, v

    def _heads(self, x: torch.Tensor, w: Weights, norm: str) -> torch.Tensor:
        """Heads ``[T, H, Dh]`` of a projection, normed where they are so before they are rotated."""
        arch = self.arch
        if arch.qk_norm == "projection":
            x = self.norm(x, w, norm)
        x = x.unflatten(-1, (-1, arch.head_dim))
        return self.norm(x, w, norm) if arch.qk_norm == "head" else x

    def output(
        self, h_TD: torch.Tensor, attended_THd: torch.Tensor, w: Weights
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Residual stream after attention, its norm for the experts, and the router's logits ``[T, E]``.

        A dense layer has no router; its logits are None.
        """
        out = self._matrix(w, "o", self.arch.hidden, self.arch.num_heads * self.arch.head_dim)
        attended_TD = linear(attended_THd.flatten(1), out, w.get("o_bias"))
        h_TD, x_TD = self._added(h_TD, attended_TD, w, "post_norm")
        if self.arch.shared_ffn:
            self._add_shared(h_TD, x_TD, w)
        if WIDE_ROUTER in w:
            return h_TD, x_TD, F.linear(x_TD.float(), w[WIDE_ROUTER])
        return h_TD, x_TD, linear(x_TD, w["router"], w.get("router_bias")) if "router" in w else None

    def _add_shared(self, h_TD: torch.Tensor, x_TD: torch.Tensor, w: Weights) -> None:
        """Add what every token gets beside its experts to the residual stream, a few tokens at a time; not in a dense layer."""
        own = {role.removeprefix(_SHARED): tensor for role, tensor in w.items() if role.startswith(_SHARED)}
        if not own:
            return
        arch, gate = self.arch, own.pop("gate", None)
        packed = arch.packed if arch.is_packed("dense") else None
        weights = ExpertWeights.of(own, PackedShape(packed, arch.hidden, arch.shared_ffn) if packed else None)
        step = EXPERT_CHUNK_TOKENS[x_TD.device.type]
        for h_nD, x_nD in zip(h_TD.split(step), x_TD.split(step)):
            factors_n1 = None if gate is None else torch.sigmoid(linear(x_nD, gate))
            if self.gated_by_silu and weights.expert(0).add_gated(x_nD, h_nD, factors_n=factors_n1):
                continue
            y_nD = self.feed_forward(x_nD, weights.expert(0))
            h_nD.add_(y_nD if factors_n1 is None else y_nD.mul_(factors_n1))

    def feed_forward(self, x_nD: torch.Tensor, w: ExpertProducts) -> torch.Tensor:
        """Output ``[n, D]`` of an expert (or the MLP of a dense layer), or of several experts at once."""
        gate_nF, up_nF = w.gate_up(x_nD)
        return w.down(silu_gate(gate_nF, up_nF))

    def final_norm(self, h_RD: torch.Tensor, w: Weights) -> torch.Tensor:
        """Norm before the head; its weight travels with the first head unit."""
        x_RD = self.norm(h_RD, w, "norm")
        return x_RD if self.multipliers.logits == 1.0 else x_RD * self.multipliers.logits

    def head(self, x_RD: torch.Tensor, w: Weights) -> torch.Tensor:
        """Logits of the vocabulary rows of a head unit."""
        return linear(x_RD, w["head"], w.get("head_bias"))

    def norm(self, x: torch.Tensor, w: Weights, role: str) -> torch.Tensor:
        """RMSNorm over the last dimension, whose weight is applied after rounding unless the family says otherwise."""
        return rms_norm(x, w[role], self.arch.norm_eps, weight_first=self.norm_weight_first)

    def _added(
        self, h_TD: torch.Tensor, attended_TD: torch.Tensor, w: Weights, role: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream with what attention adds, and its norm."""
        factor = self.multipliers.residual
        if type(self).norm is not Decoder.norm:  # another one than RMSNorm
            h_TD = torch.add(h_TD, attended_TD, alpha=factor)
            return h_TD, self.norm(h_TD, w, role)
        first = self.norm_weight_first
        return add_and_norm(h_TD, attended_TD, factor, w[role], self.arch.norm_eps, weight_first=first)
