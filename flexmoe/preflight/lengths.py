"""How long a job's rows are: a few numbers for each, in arrays, so that a million rows are a few megabytes; and what they
come to for the planner.

An *open* row is a chat that names no limit. It may take the rest of the context, and is planned with what such rows are
expected to take; it runs wherever its prompt has room, and ends at the latest where the KV cache does.
"""

from __future__ import annotations

from array import array
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from flexmoe.params import EXPECTED_NEW_TOKENS, EngineRequest
from flexmoe.prefixes.digests import page_digests
from policies.common.option_names import option
from policies.workload import Workload

#: Most different pairs of lengths that are kept apart.
_MOST_LENGTHS = 4096
#: A plan has room for this many new tokens of an open row at least, where memory does: answers that reason take thousands.
OPEN_ROOM_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Lengths of a job's rows.

    Attributes:
        workload: mean prompt and completion lengths, rounded up; the number of rows and the histogram of their lengths.
        longest_row: tokens of the longest row, prompt and completion; of an open row those that there must be room for.
        rows: rows measured, every sample of a prompt one.
        scores_only: none of them generates a token.
        open_rows: those of them that name no limit.
        open_tokens: new tokens that each of those is expected to take, at most.
        longest_open: tokens that the longest of those may reach; 0 where there are none.
    """

    workload: Workload
    longest_row: int
    rows: int
    scores_only: bool = False
    open_rows: int = 0
    open_tokens: int = EXPECTED_NEW_TOKENS
    longest_open: int = 0

    def open_lines(self) -> list[str]:
        """What to say of the rows that name no limit."""
        if not self.open_rows:
            return []
        return [
            f"{self.open_rows} of {self.rows} completions name no limit: the plan expects {self.open_tokens} tokens of "
            f"each, and each may take the rest of the context ({option('gen_len')} sets a limit)"
        ]

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
        scores_only = not found.new_tokens
        return cls(workload=workload, longest_row=workload.longest_row, rows=found.rows, scores_only=scores_only)


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
        is_open: whether the context is the only limit; then there is one prompt.
        scored_tokens: of all prompts, those whose log-probabilities are asked.
        digests: of each prompt, those of its beginnings in base64 (`flexmoe.prefixes.digests`); none where they are not wanted.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    longest: int
    is_open: bool = False
    scored_tokens: int = 0
    digests: Sequence[str] = ()

    @classmethod
    def of(cls, parts: Sequence[EngineRequest], context: int, *, prefixes: bool = False) -> RowLength:
        """The size of what a row asks of the engine.

        Args:
            context: most tokens of a prompt and its completion.
            prefixes: with the digests of its prompts.
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
            is_open=any(part.params.max_tokens is None for part in parts),
            scored_tokens=sum(
                length - 1 for part, length in zip(parts, prompts, strict=True) if part.params.scores_prompt is not None
            ),
            digests=[b64encode(page_digests(part.prompt_token_ids)).decode() for part in parts] if prefixes else (),
        )


class Lengths:
    """The sizes of a job's rows; rows that were not measured have none.

    Args:
        rows: rows of the job, numbered from 0.
        open_tokens: new tokens that an open row is expected to take, at most.

    Attributes:
        prompt_tokens, new_tokens: by row; the latter are the most that all its completions may have.
        expected_tokens: by row: the new tokens of all its completions that a plan counts with.
        expected_end: by row: tokens that its longest prompt and completion is expected to reach.
        longest: by row: tokens that its longest prompt and completion may reach.
        needed: by row: tokens of one prompt and completion that it needs room for, to run at all.
        common: tokens that a prompt has in common with others, and how many prompts do (`PrefixTree.means`).
    """

    def __init__(self, rows: int, open_tokens: int = EXPECTED_NEW_TOKENS) -> None:
        self._open_tokens, self._is_open = open_tokens, bytearray(rows)
        self._prompts, self._samples = array("I", [0]) * rows, array("I", [0]) * rows
        self.prompt_tokens, self.new_tokens = array("Q", [0]) * rows, array("Q", [0]) * rows
        self.expected_tokens, self.expected_end = array("Q", [0]) * rows, array("Q", [0]) * rows
        self.longest, self.needed = array("Q", [0]) * rows, array("Q", [0]) * rows
        self._scored_tokens = array("Q", [0]) * rows
        self.common = 0, 1.0

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, row: int) -> bool:
        return self._prompts[row] > 0

    def __setitem__(self, row: int, length: RowLength) -> None:
        self._prompts[row], self._samples[row] = length.prompts, length.samples
        self.prompt_tokens[row], self.new_tokens[row] = length.prompt_tokens, length.new_tokens
        self.longest[row], self._is_open[row] = length.longest, length.is_open
        self._scored_tokens[row] = length.scored_tokens
        if length.is_open:
            expected = min(self._open_tokens, length.longest - length.prompt_tokens)
            self.expected_tokens[row], self.expected_end[row] = (
                expected * length.samples,
                length.prompt_tokens + expected,
            )
            self.needed[row] = length.prompt_tokens + 1
        else:
            self.expected_tokens[row] = length.new_tokens
            self.needed[row] = self.expected_end[row] = length.longest

    def expected(self, row: int) -> tuple[int, int]:
        """Tokens that a completion of a row is expected to have, and those of its longest prompt."""
        completion = self.expected_tokens[row] // max(1, self._samples[row])
        return completion, self.expected_end[row] - completion

    def measured(self, context: int, longest_row: int | None = None) -> Measured:
        """The job in a few numbers. Where a row has several prompts, each counts as long as they are on average.

        Args:
            context: most tokens of a prompt and its completion.
            longest_row: rows that need more are left out, and open ones expected to end there; None leaves none out.
        """
        most = context if longest_row is None else longest_row
        rows = [row for row, prompts in enumerate(self._prompts) if prompts and self.needed[row] <= most]
        measured = Measured.of((self._one(row, most) for row in rows), context)
        open_rows = [row for row in rows if self._is_open[row]]
        longest = max((min(most, self._room(row)) for row in rows), default=0)
        longest = max(measured.longest_row, longest)
        scored = -(-sum(self._scored_tokens[row] for row in rows) // max(1, measured.rows))
        rows_per_prompt = max(1.0, measured.rows / max(1, sum(self._prompts[row] for row in rows)))
        return replace(
            measured,
            workload=replace(
                measured.workload,
                longest_row=longest,
                scored_tokens=scored,
                rows_per_prompt=rows_per_prompt,
                prefix_len=self.common[0],
                rows_per_prefix=self.common[1],
            ),
            longest_row=longest,
            open_rows=sum(self._samples[row] for row in open_rows),
            open_tokens=self._open_tokens,
            longest_open=max((self.longest[row] for row in open_rows), default=0),
        )

    def sizes(self) -> list[int]:
        """The different values of ``longest_row`` that make a difference to `measured`, ascending."""
        rows = (row for row, needed in enumerate(self.needed) if needed)
        return sorted({size for row in rows for size in (self.needed[row], self.expected_end[row], self._room(row))})

    def _room(self, row: int) -> int:
        """Tokens of one prompt and completion that a plan makes room for."""
        if not self._is_open[row]:
            return self.longest[row]
        return min(self.longest[row], self.prompt_tokens[row] + max(OPEN_ROOM_TOKENS, self._open_tokens))

    def _one(self, row: int, most: int) -> tuple[int, int, int]:
        """Prompt tokens, new tokens and samples of a row, as for one of its samples."""
        samples = self._samples[row]
        prompt, new = -(-self.prompt_tokens[row] // self._prompts[row]), -(-self.expected_tokens[row] // samples)
        return prompt, min(new, most - prompt) if self._is_open[row] else new, samples
