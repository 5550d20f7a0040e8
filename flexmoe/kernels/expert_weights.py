"""The weights of experts as the products that a feed-forward network takes with them, however they lie.

A copied unit has each matrix of its experts stacked. One that was read from a file as it lies there may have a tensor for
each expert, or gate and up of an expert apart. Which it is, only this file knows: the mathematics asks for a product.

Legend: D hidden, F expert width, n tokens, e experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.checkpoint.unit_layout import tensors_of
from flexmoe.formats.packed_matrix import CODECS, SEPARATOR, PackedMatrix
from flexmoe.kernels.grouped_product import can_group, grouped_product, product_in_turn, with_biases
from flexmoe.kernels.linear import linear, linears
from flexmoe.kernels.native.feed_forward import can_feed_forward, feed_forward


class ExpertProducts:
    """The products of the feed-forward network of one expert, or of several experts at once over the tokens of each.

    Args:
        gate_up: gate above up in one, or gate and up.
        down: the same of down.
        product: ``(x, weight, bias)`` to ``x · weight^T + bias``.
        biases: of gate and up in one, and of down; None: there are none.
        alternate: rows of gate and up alternate.
        products: ``(x, weights)`` to the product with each of them; default: one after the other.

    Packed matrices are unpacked by the product.
    """

    __slots__ = ("_alternate", "_biases", "_down", "_gate_up", "_product", "_products")

    def __init__(
        self,
        gate_up: Sequence[Any],
        down: Any,
        product: Callable[..., torch.Tensor],
        biases: tuple[Any, Any] | None = None,
        alternate: bool = False,
        products: Callable[..., Sequence[torch.Tensor]] | None = None,
    ):
        self._gate_up, self._down, self._product = gate_up, down, product
        self._products = products or (lambda x, weights: [product(x, weight, None) for weight in weights])
        self._biases, self._alternate = biases or (None, None), alternate

    def gate_up(self, x_nD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens' gates and what they gate, both ``[n, F]``; they may be overwritten."""
        if len(self._gate_up) == 1:
            both = self._product(x_nD, self._gate_up[0], self._biases[0])
            gate_nF, up_nF = both.unflatten(-1, (-1, 2)).unbind(-1) if self._alternate else both.chunk(2, dim=-1)
            return gate_nF, up_nF
        gate_nF, up_nF = self._products(x_nD, self._gate_up)
        return gate_nF, up_nF

    def down(self, h_nF: torch.Tensor) -> torch.Tensor:
        """Back to ``[n, D]``."""
        return self._product(h_nF, self._down, self._biases[1])

    def add_gated(
        self,
        x_TD: torch.Tensor,
        y_TD: torch.Tensor,
        tokens_n: torch.Tensor | None = None,
        factors_n: torch.Tensor | None = None,
    ) -> bool:
        """Add ``factors · down · (silu(gate) · up)`` of one expert's tokens to their outputs in one native call.

        Args:
            x_TD, y_TD: inputs and outputs of all tokens.
            tokens_n: those of the expert, each once; None: all.
            factors_n: in the dtype of the outputs; None: one.

        Returns:
            bool: False where this machine has no such call for these weights; then nothing was added.
        """
        if self._alternate or self._biases[0] is not None or not isinstance(self._down, torch.Tensor):
            return False
        gate, up = self._gate_up if len(self._gate_up) == 2 else self._gate_up[0].chunk(2)
        if not can_feed_forward(x_TD, y_TD, gate, up, self._down):
            return False
        feed_forward(x_TD, y_TD, (gate, up, self._down), tokens_n, factors_n)
        return True


@dataclass(frozen=True, slots=True)
class PackedShape:
    """How the matrices of experts are packed.

    Args:
        format: of all of them.
        hidden, ffn: D and F.
        together: gate and up of an expert are one matrix.
    """

    format: PackedFormat
    hidden: int
    ffn: int
    together: bool = False

    def matrices(self, tensors: Mapping[str, torch.Tensor], role: str) -> list[PackedMatrix]:
        """The matrices of a role, in order; gate and up of an expert are two, unless together."""
        rows, columns = (self.ffn * (1 + self.together), self.hidden) if role == "gate_up" else (self.hidden, self.ffn)
        names = [field.name for field in CODECS[self.format.codec].fields(self.format, rows, columns)]
        found = {name: tensors_of(tensors, f"{role}{SEPARATOR}{name}") for name in names}
        count = len(found["packed"])
        return [
            PackedMatrix(self.format, {name: field[at] for name, field in found.items()}, (rows, columns))
            for at in range(count)
        ]


class ExpertWeights:
    """The weights of the experts of a unit, or of the MLP of a dense layer, which is an expert alone.

    Args:
        gate_up: gate above up of each expert in one ``[2F, D]``, or the gates and the ups, each ``[F, D]``.
        down: of each expert, ``[D, F]``.
        biases: of each expert, ``[2F]`` and ``[D]``; None: there are none.
        alternate: rows of gate and up alternate; they are in one.
    """

    __slots__ = ("_alternate", "_biases", "_down", "_gate_up")

    def __init__(
        self, gate_up: Sequence[Any], down: Any, biases: tuple[Any, Any] | None = None, alternate: bool = False
    ):
        self._gate_up, self._down, self._biases, self._alternate = gate_up, down, biases, alternate

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, torch.Tensor],
        packed: PackedShape | None = None,
        alternate: bool = False,
        transposed: bool = False,
    ) -> ExpertWeights:
        """From the tensors of a unit, as they lie on the compute device or as they were read.

        Args:
            packed: format and shape of the experts where their matrices are packed.
            alternate: rows of gate and up alternate.
            transposed: the matrices lie stacked, inputs before outputs.
        """
        biases = (tensors["gate_up_bias"], tensors["down_bias"]) if "gate_up_bias" in tensors else None
        if packed is not None:
            gate_up_e, down_e = packed.matrices(tensors, "gate_up"), packed.matrices(tensors, "down")
            halves = (gate_up_e,) if packed.together else (gate_up_e[::2], gate_up_e[1::2])
            return cls(halves, down_e, biases, alternate)
        gate_up, down = tensors_of(tensors, "gate_up"), tensors_of(tensors, "down")
        if transposed:
            stacked = tensors["gate_up"].transpose(1, 2), tensors["down"].transpose(1, 2)
            return cls((stacked[0],), stacked[1], biases, alternate)
        apart = len(gate_up) == 2 * len(down)
        return cls((gate_up[::2], gate_up[1::2]) if apart else (gate_up,), down, biases, alternate)

    @classmethod
    def together(cls, each: Sequence[ExpertWeights]) -> ExpertWeights:
        """Of experts that are each a unit alone, wherever they lie."""
        down = [one._down[0] for one in each]
        if all(len(one._gate_up) == 1 for one in each):
            own = [one._biases for one in each if one._biases is not None]
            biases = (torch.cat([gate_up for gate_up, _ in own]), torch.cat([down for _, down in own])) if own else None
            return cls(([one._gate_up[0][0] for one in each],), down, biases, each[0]._alternate)
        # Some were read as they lie in the file and others copied.
        gates, ups = zip(*(one._halves() for one in each))
        return cls((gates, ups), down)

    def expert(self, number: int) -> ExpertProducts:
        """The products of one expert.

        Args:
            number: its place in the unit.
        """
        own = None if self._biases is None else (self._biases[0][number], self._biases[1][number])
        gate_up = [m[number] for m in self._gate_up]
        return ExpertProducts(gate_up, self._down[number], linear, own, self._alternate, linears)

    def grouped(self, ends_e: torch.Tensor) -> ExpertProducts:
        """The products of all experts at once, where `can_group`.

        Args:
            ends_e: int32, where the tokens of each expert end among those that are multiplied.
        """
        product = partial(with_biases, grouped_product, ends_e=ends_e)
        return self._products(self._gate_up, self._down, product, self._biases)

    def in_turn(self, tokens: Sequence[tuple[int, slice]]) -> ExpertProducts:
        """The products of several experts at once, one after the other on any device.

        Args:
            tokens: (number of the expert, its tokens among those that are multiplied) of each expert that has some.
        """
        product = partial(product_in_turn, tokens=tokens)
        return self._products(self._gate_up, self._down, product, self._biases)

    def _products(
        self, gate_up: Sequence[Any], down: Any, product: Callable[..., torch.Tensor], biases: tuple[Any, Any] | None
    ) -> ExpertProducts:
        return ExpertProducts(gate_up, down, product, biases, self._alternate)

    def can_group(self) -> bool:
        """Whether the device has a grouped product for these weights as they lie."""
        return can_group((*self._gate_up, self._down))

    def _halves(self) -> Sequence[torch.Tensor]:
        """Gate and up of the first expert."""
        first = [m[0] for m in self._gate_up]
        return first if len(first) == 2 else first[0].chunk(2)
