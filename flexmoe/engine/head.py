"""The end of a sweep: hidden states of the rows that get a token, and of positions that are scored, against the vocabulary.

Legend: T tokens of the part, D hidden, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexmoe.kernels.family import Family, Weights
from flexmoe.kv.batch import Batch, BlockPart
from flexmoe.sampling.logprobs import PromptScores
from flexmoe.system.device import Device


@dataclass(slots=True, kw_only=True)
class _Collected:
    """The head's inputs of a part of a block, and its logits as far as they are computed."""

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
        self._part: _Collected | None = None

    def collect(
        self, part: BlockPart, final_hidden: Callable[[Batch, torch.Tensor], torch.Tensor], room_TD: torch.Tensor
    ) -> None:
        """Take the hidden states that the head needs.

        Args:
            part: whose rows get their tokens next.
            final_hidden: those of places of a GPU batch.
            room_TD: takes those of scored positions.
        """
        rows, scored = [], 0
        for batch in part.batches:
            rows.append(final_hidden(batch, batch.logit_rows))
            if len(batch.score_rows):
                last = scored + len(batch.score_rows)
                room_TD[scored:last] = final_hidden(batch, batch.score_rows)
                scored = last
        if scored:
            part.scores = PromptScores(part.targets, max(run.top for run in part.scored))
        rows_RD, vocab = torch.cat(rows), self._family.arch.vocab_size
        logits_RV = torch.empty(len(rows_RD), vocab, dtype=self._dtype, device=self._device.torch)
        self._part = _Collected(rows_RD=rows_RD, logits_RV=logits_RV, scores=part.scores, scored_TD=room_TD)

    def add(self, piece: tuple[int, int], weights: Weights) -> None:
        """The logits of a piece of the vocabulary, from its first entry up to its last."""
        part = self._collected()
        if "norm" in weights:
            part.rows_RD = self._family.final_norm(part.rows_RD, weights)
        part.logits_RV[:, slice(*piece)] = self._family.head(part.rows_RD, weights)
        if part.scores is not None:
            self._score(part.scores, part.scored_TD, piece[0], weights)

    def take(self) -> torch.Tensor:
        """``[R, V]``, one row per requested position, in block order; nothing of it is kept."""
        part, self._part = self._collected(), None
        return part.logits_RV

    def _collected(self) -> _Collected:
        if self._part is None:
            raise RuntimeError("no hidden states have been collected for the head")
        return self._part

    def _score(self, scores: PromptScores, scored_TD: torch.Tensor, first: int, weights: Weights) -> None:
        """A piece of the head over the scored positions, a few of them at a time."""
        for at in range(0, len(scores), self._scored_at_once):
            rows = slice(at, min(at + self._scored_at_once, len(scores)))
            if "norm" in weights:
                scored_TD[rows] = self._family.final_norm(scored_TD[rows], weights)
            scores.add(rows, first, self._family.head(scored_TD[rows], weights).float())
