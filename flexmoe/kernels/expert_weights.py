"""The weights of experts as the products that a feed-forward network takes with them, however they lie.

A copied unit has each matrix of its experts stacked. One that was read from a file as it lies there may have a tensor for
each expert, or gate and up of an expert apart. Which it is, only this file knows: the mathematics asks for a product.

Legend: D hidden, F expert width, n tokens, e experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from flexmoe.checkpoint.unit_layout import tensors_of
from flexmoe.kernels.grouped_product import Matrices, can_group, grouped_product, product_in_turn
from flexmoe.kernels.linear import linear


class ExpertProducts:
    """The products of the feed-forward network of one expert, or of several experts at once over the tokens of each.

    Args:
        gate_up: gate above up in one, or gate and up.
        down: the same of down.
        product: ``(x, weight)`` to ``x · weight^T``.
    """

    __slots__ = ("_down", "_gate_up", "_product")

    def __init__(self, gate_up: Sequence[Matrices], down: Matrices, product: Callable[..., torch.Tensor]):
        self._gate_up, self._down, self._product = gate_up, down, product

    def gate_up(self, x_nD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens' gates and what they gate, both ``[n, F]``; they may be overwritten."""
        if len(self._gate_up) == 1:
            gate_nF, up_nF = self._product(x_nD, self._gate_up[0]).chunk(2, dim=-1)
            return gate_nF, up_nF
        gate, up = self._gate_up
        return self._product(x_nD, gate), self._product(x_nD, up)

    def down(self, h_nF: torch.Tensor) -> torch.Tensor:
        """Back to ``[n, D]``."""
        return self._product(h_nF, self._down)


class ExpertWeights:
    """The weights of the experts of a unit, or of the MLP of a dense layer, which is an expert alone.

    Args:
        gate_up: gate above up of each expert in one ``[2F, D]``, or the gates and the ups, each ``[F, D]``.
        down: of each expert, ``[D, F]``.
    """

    __slots__ = ("_down", "_gate_up")

    def __init__(self, gate_up: Sequence[Matrices], down: Matrices):
        self._gate_up, self._down = gate_up, down

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> ExpertWeights:
        """From the tensors of a unit, as they lie on the compute device or as they were read."""
        gate_up, down = tensors_of(tensors, "gate_up"), tensors_of(tensors, "down")
        apart = len(gate_up) == 2 * len(down)
        return cls((gate_up[::2], gate_up[1::2]) if apart else (gate_up,), down)

    @classmethod
    def together(cls, each: Sequence[ExpertWeights]) -> ExpertWeights:
        """Of experts that are each a unit alone, wherever they lie."""
        down = [one._down[0] for one in each]
        if all(len(one._gate_up) == 1 for one in each):
            return cls(([one._gate_up[0][0] for one in each],), down)
        # Some were read as they lie in the file and others copied.
        gates, ups = zip(*(one._halves() for one in each))
        return cls((gates, ups), down)

    def expert(self, number: int) -> ExpertProducts:
        """The products of one expert.

        Args:
            number: its place in the unit.
        """
        return ExpertProducts([m[number] for m in self._gate_up], self._down[number], linear)

    def grouped(self, ends_e: torch.Tensor) -> ExpertProducts:
        """The products of all experts at once, where `can_group`.

        Args:
            ends_e: int32, where the tokens of each expert end among those that are multiplied.
        """
        return ExpertProducts(self._gate_up, self._down, partial(grouped_product, ends_e=ends_e))

    def in_turn(self, tokens: Sequence[tuple[int, slice]]) -> ExpertProducts:
        """The products of several experts at once, one after the other on any device.

        Args:
            tokens: (number of the expert, its tokens among those that are multiplied) of each expert that has some.
        """
        return ExpertProducts(self._gate_up, self._down, partial(product_in_turn, tokens=tokens))

    def can_group(self) -> bool:
        """Whether the device has a grouped product for these weights as they lie."""
        return can_group((*self._gate_up, self._down))

    def _halves(self) -> Sequence[torch.Tensor]:
        """Gate and up of the first expert."""
        first = [m[0] for m in self._gate_up]
        return first if len(first) == 2 else first[0].chunk(2)
