"""The job as the planner sees it: how many rows, and how long they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from policies.errors import UsageError
from policies.placement import check_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The job in a few numbers.

    Args:
        prompt_len: mean tokens of a prompt, at least 1.
        gen_len: mean tokens generated for it, at least 1.
        num_requests: rows of the job; None is an endless one, of which only the steady state counts.
        lengths: (prompt tokens, generated tokens, rows) of the rows' length histogram; empty: all rows have the means.

    Raises:
        UsageError: a value is not a whole number of at least 1, or the histogram is no list of such triples.
    """

    prompt_len: int
    gen_len: int
    num_requests: int | None = None
    lengths: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self):
        for name in ("prompt_len", "gen_len"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        if self.num_requests is not None:
            check_count("num_requests", self.num_requests)
        if not isinstance(self.lengths, (tuple, list)) or not all(
            isinstance(entry, (tuple, list)) and len(entry) == 3 for entry in self.lengths
        ):
            raise UsageError(f"lengths is {self.lengths!r}; it must list [prompt tokens, generated tokens, rows].")
        checked = tuple(tuple(check_count("an entry of lengths", v) for v in entry) for entry in self.lengths)
        object.__setattr__(self, "lengths", checked)

    @classmethod
    def of_lengths(cls, rows: Iterable[tuple[int, int]], num_requests: int | None = None) -> Workload:
        """A workload with the histogram of these (prompt tokens, generated tokens).

        Args:
            num_requests: rows of the job, when the given rows are only a sample of it; default: as many as given.

        Raises:
            UsageError: there are no rows.
        """
        counts: dict[tuple[int, int], int] = {}
        for row in rows:
            counts[row] = counts.get(row, 0) + 1
        if not counts:
            raise UsageError("there are no rows to plan for; give at least one.")
        total = sum(counts.values())
        return cls(
            prompt_len=max(1, -(-sum(s * c for (s, _), c in counts.items()) // total)),
            gen_len=max(1, -(-sum(n * c for (_, n), c in counts.items()) // total)),
            num_requests=num_requests or total,
            lengths=tuple((s, n, c) for (s, n), c in sorted(counts.items())),
        )

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, prompt and completion."""
        return max((s + n for s, n, _ in self.lengths), default=self.prompt_len + self.gen_len)

    def to_json(self) -> dict:
        """The workload as JSON values, what is not set left out; `Workload(**values)` reads it back."""
        values: Mapping[str, object] = {
            "prompt_len": self.prompt_len,
            "gen_len": self.gen_len,
            "num_requests": self.num_requests,
            "lengths": [list(entry) for entry in self.lengths],
        }
        return {name: value for name, value in values.items() if value}
