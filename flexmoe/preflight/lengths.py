"""How long a job's rows are: a few numbers for each, in arrays, so that a million rows are a few megabytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flexmoe.params import EngineRequest
from flexmoe.preflight.workload import Measured


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
        ends = [min(length + part.params.max_tokens, context) for length, part in zip(prompts, parts)]
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
