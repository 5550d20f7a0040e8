"""Which row and which of its tokens a row of a tensor belongs to.

Legend: T tokens of the block, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from flexmoe.kv.batch import Block, BlockPart, Run
from flexmoe.params import EngineRequest


class Owner(Protocol):
    """What a run belongs to where the engine runs requests: a sample of one."""

    request: EngineRequest
    index: int


class BlockTokens:
    """The tokens of a sweep's block, and which rows they are of.

    Args:
        block: of the sweep.
        parts: of it, which get their tokens one after the other.

    Attributes:
        head: of each part, the tokens that the head gets: those that want logits, then those that are scored.
    """

    def __init__(self, block: Block, parts: Sequence[BlockPart]):
        self._runs = block.runs
        self._stops = np.cumsum([len(run.tokens) for run in block.runs])
        self.head = [_of_head(part) for part in parts]

    def describe(self, token: int) -> str:
        """The row and the position of a token, in words."""
        at = int(np.searchsorted(self._stops, token, side="right"))
        run = self._runs[at]
        position = run.kv.length + token - (int(self._stops[at]) - len(run.tokens))
        name, sample = row_name(run)
        return f"row {at if name is None else name}{f', sample {sample}' if sample else ''}, position {position}"

    def records(self) -> list[dict[str, Any]]:
        """Every row in the order of the block, as `steps.jsonl` has it."""
        return [_row_record(run) for run in self._runs]


def _of_head(part: BlockPart) -> np.ndarray:
    rows = [batch.start + batch.logit_rows.cpu().numpy() for batch in part.batches]
    scored = [batch.start + batch.score_rows.cpu().numpy() for batch in part.batches]
    return np.concatenate([*rows, *scored])


def row_name(run: Run) -> tuple[str | None, int]:
    """Name of a run's request, in jobs ``custom_id/prompt``, and the number of the sample; None where there is no request."""
    owner: Owner | None = run.owner
    if owner is None:
        return None, 0
    return owner.request.stream_key or owner.request.request_id, owner.index


def _row_record(run: Run) -> dict[str, Any]:
    name, sample = row_name(run)
    return {
        "request": name,
        "sample": sample,
        "position": run.kv.length,
        "token_ids": [int(token) for token in run.tokens],
        "kv_tier": run.kv.tier,
        "attention": run.mode.name.lower(),
        "logits": run.logits,
    }


class RoutedTokens:
    """The tokens of each expert of a layer, in the order in which experts are computed.

    Args:
        ids_TK: chosen experts of each token; None: a dense layer, whose MLP is expert 0 of all.
        first: the first of these tokens in the block.
        tokens: T.
    """

    def __init__(self, ids_TK: np.ndarray | None, first: int, tokens: int):
        self._first, self._tokens = first, np.arange(tokens)
        self._experts = np.zeros(tokens, dtype=np.int64)
        if ids_TK is not None:
            order = np.argsort(ids_TK, axis=None, kind="stable")
            self._experts, self._tokens = ids_TK.reshape(-1)[order], order // ids_TK.shape[1]

    def of(self, experts: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Experts and tokens of the block of all pairs of these experts, those of one expert after those of another."""
        places: Sequence[np.ndarray] = [np.flatnonzero(self._experts == expert) for expert in experts]
        pairs = np.concatenate([np.empty(0, dtype=np.int64), *places])
        return self._experts[pairs], self._first + self._tokens[pairs]
