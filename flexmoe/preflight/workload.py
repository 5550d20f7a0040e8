"""From the lengths of a job's rows to what sizes its memory and what it is planned for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from policies.policy import Workload

#: Most different pairs of lengths that are kept apart.
_MOST_LENGTHS = 4096


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
