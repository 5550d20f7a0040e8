"""How long a job's rows are: a few numbers for each, in arrays, so that a million rows are a few megabytes; what they come to
for the planner, and the order in which rows are worked on.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from flexmoe.params import EngineRequest
from policies.workload import Workload

#: Most different pairs of lengths that are kept apart.
_MOST_LENGTHS = 4096
#: Windows are this many blocks.
WINDOW_BLOCKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Lengths of a job's rows.

    Attributes:
        workload: mean prompt and completion lengths, rounded up; the number of rows and the histogram of their lengths.
        longest_row: tokens of the longest row, prompt and completion.
        rows: rows measured, every sample of a prompt one.
    """

    workload: Workload
    longest_row: int
    rows: int

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int, int]], context: int) -> Measured:
        """Measures what can run; there may be nothing.

        Args:
            lengths: of each prompt its tokens, the ``max_tokens`` of a completion, and the number of completions.
            context: most tokens of a prompt and its completion.
        """
        found = _Histogram()
        for prompt_tokens, max_tokens, rows in lengths:
            found.add(prompt_tokens, min(max_tokens, context - prompt_tokens), rows)
        if not found.rows:
            return cls(workload=Workload(prompt_len=1, gen_len=1), longest_row=2, rows=0)
        workload = replace(
            Workload.of_counts(found.counts()),
            prompt_len=-(-found.prompt_tokens // found.rows),
            gen_len=max(1, -(-found.new_tokens // found.rows)),
            longest_row=found.longest,
        )
        return cls(workload=workload, longest_row=workload.longest_row, rows=found.rows)


class _Histogram:
    """Counts rows by their lengths; where these are too many, like ones together."""

    def __init__(self) -> None:
        self.rows = self.prompt_tokens = self.new_tokens = self.longest = 0
        self._step = 1
        self._bins: dict[tuple[int, int], list[int]] = {}

    def add(self, prompt_tokens: int, new_tokens: int, rows: int) -> None:
        self.rows += rows
        self.prompt_tokens += rows * prompt_tokens
        self.new_tokens += rows * new_tokens
        if not new_tokens:  # nothing to generate still takes the sweep that computes the prompt
            prompt_tokens, new_tokens = max(1, prompt_tokens - 1), 1
        self.longest = max(self.longest, prompt_tokens + new_tokens)
        self._note(prompt_tokens // self._step, new_tokens // self._step, rows, rows * prompt_tokens, rows * new_tokens)
        while len(self._bins) > _MOST_LENGTHS:
            self._step *= 2
            bins, self._bins = self._bins, {}
            for (prompt, new), sums in bins.items():
                self._note(prompt // 2, new // 2, *sums)

    def counts(self) -> dict[tuple[int, int], int]:
        """(prompt tokens, new tokens): rows, those of a bin by their means."""
        counts: dict[tuple[int, int], int] = {}
        for rows, prompt, new in self._bins.values():
            key = round(prompt / rows), round(new / rows)
            counts[key] = counts.get(key, 0) + rows
        return counts

    def _note(self, prompt: int, new: int, *sums: int) -> None:
        held = self._bins.setdefault((prompt, new), [0, 0, 0])
        for place, value in enumerate(sums):
            held[place] += value


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLength:
    """The size of one row.

    Args:
        prompts: prompts of the row.
        samples: completions, those of all prompts.
        prompt_tokens: of all prompts; one that has several completions counts once.
        new_tokens: most tokens of all completions.
        longest: most tokens of any one prompt and its completion.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    longest: int

    @classmethod
    def of(cls, parts: Sequence[EngineRequest], context: int) -> RowLength:
        """The size of what a row asks of the engine.

        Args:
            context: most tokens of a prompt and its completion.
        """
        prompts = [len(part.prompt_token_ids) for part in parts]
        limits = [context if part.params.max_tokens is None else part.params.max_tokens for part in parts]
        ends = [min(length + limit, context) for length, limit in zip(prompts, limits, strict=True)]
        return cls(
            prompts=len(parts),
            samples=sum(part.params.n for part in parts),
            prompt_tokens=sum(prompts),
            new_tokens=sum((end - length) * part.params.n for part, length, end in zip(parts, prompts, ends)),
            longest=max(ends),
        )


class Lengths:
    """The sizes of a job's rows; rows that were not measured have none.

    Args:
        rows: rows of the job, numbered from 0.
    """

    def __init__(self, rows: int) -> None:
        self._prompts, self._samples = array("I", [0]) * rows, array("I", [0]) * rows
        self.prompt_tokens, self.new_tokens = array("Q", [0]) * rows, array("Q", [0]) * rows
        self.longest = array("Q", [0]) * rows

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, row: int) -> bool:
        return self._prompts[row] > 0

    def __setitem__(self, row: int, length: RowLength) -> None:
        self._prompts[row], self._samples[row] = length.prompts, length.samples
        self.prompt_tokens[row], self.new_tokens[row] = length.prompt_tokens, length.new_tokens
        self.longest[row] = length.longest

    def measured(self, context: int, longest_row: int | None = None) -> Measured:
        """The job in a few numbers. Where a row has several prompts, each counts as long as they are on average.

        Args:
            context: most tokens of a prompt and its completion.
            longest_row: rows that may grow longer are left out; None leaves none out.
        """
        most = context if longest_row is None else longest_row
        measured = Measured.of(self._each(most), context)
        longest = max((tokens for tokens in self.longest if tokens <= most), default=0)
        longest = max(measured.longest_row, longest)
        return replace(measured, workload=replace(measured.workload, longest_row=longest), longest_row=longest)

    def _each(self, most: int) -> Iterator[tuple[int, int, int]]:
        """Prompt tokens, new tokens and samples of each row, as for one of its samples."""
        for row, prompts in enumerate(self._prompts):
            if prompts and self.longest[row] <= most:
                samples = self._samples[row]
                yield -(-self.prompt_tokens[row] // prompts), -(-self.new_tokens[row] // samples), samples


def longest_first(rows: Iterable[int], lengths: Sequence[int], window: int) -> Iterator[int]:
    """The rows in windows of `window`, each window sorted by length, the longest first, equal ones as they came.

    Args:
        rows: what is to be ordered; taken lazily, a window at a time.
        lengths: tokens that each row may reach, by row.
    """
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, window)):
        chunk.sort(key=lambda row: -lengths[row])
        yield from chunk
