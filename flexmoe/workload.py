"""From the lengths of a job's rows to what sizes its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.policy import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Lengths of a job's rows.

    Attributes:
        workload: mean prompt and completion lengths, rounded up.
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
        rows = prompt = completion = longest = 0
        for prompt_tokens, max_tokens, n in lengths:
            ends = min(prompt_tokens + max_tokens, context)
            rows, prompt, completion = rows + n, prompt + n * prompt_tokens, completion + n * (ends - prompt_tokens)
            longest = max(longest, ends)
        mean = Workload(prompt_len=max(1, -(-prompt // max(1, rows))), gen_len=max(1, -(-completion // max(1, rows))))
        return cls(workload=mean, longest_row=longest or 2, rows=rows)
