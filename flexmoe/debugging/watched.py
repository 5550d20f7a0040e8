"""A family's mathematics and the dispatch of experts as they are without debug mode, whose results a `Watch` sees.

Legend: T tokens, D hidden, E experts, K chosen experts, R rows of logits, n tokens of some experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from cost_model.model.arch import ModelArch
from flexmoe.checkpoint.unit_layout import Part
from flexmoe.debugging.watch import Watch
from flexmoe.kernels.elementwise import NewKV
from flexmoe.kernels.expert_dispatch import ExpertDispatch
from flexmoe.kernels.expert_weights import ExpertProducts, ExpertWeights
from flexmoe.kernels.family import Family, Rope, Weights
from flexmoe.system.device import Device
from policies.units import UnitId


class WatchedFamily:
    """The `Family` that it is given; everything is computed there.

    Args:
        family: the model's mathematics.
        watch: sees what it gives.
    """

    def __init__(self, family: Family, watch: Watch):
        self._family, self._watch = family, watch

    @property
    def arch(self) -> ModelArch:
        """The shape."""
        return self._family.arch

    @property
    def gated_by_silu(self) -> bool:
        """False: `feed_forward` is seen."""
        return False

    def parts(self, on_disk: Iterable[str]) -> dict[UnitId, list[Part]]:
        """Parts of every unit."""
        return self._family.parts(on_disk)

    def expert_parts(self, on_disk: Iterable[str]) -> dict[UnitId, list[Part]]:
        """Parts of every single expert of a unit of several."""
        return self._family.expert_parts(on_disk)

    def expected_tensors(self, on_disk: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a complete checkpoint."""
        return self._family.expected_tensors(on_disk)

    def rope(self, positions_T: torch.Tensor, lengths_T: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Rotary embedding of the positions."""
        return self._family.rope(positions_T, lengths_T, dtype)

    def embedded(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The residual stream that rows of the embedding table begin."""
        h_TD = self._family.embedded(x_TD)
        self._watch.saw("hidden_states", h_TD, {"rows of the table": x_TD})
        return h_TD

    def project(
        self, h_TD: torch.Tensor, w: Weights, rope: Rope, new: NewKV | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of the residual stream, to which the experts of the layer before have added. Keys and values
        are seen before they are written."""
        self._watch.saw("hidden_states", h_TD)
        q, k, v = self._family.project(h_TD, w, rope, None)
        for name, x in (("query", q), ("key", k), ("value", v)):
            self._watch.saw(name, x, w)
        if new is not None:
            new.put(k, v)
        return q, k, v

    def output(
        self, h_TD: torch.Tensor, attended_THd: torch.Tensor, w: Weights
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Residual stream after attention, its norm for the experts, and the router's logits."""
        self._watch.saw("attention", attended_THd)
        h_TD, x_TD, router_TE = self._family.output(h_TD, attended_THd, w)
        self._watch.saw("hidden_states_after_attention", h_TD, w)
        self._watch.saw("post_attention_norm", x_TD, w)
        if router_TE is not None:
            self._watch.saw("router_logits", router_TE, w, masked=True)
        return h_TD, x_TD, router_TE

    def router_correction(self, w: Weights) -> torch.Tensor | None:
        """What a layer's router adds to the scores for the choice."""
        return self._family.router_correction(w)

    def route(
        self, logits_TE: torch.Tensor, correction_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts and their weights, both ``[T, K]``."""
        ids_TK, weights_TK = self._family.route(logits_TE, correction_E)
        self._watch.saw("routing_weights", weights_TK)
        return ids_TK, weights_TK

    def expert_weights(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> ExpertWeights:
        """The weights of a layer's experts of the tensors of a unit."""
        self._watch.loaded(tensors)
        return self._family.expert_weights(layer, tensors)

    def feed_forward(self, x_nD: torch.Tensor, w: ExpertProducts) -> torch.Tensor:
        """Output ``[n, D]`` of an expert, or of several experts at once."""
        y_nD = self._family.feed_forward(x_nD, w)
        self._watch.saw_experts("expert_output", y_nD)
        return y_nD

    def final_norm(self, h_RD: torch.Tensor, w: Weights) -> torch.Tensor:
        """Norm before the head."""
        self._watch.saw("hidden_states", h_RD)
        x_RD = self._family.final_norm(h_RD, w)
        self._watch.saw("final_norm", x_RD, w)
        return x_RD

    def head(self, x_RD: torch.Tensor, w: Weights) -> torch.Tensor:
        """Logits of the vocabulary rows of a head unit."""
        logits_RV = self._family.head(x_RD, w)
        self._watch.saw("logits", logits_RV, w)
        return logits_RV


class WatchedDispatch(ExpertDispatch):
    """An `ExpertDispatch` that tells which experts it computes, and for which tokens.

    Args:
        device, num_experts, chunk: as there.
        watch: hears of it.
    """

    def __init__(self, device: Device, num_experts: int, chunk: int | None, watch: Watch):
        super().__init__(device, num_experts, chunk)
        self._watch = watch

    def route(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> list[int]:
        """Sort the (token, expert) pairs by expert."""
        self._watch.routed(ids_TK)
        return super().route(ids_TK, weights_TK, dtype)

    def route_all(self, tokens: int) -> None:
        """Send every token to the MLP of a dense layer."""
        self._watch.routed_all(tokens)
        super().route_all(tokens)

    def add_unit(
        self, experts: range, x_TD: torch.Tensor, y_TD: torch.Tensor, weights: ExpertWeights, family: Family
    ) -> None:
        """Run the experts of a unit over their tokens."""
        self._watch.computes(experts)
        super().add_unit(experts, x_TD, y_TD, weights, family)

    def add_some(
        self, weights: Mapping[int, ExpertWeights], x_TD: torch.Tensor, y_TD: torch.Tensor, family: Family
    ) -> None:
        """Run single experts over their tokens."""
        self._watch.computes(list(weights))
        super().add_some(weights, x_TD, y_TD, family)
