"""Mixtral: names, norms, rotary embedding, router. Everything that the executor must not know.

Legend: T tokens, D hidden, F expert width, E experts, K chosen experts, H query heads, G KV heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
import torch.nn.functional as F

from cost_model.arch import ModelArch
from flexmoe.layout import Part

Weights = Mapping[str, torch.Tensor]


class Mixtral:
    """The family's mathematics over weights that it is handed per unit, and the checkpoint names of those weights.

    Args:
        arch: the shape.
    """

    def __init__(self, arch: ModelArch):
        self.arch = arch

    def parts(self, names: Iterable[str]) -> dict[str, list[Part]]:
        """Parts of every unit, given the names in the checkpoint (they tell the layout: per expert or packed)."""
        packed = any(name.endswith("mlp.experts.gate_up_proj") for name in names)
        result = {}
        for unit in self.arch.units():
            if unit.kind == "embed":
                result[unit.name] = [self._part("embed", "model.embed_tokens.weight", self._table)]
            elif unit.kind == "attention":
                result[unit.name] = self._attention_parts(unit.layer, packed)
            elif unit.kind == "expert":
                result[unit.name] = self._expert_parts(unit.layer, int(unit.name.rsplit(".", 1)[1]), packed)
            else:
                result[unit.name] = self._head_parts(int(unit.name.rsplit(".", 1)[1]))
        return result

    def expected_tensors(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes that a complete checkpoint in the layout of ``names`` must have."""
        names = list(names)
        a = self.arch
        shapes: dict[str, tuple[int, ...]] = {}
        for unit, parts in self.parts(names).items():
            for part in parts:
                shapes[part.tensor] = part.shape
        for name in shapes:
            if name.endswith("gate_up_proj"):
                shapes[name] = (a.num_experts, 2 * a.ffn, a.hidden)
            elif name.endswith("experts.down_proj"):
                shapes[name] = (a.num_experts, a.hidden, a.ffn)
        for table in ("model.embed_tokens.weight", self._head_name):
            shapes[table] = self._table
        return shapes

    def rope(self, positions_T: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine ``[T, 1, Dh]`` of the positions, on their device; computed in float32, then rounded."""
        a = self.arch
        exponent = torch.arange(0, a.head_dim, 2, device=positions_T.device).float() / a.head_dim
        angles = positions_T.float()[:, None] * (1.0 / a.rope_theta**exponent)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def project(
        self, h_TD: torch.Tensor, w: Weights, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[T, H, Dh]``, keys and values ``[T, G, Dh]`` of hidden states; queries and keys are rotated."""
        size = self.arch.head_dim
        x_TD = self._norm(h_TD, w["input_norm"])
        q, k, v = (F.linear(x_TD, w[r]).unflatten(-1, (-1, size)) for r in ("q", "k", "v"))
        return _rotate(q, *rope), _rotate(k, *rope), v

    def output(self, h_TD: torch.Tensor, attended_THd: torch.Tensor, w: Weights) -> tuple[torch.Tensor, ...]:
        """Residual stream after attention, its norm for the experts, and the router's logits ``[T, E]``."""
        h_TD = h_TD + F.linear(attended_THd.flatten(1), w["o"])
        x_TD = self._norm(h_TD, w["post_norm"])
        return h_TD, x_TD, F.linear(x_TD, w["router"])

    def route(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts and their weights, both ``[T, K]``; weights are float32 and add up to one."""
        weights_TK, ids_TK = torch.topk(torch.softmax(logits_TE.float(), dim=-1), self.arch.top_k, dim=-1)
        return ids_TK, weights_TK / weights_TK.sum(dim=-1, keepdim=True)

    def expert(self, x_nD: torch.Tensor, w: Weights) -> torch.Tensor:
        """One expert's feed-forward network."""
        return F.linear(F.silu(F.linear(x_nD, w["gate"]), inplace=True).mul_(F.linear(x_nD, w["up"])), w["down"])

    def final_norm(self, h_RD: torch.Tensor, w: Weights) -> torch.Tensor:
        """Norm before the head; its weight travels with the first head unit."""
        return self._norm(h_RD, w["norm"])

    def _norm(self, h_TD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = h_TD.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.arch.norm_eps)
        return weight * x.to(h_TD.dtype)

    @property
    def _table(self) -> tuple[int, int]:
        return (self.arch.vocab_size, self.arch.hidden)

    @property
    def _head_name(self) -> str:
        return "model.embed_tokens.weight" if self.arch.tied else "lm_head.weight"

    def _part(self, role: str, tensor: str, shape: tuple[int, ...], index: int = 0, stride: int = 0) -> Part:
        return Part(role=role, tensor=tensor, shape=shape, first_element=index * (stride or prod(shape)))

    def _attention_parts(self, layer: int, packed: bool) -> list[Part]:
        a, at = self.arch, f"model.layers.{layer}."
        q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        router = "mlp.gate.weight" if packed else "block_sparse_moe.gate.weight"
        rows = {
            "q": ("self_attn.q_proj.weight", (q, a.hidden)),
            "k": ("self_attn.k_proj.weight", (kv, a.hidden)),
            "v": ("self_attn.v_proj.weight", (kv, a.hidden)),
            "o": ("self_attn.o_proj.weight", (a.hidden, q)),
            "input_norm": ("input_layernorm.weight", (a.hidden,)),
            "post_norm": ("post_attention_layernorm.weight", (a.hidden,)),
            "router": (router, (a.num_experts, a.hidden)),
        }
        return [self._part(role, at + name, shape) for role, (name, shape) in rows.items()]

    def _expert_parts(self, layer: int, expert: int, packed: bool) -> list[Part]:
        up, down = (self.arch.ffn, self.arch.hidden), (self.arch.hidden, self.arch.ffn)
        if packed:  # gate_up_proj is [E, 2F, D], gate first
            at = f"model.layers.{layer}.mlp.experts."
            return [
                self._part("gate", at + "gate_up_proj", up, 2 * expert),
                self._part("up", at + "gate_up_proj", up, 2 * expert + 1),
                self._part("down", at + "down_proj", down, expert),
            ]
        at = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        names = {"gate": ("w1", up), "up": ("w3", up), "down": ("w2", down)}
        return [self._part(role, f"{at}{name}.weight", shape) for role, (name, shape) in names.items()]

    def _head_parts(self, chunk: int) -> list[Part]:
        first, last = self.arch.head_rows(chunk)
        shape = (last - first, self.arch.hidden)
        head = Part(role="head", tensor=self._head_name, shape=shape, first_element=first * self.arch.hidden)
        norm = [self._part("norm", "model.norm.weight", (self.arch.hidden,))] if chunk == 0 else []
        return [head, *norm]


def _rotate(x_THd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves convention (Su et al. 2021, as in transformers)."""
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos + torch.cat([-second, first], dim=-1) * sin
