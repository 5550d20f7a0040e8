"""The MoE of a layer: tokens sorted by expert on the device, one pass per expert over the whole block.

Many small experts with a handful of tokens each are served together: their tokens are gathered and scattered once per
unit, and where the weights allow it, one grouped product takes the place of a product per expert.

Legend: T tokens, D hidden, E experts, K chosen experts, n tokens of one expert or unit, e experts of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate, pairwise

import torch

from cost_model.memory.memory_plan import EXPERT_CHUNK_TOKENS
from cost_model.model.weight_units import GROUPED_TOKENS
from flexmoe.kernels.elementwise import add_rows
from flexmoe.kernels.expert_weights import ExpertProducts, ExpertWeights
from flexmoe.kernels.family import Family
from flexmoe.kernels.native import library as native
from flexmoe.system.device import Device

#: Numbers of a matrix from which on an expert is worth calls of its own: threads meet three times in each.
_LARGE = 1 << 20


class ExpertDispatch:
    """Routes the tokens of a block to experts and adds up what comes back.

    Args:
        device: compute device.
        num_experts: E.
        chunk: tokens that are computed at once; None: `EXPERT_CHUNK_TOKENS`.
    """

    def __init__(self, device: Device, num_experts: int, chunk: int | None = None):
        self._device = device
        self._chunk = chunk or EXPERT_CHUNK_TOKENS[device.torch.type]
        self._numbers = torch.arange(num_experts + 1, device=device.torch)
        self._starts_host = device.host_buffer((num_experts + 1) * 8).view(torch.int64) if device.is_cuda else None
        # Of the last routing: the (token, expert) pairs by expert, and the first of each expert.
        self._starts: list[int] = []
        self._starts_device = self._numbers
        self._tokens = self._weights = torch.empty(0)
        self._is_dense = False

    def route(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> list[int]:
        """Sort the block's (token, expert) pairs by expert; the only host wait of the layer.

        Args:
            ids_TK: chosen experts.
            weights_TK: their weights.
            dtype: dtype in which the weights are applied.

        Returns:
            list[int]: tokens of each expert.
        """
        experts, order = ids_TK.flatten().sort(stable=True)
        starts = torch.searchsorted(experts, self._numbers)  # bincount would wait for the device, twice
        self._starts_device = starts
        if self._starts_host is not None:
            starts = self._starts_host.copy_(starts, non_blocking=True)
            copied = self._device.record()
        self._tokens = order // ids_TK.shape[1]
        self._weights = weights_TK.flatten()[order].to(dtype).unsqueeze(1)
        if self._starts_host is not None:
            self._device.host_wait(copied)
        self._starts, self._is_dense = starts.tolist(), False
        return [stop - start for start, stop in zip(self._starts, self._starts[1:])]

    def route_all(self, tokens: int) -> None:
        """Send every token to expert 0 with weight one: the MLP of a dense layer."""
        self._starts, self._is_dense = [0, tokens], True

    def add_unit(
        self, experts: range, x_TD: torch.Tensor, y_TD: torch.Tensor, weights: ExpertWeights, family: Family
    ) -> None:
        """Run the experts of a unit over their tokens and add the weighted results to the block's output.

        Args:
            experts: the experts of the unit.
            x_TD: normalized hidden states of the block.
            y_TD: output of the MoE, added to in place.
            weights: of the unit.
            family: the model's mathematics.
        """
        if len(experts) == 1:
            if not self._add_gated(experts[0], x_TD, y_TD, weights.expert(0), family):
                self.add(experts[0], x_TD, y_TD, partial(family.feed_forward, w=weights.expert(0)))
        elif self.can_group(experts, weights):
            self.add_group(
                experts, x_TD, y_TD, lambda x_nD, bounds: family.feed_forward(x_nD, weights.grouped(bounds.ends()))
            )
        elif not all(
            self._add_gated(expert, x_TD, y_TD, weights.expert(at), family) for at, expert in enumerate(experts)
        ):
            self.add_group(
                experts, x_TD, y_TD, lambda x_nD, bounds: family.feed_forward(x_nD, weights.in_turn(bounds.slices()))
            )

    def _add_gated(
        self, expert: int, x_TD: torch.Tensor, y_TD: torch.Tensor, own: ExpertProducts, family: Family
    ) -> bool:
        """`add` in one native call for each chunk, where there is one; False: nothing was added."""
        if not family.gated_by_silu:
            return False
        for pairs in self._chunks(range(expert, expert + 1)):
            if self._is_dense:
                added = own.add_gated(x_TD[pairs], y_TD[pairs])
            else:
                added = own.add_gated(x_TD, y_TD, self._tokens[pairs], self._weights[pairs])
            if not added:  # that depends on the weights alone: the first chunk already was not
                return False
        return True

    def add(
        self, expert: int, x_TD: torch.Tensor, y_TD: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Run one expert over its tokens and add the weighted result to the block's output.

        Args:
            expert: its index.
            x_TD, y_TD: as for `add_unit`.
            compute: maps ``[n, D]`` to ``[n, D]``.
        """
        for pairs in self._chunks(range(expert, expert + 1)):
            if self._is_dense:
                y_TD[pairs] += compute(x_TD[pairs])
                continue
            tokens = self._tokens[pairs]
            add_rows(y_TD, tokens, compute(x_TD.index_select(0, tokens)), self._weights[pairs])

    def add_group(
        self,
        experts: range,
        x_TD: torch.Tensor,
        y_TD: torch.Tensor,
        compute: Callable[[torch.Tensor, Bounds], torch.Tensor],
    ) -> None:
        """Run the experts of a unit over their tokens, gathered and added together.

        Args:
            experts, x_TD, y_TD: as for `add_unit`.
            compute: maps ``[n, D]``, the tokens of one expert after those of another, and a `Bounds` to ``[n, D]``; it may
                overwrite what it is given.
        """
        for pairs in self._chunks(experts):
            tokens = self._tokens[pairs]
            bounds = Bounds(self._starts, self._starts_device, experts, pairs)
            add_rows(y_TD, tokens, compute(x_TD.index_select(0, tokens), bounds), self._weights[pairs])

    def add_some(
        self, weights: Mapping[int, ExpertWeights], x_TD: torch.Tensor, y_TD: torch.Tensor, family: Family
    ) -> None:
        """Run single experts over their tokens and add the weighted results to the block's output: tokens of small experts are
        gathered, activated and added together.

        Args:
            weights: of each expert, by its number.
            x_TD, y_TD, family: as for `add_unit`.
        """
        large = family.arch.hidden * family.arch.ffn >= _LARGE
        few = {
            expert: own
            for expert, own in weights.items()
            if not (large and self._add_gated(expert, x_TD, y_TD, own.expert(0), family))
        }
        grouped = self._device.torch.type == "cpu" and native.available()
        for pairs in self._together(few):
            tokens = torch.cat([self._tokens[own] for _, own in pairs])
            ends = list(accumulate(own.stop - own.start for _, own in pairs))
            together = ExpertWeights.together([weights[expert] for expert, _ in pairs])
            if grouped:
                products = together.grouped(torch.tensor(ends, dtype=torch.int32))
            else:
                products = together.in_turn([(at, slice(*own)) for at, own in enumerate(pairwise([0, *ends]))])
            computed = family.feed_forward(x_TD.index_select(0, tokens), products)
            add_rows(y_TD, tokens, computed, torch.cat([self._weights[own] for _, own in pairs]))

    def _together(self, experts: Iterable[int]) -> Iterator[list[tuple[int, slice]]]:
        """(expert, its pairs) in order, as many pairs at a time as the workspace takes."""
        batch: list[tuple[int, slice]] = []
        room = self._chunk
        for expert in experts:
            for pairs in self._chunks(range(expert, expert + 1)):
                if batch and pairs.stop - pairs.start > room:
                    yield batch
                    batch, room = [], self._chunk
                batch.append((expert, pairs))
                room -= pairs.stop - pairs.start
        if batch:
            yield batch

    def can_group(self, experts: range, weights: ExpertWeights) -> bool:
        """Whether one grouped product serves the unit: its experts have few tokens each, and there is such a product."""
        tokens = self._starts[experts.stop] - self._starts[experts.start]
        return tokens <= GROUPED_TOKENS * len(experts) and weights.can_group()

    def _chunks(self, experts: range) -> list[slice]:
        """The (token, expert) pairs of consecutive experts, as many at a time as the workspace takes."""
        first, last = self._starts[experts.start], self._starts[experts.stop]
        return [slice(at, min(last, at + self._chunk)) for at in range(first, last, self._chunk)]


class Bounds:
    """Where the tokens of each expert of a unit lie among those of a chunk.

    Args:
        starts: first (token, expert) pair of every expert, and the end.
        on_device: the same on the compute device.
        experts: of the unit.
        pairs: of the chunk.
    """

    def __init__(self, starts: list[int], on_device: torch.Tensor, experts: range, pairs: slice):
        self._starts, self._on_device, self._experts, self._pairs = starts, on_device, experts, pairs

    def slices(self) -> list[tuple[int, slice]]:
        """(number in the unit, its tokens) of every expert that has some."""
        first, size = self._pairs.start, self._pairs.stop - self._pairs.start
        ends = [min(max(0, self._starts[e] - first), size) for e in (*self._experts, self._experts.stop)]
        return [(at, slice(a, b)) for at, (a, b) in enumerate(zip(ends, ends[1:])) if b > a]

    def ends(self) -> torch.Tensor:
        """int32 ``[e]`` on the device: where the tokens of each expert end."""
        ends: torch.Tensor = self._on_device[self._experts.start + 1 : self._experts.stop + 1] - self._pairs.start
        return ends.clamp_(0, self._pairs.stop - self._pairs.start).to(torch.int32)
