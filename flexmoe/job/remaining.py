"""How many tokens a job still has to compute, from the sizes of its rows and from what finished rows have used; and what
those of a resumed job say of the rows that are left."""

from __future__ import annotations

from flexmoe.inputs.request_file import Rows
from flexmoe.job.journal import Journal
from flexmoe.params import EXPECTED_NEW_TOKENS
from flexmoe.preflight.lengths import Lengths
from flexmoe.preflight.prepare import Preparer
from flexmoe.progress import Left

#: Once so many rows have ended, the others are expected to use the same share of their `max_tokens`, or of what a row without one is
#: expected to take.
_ROWS_TO_LEARN = 64
#: Finished rows of which a resumed job learns.
_ROWS_TO_LOOK_AT = 4096


class Remaining:
    """Counts down while rows finish.

    Args:
        lengths: of the rows that are to be run, and of no others.
        kept_tokens: what those rows had generated before.
    """

    def __init__(self, lengths: Lengths, kept_tokens: int = 0) -> None:
        self._lengths = lengths
        self._prompt_tokens, self._new_tokens = sum(lengths.prompt_tokens), sum(lengths.expected_tokens)
        self._kept_tokens = kept_tokens
        self._finished_rows = self._finished_prompt = self._finished_new = self._finished_generated = 0

    def finish(self, row: int, generated_tokens: int | None) -> None:
        """A row has ended; None: it failed, which says nothing about the others."""
        prompt_tokens, new_tokens = self._lengths.prompt_tokens[row], self._lengths.expected_tokens[row]
        self._prompt_tokens -= prompt_tokens
        self._new_tokens -= new_tokens
        if generated_tokens is not None:
            self._finished_rows += 1
            self._finished_prompt += prompt_tokens
            self._finished_new += new_tokens
            self._finished_generated += generated_tokens

    def left(self, prompt_tokens: int, generated_tokens: int) -> Left:
        """What is left, when so many tokens have been computed by now; those of rows in flight are among them."""
        share = 1.0
        if self._finished_rows >= _ROWS_TO_LEARN and self._finished_new:
            share = self._finished_generated / self._finished_new
        ahead_prompt = max(0, prompt_tokens - self._finished_prompt)
        ahead_generated = max(0, generated_tokens + self._kept_tokens - self._finished_generated)
        return Left(
            prompt_tokens=max(0, self._prompt_tokens - ahead_prompt),
            generated_tokens=max(0.0, self._new_tokens * share - ahead_generated),
        )


def open_tokens(rows: Rows, journal: Journal, preparer: Preparer) -> int:
    """New tokens of a completion that names no limit: what those of the finished rows took on average.

    Args:
        rows: of the job.
        journal: what has been done.
        preparer: says which rows name no limit.

    Returns:
        int: `EXPECTED_NEW_TOKENS` where too few of them have finished.
    """
    finished = list(journal.generated())
    found = completions = tokens = 0
    for row, generated in finished[:: -(-len(finished) // _ROWS_TO_LOOK_AT) or 1]:
        request = rows[row]
        if preparer.is_open(request):
            found += 1
            completions += request.sampling.get("n", 1)
            tokens += generated
    return max(1, -(-tokens // completions)) if found >= _ROWS_TO_LEARN else EXPECTED_NEW_TOKENS
