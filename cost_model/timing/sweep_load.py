"""What a sweep has to do: the rows in flight by how they are attended, and the same cut into GPU batches.

Counts are real numbers: in a mean sweep of the steady state 3.7 rows may enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import ceil

from cost_model.model.arch import ModelArch
from policies.schedule import in_first_half

#: Attended on the device from device memory; fetched from host memory or from disk; attended in host memory. A block
#: lines its rows up in this order (`flexmoe.kv.batch`).
MODES = ("gpu", "fetch", "disk", "cpu")
#: Lanes that pages of a prefix pass when they are copied from a tier to another one.
_COPY_LANES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("gpu", "cpu"): ("d2h",),
    ("cpu", "gpu"): ("h2d",),
    ("cpu", "disk"): ("disk_write",),
    ("disk", "cpu"): ("disk_read",),
    ("gpu", "disk"): ("d2h", "disk_write"),
    ("disk", "gpu"): ("disk_read", "h2d"),
}
#: All of those.
COPY_LANES = ("h2d", "d2h", "disk_read", "disk_write")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """The rows of a sweep that are attended in one way.

    Attributes:
        decode_rows: rows that contribute one token.
        decode_context: tokens that they attend over, summed.
        prompt_rows: rows that contribute a chunk of their prompt.
        prompt_tokens: tokens of these chunks, summed.
        prompt_past: tokens already cached of these rows, summed.
        pairs: (query, key) pairs of these chunks: q · (past + q / 2), summed.
    """

    decode_rows: float = 0.0
    decode_context: float = 0.0
    prompt_rows: float = 0.0
    prompt_tokens: float = 0.0
    prompt_past: float = 0.0
    pairs: float = 0.0

    def seen(self, share: float, window: int) -> RowGroup:
        """The same in a mean layer, where a share of the layers looks back through a window: context, past and pairs that rows of
        these mean lengths see.

        A query at position i sees min(i + 1, window) keys, so a chunk of q tokens behind p others sees the sum of that over its
        queries.
        """
        if not share:
            return self
        rows, prompts = max(self.decode_rows, 1e-12), max(self.prompt_rows, 1e-12)
        past, chunk = self.prompt_past / prompts, self.prompt_tokens / prompts
        rising = min(chunk, max(0.0, window - past))
        pairs = rising * (past + rising / 2) + (chunk - rising) * window
        return replace(
            self,
            decode_context=_mean(
                share, self.decode_rows * min(self.decode_context / rows, window), self.decode_context
            ),
            prompt_past=_mean(share, self.prompt_rows * min(past, window), self.prompt_past),
            pairs=_mean(share, min(self.pairs, self.prompt_rows * pairs), self.pairs),
        )

    def reading_once(self, tokens: float) -> RowGroup:
        """The same where so many tokens of each row are read for another row of its GPU batch."""
        return replace(
            self,
            decode_context=max(self.decode_rows, self.decode_context - self.decode_rows * tokens),
            prompt_past=max(0.0, self.prompt_past - min(self.prompt_past, self.prompt_rows * tokens)),
        )

    @property
    def rows(self) -> float:
        """Rows that take part."""
        return self.decode_rows + self.prompt_rows

    @property
    def tokens(self) -> float:
        """Tokens that the rows contribute."""
        return self.decode_rows + self.prompt_tokens

    def part(self, share: float) -> RowGroup:
        """A share of all counts."""
        return RowGroup(
            decode_rows=share * self.decode_rows,
            decode_context=share * self.decode_context,
            prompt_rows=share * self.prompt_rows,
            prompt_tokens=share * self.prompt_tokens,
            prompt_past=share * self.prompt_past,
            pairs=share * self.pairs,
        )


def copied_by_lane(copies: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """Pages that each lane moves for copies of (source tier, target tier, pages)."""
    found: dict[str, float] = {}
    for source, target, pages in copies:
        for lane in _COPY_LANES[source, target]:
            found[lane] = found.get(lane, 0.0) + pages
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepLoad:
    """One sweep's work.

    Attributes:
        groups: rows by mode.
        logits: rows that get a token.
        copied: KV pages of prefixes that are copied from tier to tier before it, by lane (`COPY_LANES`).
    """

    groups: Mapping[str, RowGroup]
    logits: float
    copied: Mapping[str, float] = field(default_factory=dict)

    def seen(self, arch: ModelArch) -> SweepLoad:
        """The load of a mean layer, whose rows see what the windows of the layers let them see."""
        share = arch.windowed_share
        if not share or arch.sliding_window is None:
            return self
        groups = {mode: group.seen(share, arch.sliding_window) for mode, group in self.groups.items()}
        return replace(self, groups=groups)

    def part(self, share: float) -> SweepLoad:
        """A share of all counts."""
        groups = {mode: group.part(share) for mode, group in self.groups.items()}
        copied = {lane: share * pages for lane, pages in self.copied.items()}
        return SweepLoad(groups=groups, logits=share * self.logits, copied=copied)

    @property
    def rows(self) -> float:
        """Rows in flight that take part."""
        return sum(group.rows for group in self.groups.values())

    @property
    def tokens(self) -> float:
        """Tokens that the sweep advances."""
        return sum(group.tokens for group in self.groups.values())

    @property
    def prompt_tokens(self) -> float:
        """Those of them that are prompt."""
        return sum(group.prompt_tokens for group in self.groups.values())


def _mean(share: float, windowed: float, full: float) -> float:
    return share * windowed + (1 - share) * full


def _zeros() -> dict[str, float]:
    return dict.fromkeys(MODES, 0.0)


@dataclass(slots=True)
class BatchLoad:
    """One GPU batch: its tokens, and per mode the new ones, the context decoded over, the past to fetch, prompt pairs."""

    rows: float = 0.0
    tokens: float = 0.0
    new: dict[str, float] = field(default_factory=_zeros)
    context: dict[str, float] = field(default_factory=_zeros)
    past: dict[str, float] = field(default_factory=_zeros)
    pairs: dict[str, float] = field(default_factory=_zeros)


def batches(load: SweepLoad, gpu_batch_size: int) -> list[BatchLoad]:
    """The sweep cut into GPU batches in the runtime's order: mode by mode, and in a mode those that decode first.

    Batches that are alike may be one object.
    """
    cut, room = [BatchLoad()], float(gpu_batch_size)
    for mode, rows, tokens, context, past, pairs in _strips(load):
        left = rows
        while left > 1e-9:
            if room <= 1e-9:
                cut.append(BatchLoad())
                room = float(gpu_batch_size)
            taken = min(left, room)
            part = taken / rows
            batch = cut[-1]
            batch.rows += taken
            batch.tokens += part * tokens
            batch.new[mode] += part * tokens
            batch.context[mode] += part * context
            batch.past[mode] += part * past
            batch.pairs[mode] += part * pairs
            left, room = left - taken, room - taken
            if taken == gpu_batch_size:  # full of one kind: so are the next ones
                more = int(left / taken)
                cut += [batch] * more
                left -= more * taken
    return cut


def half_batches(load: SweepLoad, gpu_batch_size: int, fetched_rows: float) -> list[list[BatchLoad]]:
    """The same of a block that marches as two halves, for each half: all batches have rows of every kind (`flexmoe.kv.batch`). Of
    a sweep of one batch, that one alone.

    Args:
        fetched_rows: rows of a GPU batch whose KV is brought to the device, at most.
    """
    fetched = sum(load.groups[mode].rows for mode in ("fetch", "disk") if mode in load.groups)
    count = ceil(max(load.rows / gpu_batch_size, fetched / fetched_rows) - 1e-9)
    if count < 2:
        return [batches(load, gpu_batch_size)]
    [each] = batches(load.part(1 / count), gpu_batch_size + 1)
    first = in_first_half(count)
    return [[each] * first, [each] * (count - first)]


def _strips(load: SweepLoad) -> Iterator[tuple[str, float, float, float, float, float]]:
    """(mode, rows, tokens, context, past, pairs) of the rows that decode, then of those that prefill."""
    for mode in MODES:
        group = load.groups.get(mode)
        if group is None:
            continue
        if group.decode_rows:
            past = group.decode_context - group.decode_rows
            yield mode, group.decode_rows, group.decode_rows, group.decode_context, past, 0.0
        if group.prompt_rows:
            yield mode, group.prompt_rows, group.prompt_tokens, 0.0, group.prompt_past, group.pairs
