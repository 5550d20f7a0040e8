"""One sweep's work as tensors: the rows in flight, the run of tokens each contributes, and the GPU batches.

A run is q >= 1 tokens of one row: its prompt or a chunk of it, one decoded token, or (later) drafted tokens to verify.
Nothing else distinguishes prefill from decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch

from flexmoe.kernels.ragged import find_shared
from flexmoe.kv.cache import RowKV
from flexmoe.sampling.logprobs import PromptScores
from flexmoe.system.device import Event
from policies.admission.row_state import AttentionMode
from policies.schedule import in_first_half

#: Rows of one mode lie together in a block, so that most GPU batches have one group.
_MODES = list(AttentionMode)
_Result = TypeVar("_Result")


@dataclass(slots=True, eq=False)
class Run:
    """``tokens`` of one row that follow the ``kv.length`` tokens it has in the cache. Nothing changes it: frozen, thousands of them
    would take milliseconds of a sweep to make.

    Attributes:
        kv: the row's cache; room for the tokens is already reserved.
        tokens: token ids of the run.
        mode: where the row is attended.
        logits: for how many of the run's last positions logits are wanted (0 for an unfinished prompt).
        owner: whatever the caller wants to find again.
        row_tokens: tokens of the row that are known, those after an unfinished prompt's run included; None: the run is
            the last of them.
        targets: token ids whose log-probability is wanted: those that follow the run's positions from ``score_from`` on.
        score_from: place in the run.
        top: how many most probable tokens are wanted beside each of the targets.
    """

    kv: RowKV
    tokens: Sequence[int]
    mode: AttentionMode
    logits: int
    owner: Any = None
    row_tokens: int | None = None
    targets: Sequence[int] = ()
    score_from: int = 0
    top: int = 0


@dataclass(slots=True)
class Group:
    """The runs of a GPU batch that are attended in one place; tokens ``[start, stop)`` of the batch."""

    mode: AttentionMode
    runs: list[Run]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """A result on the device: wait for ``event`` on the stream that reads it."""

    tensor: torch.Tensor
    event: Event


@dataclass(slots=True)
class Batch:
    """A GPU batch: tokens ``[start, stop)`` of the block. The executor moves its tensors to the compute device.

    Attributes:
        ids_T: token ids.
        positions_T, lengths_T: each token's place in its row, and that row's length.
        logit_rows, score_rows: places of the batch whose hidden states the head wants.
        on_disk: the KV of some rows lives there.
        kv: where the KV of each group lies, by group of layers (`flexmoe.kv.group_index`); like ``rope``, derived once per
            sweep.
        loaded: by layer, transfers of fetched KV that have been requested.
        stored, written, attended: transfers and CPU attention of the current layer.
        side: of the two sets of buffers, that of the last store.
    """

    index: int
    start: int
    stop: int
    groups: list[Group]
    ids_T: torch.Tensor
    positions_T: torch.Tensor
    lengths_T: torch.Tensor
    logit_rows: torch.Tensor
    score_rows: torch.Tensor
    on_disk: bool
    kv: dict[AttentionMode, list[Any]] = field(default_factory=dict)
    rope: Any = None
    loaded: dict[int, Future[Event]] = field(default_factory=dict)
    stored: Future[None] | None = None
    written: Future[None] | None = None
    attended: Future[Arrived] | None = None
    side: int = 0


def begun(future: Future[_Result] | None) -> Future[_Result]:
    """A transfer of a batch that the schedule has begun earlier in the layer.

    Raises:
        RuntimeError: it has not.
    """
    if future is None:
        raise RuntimeError("the schedule waits for a transfer that it has not begun")
    return future


class Block:
    """The runs of a sweep, ordered and cut into GPU batches.

    Args:
        runs: one per row.
        gpu_batch_size: rows per GPU batch.
        half_blocks: 2: the rows of each kind are dealt to two halves of like work, and in each to its GPU batches; those of one
            prefix to one half where neither reads more for that, and to as few of its batches as that allows.
        fetched_rows: rows of a GPU batch whose KV may be fetched, where there are two halves; None is no limit.

    Attributes:
        runs: the runs in block order: rows attended in one place together, so that most GPU batches hold one group, and among
            those the rows that share pages; of two half-blocks in each GPU batch.
        batches: the GPU batches.
    """

    def __init__(self, runs: Sequence[Run], gpu_batch_size: int, half_blocks: int = 1, fetched_rows: int | None = None):
        ordered = sorted(runs, key=lambda r: (_MODES.index(r.mode), r.kv.tier, r.kv.shared))
        cut = [ordered[i : i + gpu_batch_size] for i in range(0, len(ordered), gpu_batch_size)]
        if half_blocks > 1:
            cut = _dealt(ordered, max(len(cut), _batches_to_fetch(ordered, fetched_rows)))
        self.runs = [run for batch in cut for run in batch]
        self.batches: list[Batch] = []
        for own in cut:
            self.batches.append(_batch(len(self.batches), self.tokens, own))

    @property
    def tokens(self) -> int:
        """Tokens that the sweep advances."""
        return self.batches[-1].stop if self.batches else 0

    def halves(self, first_half: int) -> list[slice]:
        """Tokens of each half-block.

        Args:
            first_half: GPU batches of the first one; 0: the block marches as one.
        """
        middle = self.batches[first_half - 1].stop if first_half else self.tokens
        return [slice(0, middle), slice(middle, self.tokens)][: 2 if first_half else 1]

    def parts(self, first_part: int) -> list[BlockPart]:
        """What gets its tokens together, one after the other.

        Args:
            first_part: GPU batches of the first part; 0: there is one, with all of them.
        """
        if not first_part:
            return [BlockPart(self.batches)]
        return [BlockPart(self.batches[:first_part]), BlockPart(self.batches[first_part:])]


class BlockPart:
    """GPU batches whose rows get their tokens together: those of a block, or of one of its halves.

    Attributes:
        batches: the GPU batches.
        runs: theirs, in order.
        logit_owners: owner of each row of the part's logits, in order.
        scored: the runs that have targets, in order.
        targets: int64, those of all of them.
        scores: the targets' log-probabilities, in order; the executor's answer, None where there are no targets.
    """

    def __init__(self, batches: Sequence[Batch]):
        self.batches = batches
        self.runs = [run for batch in batches for group in batch.groups for run in group.runs]
        self.logit_owners = [r.owner for r in self.runs for _ in range(r.logits)]
        self.scored = [r for r in self.runs if r.targets]
        self.targets = torch.tensor([t for run in self.scored for t in run.targets], dtype=torch.int64)
        self.scores: PromptScores | None = None

    @property
    def tokens(self) -> slice:
        """Those of the block that are the part's."""
        return slice(self.batches[0].start, self.batches[-1].stop)


def _batches_to_fetch(runs: list[Run], fetched_rows: int | None) -> int:
    """GPU batches in which no more rows are fetched than may be."""
    fetched = sum(run.mode is AttentionMode.FETCH for run in runs)
    return -(-fetched // fetched_rows) if fetched_rows else 0


def _dealt(runs: list[Run], batches: int) -> list[list[Run]]:
    """The runs of so many GPU batches of two half-blocks: those of each kind in turns, in each batch in the order that they had."""
    first = in_first_half(batches)
    counts = (first, batches - first)
    return [batch for half, count in zip(_halves(runs, batches), counts) for batch in _spread(half, count)]


def _spread(runs: list[Run], batches: int) -> list[list[Run]]:
    """The runs of a half, in turns, for its GPU batches. Those that decode and share pages lie together: each batch has as many of
    a kind as in turns, but neighbours."""
    turns = [at % batches for at in range(len(runs))] if batches else []
    kinds: dict[tuple[AttentionMode, str], list[int]] = {}
    for at, run in enumerate(runs):
        if len(run.tokens) == 1 and run.kv.shared:
            kinds.setdefault((run.mode, run.kv.tier), []).append(at)
    for places in kinds.values():
        for at, turn in zip(places, sorted(turns[at] for at in places)):
            turns[at] = turn
    cut: list[list[Run]] = [[] for _ in range(batches)]
    for run, turn in zip(runs, turns):
        cut[turn].append(run)
    return cut


def _halves(runs: list[Run], batches: int) -> list[list[Run]]:
    """The runs, in turns, for two halves in proportion to their GPU batches; in each in the order that they had.

    Those of one prefix come to one half where neither half reads more for that, so that a prefix is not read for both.
    """
    first = in_first_half(batches)
    in_first = [(at + 1) * first // batches != at * first // batches for at in range(len(runs))]
    kinds: dict[tuple[AttentionMode, str], list[int]] = {}  # of the runs that decode
    for at, run in enumerate(runs):
        if len(run.tokens) == 1:
            kinds.setdefault((run.mode, run.kv.tier), []).append(at)
    for places in kinds.values():
        members, in_turn = [runs[at] for at in places], [in_first[at] for at in places]
        if any(run.kv.shared for run in members):
            together = _kept_together(members, in_turn)
            if _most_read(members, together) <= _most_read(members, in_turn):
                for at, chosen in zip(places, together):
                    in_first[at] = chosen
    return [[run for run, chosen in zip(runs, in_first) if chosen is half] for half in (True, False)]


def _most_read(runs: list[Run], in_first: list[bool]) -> int:
    """Tokens in the cache that the half which reads more reads."""
    return max(_read([run for run, chosen in zip(runs, in_first) if chosen is half]) for half in (True, False))


def _read(runs: list[Run]) -> int:
    again = sum(
        (each.stop - each.first - 1) * (each.end - each.begin) for each in find_shared([r.kv.shared for r in runs])
    )
    return sum(run.kv.length for run in runs) - again


def _kept_together(runs: list[Run], in_turn: list[bool]) -> list[bool]:
    """Whether each run comes to the first half: as many as in turns, of one prefix together where a half has room for them."""
    room = {True: sum(in_turn), False: len(in_turn) - sum(in_turn)}
    chosen: dict[int, bool] = {}

    def put(places: list[int], level: int) -> None:
        prefixes: dict[tuple[int, int], list[int]] = {}
        for at in places:
            for mark in runs[at].kv.shared[level : level + 1]:
                prefixes.setdefault(mark, []).append(at)
        for group in sorted(prefixes.values(), key=len, reverse=True):
            half = room[True] > room[False]
            if len(group) <= room[half]:
                chosen.update(dict.fromkeys(group, half))
                room[half] -= len(group)
            else:
                put(group, level + 1)
        others = [at for at in places if len(runs[at].kv.shared) <= level]
        first = room[True] * len(others) // max(1, sum(room.values()))
        for place, at in enumerate(others):
            chosen[at] = half = (place + 1) * first // len(others) != place * first // len(others)
            room[half] -= 1

    put(list(range(len(runs))), 0)
    return [chosen[at] for at in range(len(runs))]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers ``[starts[i], starts[i] + counts[i])`` of every i, one after the other; int64."""
    ends = np.cumsum(counts)
    numbers: np.ndarray = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)
    return numbers


def _batch(index: int, start: int, runs: list[Run]) -> Batch:
    past = np.array([r.kv.length for r in runs], dtype=np.int64)
    counts, logits, scored = (
        np.array(column, dtype=np.int64)
        for column in zip(*((len(r.tokens), r.logits, len(r.targets)) for r in runs), strict=True)
    )
    lengths = np.array([r.row_tokens or 0 for r in runs], dtype=np.int64)
    stops = np.cumsum(counts)
    return Batch(
        index=index,
        start=start,
        stop=start + int(stops[-1]),
        groups=_groups(runs, stops.tolist()),
        ids_T=torch.from_numpy(np.fromiter(chain.from_iterable(r.tokens for r in runs), np.int64, int(stops[-1]))),
        positions_T=torch.from_numpy(ranges(past, counts)),
        lengths_T=torch.from_numpy(np.repeat(np.where(lengths > 0, lengths, past + counts), counts)),
        logit_rows=torch.from_numpy(ranges(stops - logits, logits)),
        score_rows=torch.from_numpy(ranges(stops - counts + [r.score_from for r in runs], scored)),
        on_disk=any(r.kv.tier == "disk" for r in runs),
    )


def _groups(runs: list[Run], stops: list[int]) -> list[Group]:
    """The groups of a GPU batch; ``stops`` are the ends of the runs' tokens."""
    groups: list[Group] = []
    for run, stop in zip(runs, stops):
        if not groups or groups[-1].mode is not run.mode:
            before = groups[-1].stop if groups else 0
            groups.append(Group(run.mode, [], before, before))
        groups[-1].runs.append(run)
        groups[-1].stop = stop
    return groups
