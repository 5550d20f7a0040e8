"""How long a linear operation takes over so many tokens: a measured curve, and its convex pieces for a linear programme."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Annotated, Any

from policies.common.checks import check_number
from policies.common.errors import DataError, UsageError
from policies.common.fields import Json, Rule, check_fields
from policies.common.json_files import build, check_keys

#: Part of the best rate that is as good as it.
_NEARLY = 0.97
#: Bytes of the numbers that a model may compute with.
DTYPE_BYTES = (2, 4)


def _check_rising(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, (tuple, list)) or not values:
        raise UsageError(f"{name} is {values!r}; it must be a list of at least one number.")
    numbers = tuple(check_number(f"a number of {name}", value) for value in values)
    if numbers[0] < 1 or any(left >= right for left, right in pairwise(numbers)):
        raise UsageError(f"{name} is {list(numbers)}; its numbers must be at least 1, each larger than the one before.")
    return numbers


def _check_rows(name: str, rows: Any) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, (tuple, list)) or not all(isinstance(row, (tuple, list)) for row in rows):
        raise UsageError(f"{name} is {rows!r}; it must be a list of lists of numbers.")
    return tuple(tuple(check_number(f"a rate of {name}", value) for value in row) for row in rows)


Points = Annotated[
    tuple[float, ...],
    Rule(
        check=_check_rising,
        name="points",
        schema={"description": "Rising.", "type": "array", "minItems": 1, "items": {"type": "number", "minimum": 1}},
    ),
]
_RATES_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "number", "exclusiveMinimum": 0}}
Grid = Annotated[
    tuple[tuple[float, ...], ...],
    Rule(check=_check_rows, schema={"type": "array", "minItems": 1, "items": _RATES_SCHEMA}),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmRates:
    """Rates of one kind of linear operation, measured over tokens, for one or more sizes of the weight.

    Args:
        tokens: where it was measured; rising, at least 1.
        weight_elements: numbers in the weight that was measured; rising, at least 1.
        flops_per_s: ``[len(weight_elements)][len(tokens)]``, a multiply-add being two FLOPs; all above 0.

    Raises:
        UsageError: a list is empty, out of order or of the wrong length, or a value is out of range.
    """

    tokens: Points
    weight_elements: Points
    flops_per_s: Grid

    def __post_init__(self) -> None:
        check_fields(self)
        rows = self.flops_per_s
        if len(rows) != len(self.weight_elements) or any(len(row) != len(self.tokens) for row in rows):
            raise UsageError(
                f"flops_per_s has rows of {[len(row) for row in rows]} rates; it needs {len(self.weight_elements)} rows "
                f"(one per weight size) of {len(self.tokens)} (one per number of tokens)."
            )

    @classmethod
    def mean(cls, each: "Sequence[GemmRates]") -> "GemmRates":
        """The mean of rates that were measured at different times, of the sizes that all of them have."""
        first, sizes = each[0], min(len(rates.weight_elements) for rates in each)
        rows = zip(*(rates.flops_per_s[:sizes] for rates in each), strict=True)
        return cls(
            tokens=first.tokens,
            weight_elements=first.weight_elements[:sizes],
            flops_per_s=tuple(tuple(map(fmean, zip(*row, strict=True))) for row in rows),
        )

    def seconds(self, tokens: float, elements: float) -> float:
        """Time of `tokens` x `elements` multiply-adds; 0 without tokens.

        For one weight size, the time per weight element is piecewise linear in tokens between the measured points.
        Below the first it is that of the first, as the weights are read anyway; beyond the last it grows at the last
        point's rate. Between two weight sizes the whole time is linear in elements, which is exact where a call costs a
        constant and a rate; outside, the time per element of the nearest size holds.
        """
        if tokens <= 0:
            return 0.0
        sizes = self.weight_elements
        above = bisect_right(sizes, elements)
        if above == 0 or above == len(sizes):
            return elements * self._element_s(tokens, max(above - 1, 0))
        start, end = sizes[above - 1 : above + 1]
        start_s, end_s = start * self._element_s(tokens, above - 1), end * self._element_s(tokens, above)
        return start_s + (end_s - start_s) * (elements - start) / (end - start)

    def seconds_in_chunks(self, tokens: float, elements: float, chunk: int) -> float:
        """The same where no more than so many tokens are computed at once."""
        whole, rest = divmod(tokens, chunk)
        return (
            whole * self.seconds(chunk, elements) + self.seconds(rest, elements)
            if whole
            else self.seconds(rest, elements)
        )

    def fastest(self, elements: float, least: int) -> int:
        """Tokens that are best computed at once: the fewest measured ones, ``least`` or more, at nearly the best rate."""
        counts = [least, *(int(n) for n in self.tokens if n > least)]
        rates = {count: count / self.seconds(count, elements) for count in counts}
        return next(count for count in counts if rates[count] >= _NEARLY * max(rates.values()))

    def pieces(self, elements: float) -> tuple[tuple[float, float], ...]:
        """(slope in s per token, constant in s) of the straight pieces of the curve's lower convex envelope, slopes rising.

        Their maximum never exceeds `seconds` at any tokens > 0 (it is the largest convex function that does not), and
        equals it everywhere where the measured curve is convex. At 0 tokens it is the time of reading the weights,
        where `seconds` is 0.
        """
        points = [(count, self.seconds(count, elements)) for count in self.tokens]
        final_slope = points[-1][1] / points[-1][0]
        hull = [(0.0, points[0][1])]
        for point in points:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        # The curve continues at the last rate for ever, so no piece may be steeper than that.
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= final_slope:
            hull.pop()
        slopes = [_slope(start, end) for start, end in pairwise(hull)] + [final_slope]
        return tuple((slope, start[1] - slope * start[0]) for slope, start in zip(slopes, hull, strict=True))

    def _element_s(self, tokens: float, size: int) -> float:
        """Seconds per weight element of the measured weight size number `size`."""
        points, rates = self.tokens, self.flops_per_s[size]
        right = bisect_right(points, tokens)
        if right == 0:
            return 2 * points[0] / rates[0]
        left = right - 1
        if right == len(points):
            return 2 * tokens / rates[left]
        start_s, end_s = 2 * points[left] / rates[left], 2 * points[right] / rates[right]
        return start_s + (end_s - start_s) * (tokens - points[left]) / (points[right] - points[left])


def _check_rates(name: str, curves: Any, *, complete: bool) -> dict[int, GemmRates]:
    sizes = set(curves) if isinstance(curves, Mapping) else {None}
    known = sizes == set(DTYPE_BYTES) if complete else sizes <= set(DTYPE_BYTES)
    if not known or not all(isinstance(each, GemmRates) for each in curves.values()):
        which = "and of" if complete else "or"
        raise UsageError(f"{name} is {curves!r}; it needs rates for numbers of 2 {which} 4 bytes.")
    return dict(curves)


def _read_rates(where: str, values: Json, *, complete: bool) -> dict[int, GemmRates]:
    """The same from a JSON object, whose keys are texts."""
    known = [str(size) for size in DTYPE_BYTES]
    if not isinstance(values, dict):
        raise DataError(f"{where} must be a JSON object with the keys {', '.join(known)}.")
    check_keys(where, values, known, known if complete else [])
    return {int(size): build(GemmRates, f"{where} for {size} bytes", curve) for size, curve in values.items()}


def _rates_rule(name: str, description: str, *, complete: bool) -> Rule:
    keys = [str(size) for size in DTYPE_BYTES]
    schema = {
        "description": description,
        "type": "object",
        "required": keys if complete else [],
        "additionalProperties": False,
        "properties": dict.fromkeys(keys, {"$ref": "#/$defs/gemm_rates"}),
    }
    return Rule(
        check=partial(_check_rates, complete=complete),
        read=partial(_read_rates, complete=complete),
        schema=schema,
        name=name,
    )


#: Rates by the bytes of one number: of every size that a model may compute with, and of those that were measured.
AllRates = Annotated[Mapping[int, GemmRates], _rates_rule("curves", "By bytes of one number.", complete=True)]
SomeRates = Annotated[
    Mapping[int, GemmRates], _rates_rule("some_curves", "By bytes of one number, as far as measured.", complete=False)
]


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
