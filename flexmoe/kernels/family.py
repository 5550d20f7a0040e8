"""What the runtime asks of a model family: the parts of its weight units, and the mathematics of its layers.

Legend: T tokens, D hidden, E experts, K chosen experts, H query heads, G KV heads, Dh head size, R rows of logits,
n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from cost_model.model.arch import ModelArch
from flexmoe.checkpoint.unit_layout import Part
from flexmoe.kernels.elementwise import NewKV
from flexmoe.kernels.expert_weights import ExpertProducts, ExpertWeights
from policies.units import UnitId

#: Tensors of a unit by their role.
Weights = Mapping[str, torch.Tensor]
#: Cosine and sine of rotary embedding.
Rope = tuple[torch.Tensor, torch.Tensor]


class Family(Protocol):
    """A family's mathematics over weights that it is handed per unit, and the checkpoint names of those weights."""

    @property
    def arch(self) -> ModelArch:
        """The shape."""

    @property
    def gated_by_silu(self) -> bool:
        """Whether `feed_forward` is ``down · (silu(gate) · up)`` and nothing else sees it, so that one kernel may take its place."""

    def parts(self, on_disk: Iterable[str]) -> dict[UnitId, list[Part]]:
        """Parts of every unit, given the names in the checkpoint."""

    def expert_parts(self, on_disk: Iterable[str]) -> dict[UnitId, list[Part]]:
        """Parts of every single expert that belongs to a unit of several, by what it is as a unit of its own."""

    def expected_tensors(self, on_disk: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes that a complete checkpoint in the layout of ``on_disk`` must have."""

    def rope(self, positions_T: torch.Tensor, lengths_T: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Rotary embedding ``[T, 1, Dh]`` of the positions, given the length of the row of each token."""

    def embedded(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The residual stream that rows of the embedding table begin."""

    def project(
        self, h_TD: torch.Tensor, w: Weights, rope: Rope, new: NewKV | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[T, H, Dh]``, keys and values ``[T, G, Dh]`` of the residual stream.

        Keys and values of the tokens that ``new`` names are written there; what is returned of these keys is undefined.
        """

    def output(
        self, h_TD: torch.Tensor, attended_THd: torch.Tensor, w: Weights
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Residual stream after attention, its norm for the experts, and the router's logits ``[T, E]`` if it has a router."""

    def router_correction(self, w: Weights) -> torch.Tensor | None:
        """What a layer's router adds to the scores for the choice, ``[E]``, if it does; no view of the weights."""

    def route(
        self, logits_TE: torch.Tensor, correction_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts and their weights (float32), both ``[T, K]``."""

    def expert_weights(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> ExpertWeights:
        """The weights of a layer's experts, or of its MLP, of the tensors of a unit."""

    def feed_forward(self, x_nD: torch.Tensor, w: ExpertProducts) -> torch.Tensor:
        """Output ``[n, D]`` of an expert, or of several experts at once."""

    def final_norm(self, h_RD: torch.Tensor, w: Weights) -> torch.Tensor:
        """Norm before the head; its weight travels with the first head unit."""

    def head(self, x_RD: torch.Tensor, w: Weights) -> torch.Tensor:
        """Logits of the vocabulary rows of a head unit."""
