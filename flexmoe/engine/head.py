"""The end of a sweep: hidden states of the rows that get a token, and of positions that are scored, against the vocabulary.

Legend: T tokens of the block, D hidden, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexmoe.kernels.family import Family, Weights
from flexmoe.kv.batch import Batch, Block
from flexmoe.sampling.logprobs import PromptScores
from flexmoe.system.device import Device


@dataclass(slots=True, kw_only=True)
class _Sweep:
    """The head's inputs in a sweep, and its logits as far as they are computed."""

    rows_RD: torch.Tensor
    logits_RV: torch.Tensor
    scores: PromptScores | None
    scored_TD: torch.Tensor


class Logits:
    """Logits, piece of the head by piece.

    Args:
        device: compute device.
        family: the model's mathematics.
        scored_at_once: scored positions that are computed at a time.
        dtype: compute dtype.
    """

    def __init__(self, device: Device, family: Family, scored_at_once: int, dtype: torch.dtype):
        self._device, self._family = device, family
        self._scored_at_once, self._dtype = scored_at_once, dtype
        self._sweep: _Sweep | None = None

    def collect(
        self, block: Block, final_hidden: Callable[[Batch, torch.Tensor], torch.Tensor], room_TD: torch.Tensor
    ) -> None:
        """Take the hidden states that the head needs.

        Args:
            final_hidden: those of places of a GPU batch.
            room_TD: takes those of scored positions.
        """
        rows, scored = [], 0
        for batch in block.batches:
            rows.append(final_hidden(batch, batch.logit_rows))
            if len(batch.score_rows):
                last = scored + len(batch.score_rows)
                room_TD[scored:last] = final_hidden(batch, batch.score_rows)
                scored = last
        if scored:
            block.scores = PromptScores(block.targets, max(run.top for run in block.scored))
        rows_RD, vocab = torch.cat(rows), self._family.arch.vocab_size
        logits_RV = torch.empty(len(rows_RD), vocab, dtype=self._dtype, device=self._device.torch)
        self._sweep = _Sweep(rows_RD=rows_RD, logits_RV=logits_RV, scores=block.scores, scored_TD=room_TD)

    def add(self, piece: tuple[int, int], weights: Weights) -> None:
        """The logits of a piece of the vocabulary, from its first entry up to its last."""
        sweep = self._collected()
        if "norm" in weights:
            sweep.rows_RD = self._family.final_norm(sweep.rows_RD, weights)
        sweep.logits_RV[:, slice(*piece)] = self._family.head(sweep.rows_RD, weights)
        if sweep.scores is not None:
            self._score(sweep.scores, sweep.scored_TD, piece[0], weights)

    def take(self) -> torch.Tensor:
        """``[R, V]``, one row per requested position, in block order; nothing of it is kept."""
        sweep, self._sweep = self._collected(), None
        return sweep.logits_RV

    def _collected(self) -> _Sweep:
        if self._sweep is None:
            raise RuntimeError("no hidden states have been collected in this sweep")
        return self._sweep

    def _score(self, scores: PromptScores, scored_TD: torch.Tensor, first: int, weights: Weights) -> None:
        """A piece of the head over the scored positions, a few of them at a time."""
        for at in range(0, len(scores), self._scored_at_once):
            rows = slice(at, min(at + self._scored_at_once, len(scores)))
            if "norm" in weights:
                scored_TD[rows] = self._family.final_norm(scored_TD[rows], weights)
            scores.add(rows, first, self._family.head(scored_TD[rows], weights).float())
