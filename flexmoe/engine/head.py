"""The end of a sweep: hidden states of the rows that get a token, and of positions that are scored, against the vocabulary.

Legend: T tokens of the block, D hidden, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flexmoe.kernels.family import Family, Weights
from flexmoe.kv.batch import Batch, Block
from flexmoe.sampling.logprobs import PromptScores
from flexmoe.system.device import Device

#: Bytes per vocabulary entry of a scored position at a time: its logits, in float32 too, and what `PromptScores` makes of them.
SCORE_BYTES = 24


class Logits:
    """Logits, piece of the head by piece.

    Args:
        device: compute device.
        family: the model's mathematics.
        score_bytes: memory that the logits of scored positions may take at a time.
        dtype: compute dtype.
    """

    def __init__(self, device: Device, family: Family, score_bytes: int, dtype: torch.dtype):
        self._device, self._family = device, family
        self._score_bytes, self._dtype = score_bytes, dtype

    def collect(self, block: Block, final_hidden: Callable[[Batch, torch.Tensor], torch.Tensor], room_TD: torch.Tensor):
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
            targets = torch.tensor([t for run in block.scored for t in run.targets])
            block.scores = PromptScores(targets.to(self._device.torch), max(run.top for run in block.scored))
        self._scores, self._scored_TD, self._rows_RD = block.scores, room_TD, torch.cat(rows)
        vocab = self._family.arch.vocab_size
        self._logits_RV = torch.empty(len(self._rows_RD), vocab, dtype=self._dtype, device=self._device.torch)

    def add(self, piece: tuple[int, int], weights: Weights) -> None:
        """The logits of a piece of the vocabulary, from its first entry up to its last."""
        if "norm" in weights:
            self._rows_RD = self._family.final_norm(self._rows_RD, weights)
        self._logits_RV[:, slice(*piece)] = self._family.head(self._rows_RD, weights)
        if self._scores is not None:
            self._score(piece[0], weights)

    def take(self) -> torch.Tensor:
        """``[R, V]``, one row per requested position, in block order; nothing of it is kept."""
        logits_RV, self._logits_RV, self._rows_RD, self._scores = self._logits_RV, None, None, None
        return logits_RV

    def _score(self, first: int, weights: Weights) -> None:
        """A piece of the head over the scored positions, as many of them at a time as the memory takes."""
        scores, scored_TD = self._scores, self._scored_TD
        step = max(1, self._score_bytes // (SCORE_BYTES * len(weights["head"])))
        for at in range(0, len(scores), step):
            rows = slice(at, min(at + step, len(scores)))
            if "norm" in weights:
                scored_TD[rows] = self._family.final_norm(scored_TD[rows], weights)
            scores.add(rows, first, self._family.head(scored_TD[rows], weights).float())
