"""Sees every tensor that the model's mathematics gives, knows what it belongs to, and records or checks it.

It is there in debug mode and with `check_finite` alone: an engine without them has none, and nothing asks for one while it
computes. The executor has its operations pass through `operations`; `WatchedFamily` and `WatchedDispatch` bring the tensors.

Legend: T tokens of the block, K chosen experts, n tokens of some experts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from flexmoe.debugging.finite import Finding, NonFiniteError, is_finite, wrong_rows, wrong_weights
from flexmoe.debugging.places import BlockTokens, RoutedTokens
from flexmoe.debugging.ranges import Range
from flexmoe.debugging.records import DebugRecords, RangeKey
from flexmoe.kernels.family import Weights
from flexmoe.kv.batch import Block, BlockPart
from policies.schedule import Op
from policies.units import UnitId

log = logging.getLogger(__name__)


class Watch:
    """Watches an executor.

    Args:
        check: raise an error where a value is not finite.
        records: gets ranges, experts, steps and operations; None: nothing is written.
    """

    def __init__(self, *, check: bool, records: DebugRecords | None = None):
        self._check, self._records = check, records
        self._sweep, self._start_s, self._open, self._warned = -1, 0.0, False, False
        self._ranges: dict[RangeKey, Range] = {}
        self._taken: Counter[str] = Counter()  # rows of each tensor that have been seen, where they come in pieces
        self._loaded: list[Weights] = []  # of the experts that are computed next
        self._weights: list[Weights] = []  # of those that are computed now
        self._pairs = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    def operations(
        self, operations: Iterator[Op], block: Block, halves: Sequence[slice], parts: Sequence[BlockPart]
    ) -> Iterator[Op]:
        """The operations of a sweep; each is the one that tensors belong to until the next one is asked for.

        Args:
            operations: in issue order.
            block: of the sweep.
            halves: tokens of its half-blocks.
            parts: what gets its tokens together.
        """
        self._begin(block, halves, parts)
        for op in operations:
            self._op = op
            self._taken.clear()
            self._loaded.clear()
            yield op
        self._end(finished=True)

    def close(self) -> None:
        """End the record of a sweep that failed, and close the files."""
        self._end(finished=False)
        if self._records is not None:
            self._records.close()

    def saw(self, tensor: str, x: torch.Tensor, weights: Weights | None = None, *, masked: bool = False) -> None:
        """A tensor ``[T, …]`` of the GPU batch or half-block of the operation, or of the tokens that the head gets.

        Args:
            tensor: what it is of the model.
            weights: of the unit that it was computed with.
            masked: minus infinity masks entries.

        Raises:
            NonFiniteError: a value is not finite, and that is checked.
        """
        layer, unit = self._place()
        tokens = self._tokens(tensor, len(x))
        self._record((layer, unit, None, tensor), x)
        if self._is_wrong(x, masked):
            self._found(tensor, x, tokens, None, weights, masked)

    def saw_experts(self, tensor: str, x: torch.Tensor) -> None:
        """The same of the output ``[n, …]`` of experts, for the next n tokens of those that `computes` named."""
        here = self._next(tensor, len(x))
        experts, tokens = self._pairs[0][here], self._pairs[1][here]
        if self._records is not None:
            for expert in np.unique(experts):
                own = torch.from_numpy(np.flatnonzero(experts == expert)).to(x.device)
                unit = self._op.unit or UnitId("expert", self._op.layer, int(expert))
                self._record((self._op.layer, str(unit), int(expert), tensor), x.index_select(0, own))
        if self._is_wrong(x, False):
            self._found(tensor, x, tokens, experts, None, False)

    def routed(self, ids_TK: torch.Tensor) -> None:
        """Experts chosen for the tokens of the operation's half-block."""
        ids, first = ids_TK.cpu().numpy(), self._halves[self._op.half].start
        self._routed = RoutedTokens(ids, first, len(ids))
        if self._records is not None:
            self._records.experts(self._sweep, self._op.layer, first, ids)

    def routed_all(self, tokens: int) -> None:
        """All tokens go to the MLP of a dense layer."""
        self._routed = RoutedTokens(None, self._halves[self._op.half].start, tokens)

    def loaded(self, weights: Weights) -> None:
        """Tensors of a unit of experts, which is computed with next."""
        self._loaded.append(weights)

    def computes(self, experts: Sequence[int]) -> None:
        """These experts are computed next, one after another or all at once, over their tokens in order."""
        self._pairs, self._computed = self._routed.of(experts), list(experts)
        self._weights, self._loaded = self._loaded, []
        self._taken.clear()

    def _begin(self, block: Block, halves: Sequence[slice], parts: Sequence[BlockPart]) -> None:
        self._end(finished=False)  # one that failed
        self._block, self._halves, self._of_block = block, halves, BlockTokens(block, parts)
        self._sweep, self._start_s, self._open, self._ranges = self._sweep + 1, time.perf_counter(), True, {}
        if self._records is not None:
            self._records.begin(self._start_s)

    def _end(self, *, finished: bool) -> None:
        if self._open and self._records is not None:
            step = {
                "sweep": self._sweep,
                "start_s": self._records.relative_s(self._start_s),
                "seconds": time.perf_counter() - self._start_s,
                "finished": finished,
                "tokens": self._block.tokens,
                "rows": self._of_block.records(),
            }
            self._records.end(step, self._ranges)
        self._open = False

    def _record(self, key: RangeKey, x: torch.Tensor) -> None:
        if self._records is not None:
            self._ranges.setdefault(key, Range()).add(x)

    def _is_wrong(self, x: torch.Tensor, masked: bool) -> bool:
        """Whether it is the first tensor with such values, or any of them where they end the run."""
        return (self._check or not self._warned) and not is_finite(x, masked=masked)

    def _place(self) -> tuple[int, str]:
        """Layer and unit of the operation; a layer's router is a part of its attention unit."""
        op = self._op
        if op.kind == "embed":
            return -1, "embed"
        unit = op.unit or UnitId("attention", op.layer)
        return unit.layer, str(unit)

    def _next(self, tensor: str, count: int) -> slice:
        """Places of so many more rows of a tensor that comes in pieces."""
        first = self._taken[tensor]
        self._taken[tensor] += count
        return slice(first, first + count)

    def _tokens(self, tensor: str, count: int) -> np.ndarray:
        """Tokens of the block that a tensor of the operation has a row for; the head's come in several tensors."""
        if self._op.kind == "head":
            return self._of_block.head[self._op.half][self._next(tensor, count)]
        in_batch = self._op.batch >= 0
        start = self._block.batches[self._op.batch].start if in_batch else self._halves[self._op.half].start
        return np.arange(start, start + count)

    def _found(
        self,
        tensor: str,
        x: torch.Tensor,
        tokens: np.ndarray,
        experts: np.ndarray | None,
        weights: Weights | None,
        masked: bool,
    ) -> None:
        """Tell where the values are, as an error or a warning.

        Raises:
            NonFiniteError: they are checked.
        """
        rows = wrong_rows(x, masked=masked)
        layer, unit = self._place()
        expert = None
        if experts is not None:
            expert = int(experts[rows[0]])
            unit, weights = str(self._op.unit or UnitId("expert", layer, expert)), self._weights_of(expert)
        values = x[int(rows[0])].reshape(-1)
        wrong = values[values.isnan() | (values == torch.inf)] if masked else values[~values.isfinite()]
        finding = Finding(
            sweep=self._sweep,
            layer=layer,
            unit=unit,
            expert=expert,
            tensor=tensor,
            value=float(wrong[0]),
            row=self._of_block.describe(int(tokens[rows[0]])),
            others=len(np.unique(tokens[rows])) - 1,
            weights=None if weights is None else tuple(wrong_weights(weights)),
            dtype=x.dtype,
        )
        if self._check:
            raise NonFiniteError(finding.sentence())
        self._warned = True
        log.warning("%s", finding.sentence())

    def _weights_of(self, expert: int) -> Mapping[str, torch.Tensor]:
        """Tensors of the unit that an expert was computed with."""
        if len(self._weights) == len(self._computed):  # each is a unit alone
            return self._weights[self._computed.index(expert)]
        return self._weights[-1]
