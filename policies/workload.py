"""The job as the planner sees it: how many rows, and how long they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from policies.common.checks import check_count, check_number
from policies.common.errors import UsageError
from policies.common.fields import Count, Rule, Size, check_fields, optional, whole

#: (prompt tokens, generated tokens, rows) of each kind of row.
Histogram = tuple[tuple[int, int, int], ...]


def _checked_lengths(name: str, value: Any) -> Histogram:
    entries = value if isinstance(value, (tuple, list)) else (None,)
    if not all(isinstance(entry, (tuple, list)) and len(entry) == 3 for entry in entries):
        raise UsageError(f"{name} is {value!r}; it must list [prompt tokens, generated tokens, rows].")
    counts = (tuple(check_count(f"an entry of {name}", each) for each in entry) for entry in entries)
    return tuple((s, n, rows) for s, n, rows in counts)


def _checked_mean(name: str, value: Any) -> float:
    checked = check_number(name, value)
    if checked < 1:
        raise UsageError(f"{name} is {value!r}; it must be at least 1.")
    return checked


_MEAN = Rule(check=_checked_mean, schema={"type": "number", "minimum": 1})
_TRIPLE_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 3, "maxItems": 3}
_LENGTHS = Rule(check=_checked_lengths, schema={"type": "array", "items": _TRIPLE_SCHEMA})


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The job in a few numbers.

    Args:
        prompt_len: mean tokens of a prompt, at least 1.
        gen_len: mean tokens generated for it, at least 1.
        num_requests: rows of the job; None is an endless one, of which only the steady state counts.
        lengths: (prompt tokens, generated tokens, rows) of the rows' length histogram; empty: all rows have the means.
        longest_row: tokens of the longest row, prompt and completion; 0 stands for the longest of the histogram.
        scored_tokens: mean tokens of a prompt whose log-probabilities are asked.
        rows_per_prompt: rows that are samples of one prompt, on average; whole KV pages of it are computed once for them.
        prefix_len: tokens that a prompt has in common with others at its beginning, on average, in whole KV pages.
        rows_per_prefix: prompts that such a beginning is computed once for, on average.

    Raises:
        UsageError: a length is not a whole number of at least 1, or the histogram is no list of such triples.
    """

    prompt_len: Count
    gen_len: Count
    num_requests: Annotated[int | None, optional(whole(1))] = None
    lengths: Annotated[Histogram, _LENGTHS] = ()
    longest_row: Size = 0
    scored_tokens: Size = 0
    rows_per_prompt: Annotated[float, _MEAN] = 1.0
    prefix_len: Size = 0
    rows_per_prefix: Annotated[float, _MEAN] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        longest = max((s + n for s, n, _ in self.lengths), default=self.prompt_len + self.gen_len)
        object.__setattr__(self, "longest_row", max(longest, self.longest_row))
        if self.has_common and not self.lengths:  # followed as rows that differ are
            object.__setattr__(self, "lengths", ((self.prompt_len, self.gen_len, self.num_requests or 1),))

    @property
    def has_common(self) -> bool:
        """Whether rows begin alike, so that one of them computes what others find."""
        return self.rows_per_prompt > 1 or (self.prefix_len > 0 and self.rows_per_prefix > 1)

    @property
    def scored_share(self) -> float:
        """Part of the prompt tokens whose log-probabilities are asked."""
        return min(1.0, self.scored_tokens / self.prompt_len)

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
        return cls.of_counts(counts, num_requests)

    @classmethod
    def of_counts(cls, counts: Mapping[tuple[int, int], int], num_requests: int | None = None) -> Workload:
        """As `of_lengths`, from how many rows there are of each (prompt tokens, generated tokens)."""
        if not counts:
            raise UsageError("there are no rows to plan for; give at least one.")
        total = sum(counts.values())
        longest = max(s + n for s, n in counts)
        counts = _coarsened(counts)
        return cls(
            prompt_len=max(1, -(-sum(s * c for (s, _), c in counts.items()) // total)),
            gen_len=max(1, -(-sum(n * c for (_, n), c in counts.items()) // total)),
            num_requests=num_requests or total,
            lengths=tuple((s, n, c) for (s, n), c in sorted(counts.items())),
            longest_row=longest,
        )

    def to_json(self) -> dict[str, Any]:
        """The workload as JSON values, what is not set left out; `Workload(**values)` reads it back."""
        values: Mapping[str, object] = {
            "prompt_len": self.prompt_len,
            "gen_len": self.gen_len,
            "num_requests": self.num_requests,
            "lengths": [list(entry) for entry in self.lengths],
            "longest_row": self.longest_row,
            "scored_tokens": self.scored_tokens,
            "rows_per_prompt": self.rows_per_prompt if self.rows_per_prompt > 1 else None,
            "prefix_len": self.prefix_len,
            "rows_per_prefix": self.rows_per_prefix if self.rows_per_prefix > 1 else None,
        }
        return {name: value for name, value in values.items() if value}


#: Entries of a histogram along each of its two axes; finer ones make planning slower and no better.
_FINEST = 24


def _coarsened(counts: Mapping[tuple[int, int], int]) -> Mapping[tuple[int, int], int]:
    """The same rows in at most `_FINEST` squared entries: of like prompts, then of like completions, each by its mean."""
    if len(counts) <= _FINEST * _FINEST:
        return counts
    coarse: dict[tuple[int, int], int] = {}
    for prompts in _slices(sorted(counts.items()), _FINEST):
        for entries in _slices(sorted(prompts, key=lambda entry: entry[0][1]), _FINEST):
            rows = sum(count for _, count in entries)
            s, n = (max(1, round(sum(key[axis] * count for key, count in entries) / rows)) for axis in (0, 1))
            coarse[s, n] = coarse.get((s, n), 0) + rows
    return coarse


def _slices(entries: list[tuple[tuple[int, int], int]], most: int) -> list[list[tuple[tuple[int, int], int]]]:
    """Neighbouring entries together, in up to ``most`` slices of about as many rows."""
    share, held = sum(count for _, count in entries) / most, 0
    slices: list[list[tuple[tuple[int, int], int]]] = [[]]
    for entry in entries:
        if held >= share * len(slices) and slices[-1]:
            slices.append([])
        slices[-1].append(entry)
        held += entry[1]
    return slices
