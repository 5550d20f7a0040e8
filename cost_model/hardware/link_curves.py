"""The rate of a link by the size of what is moved at once: pairs of (bytes, bytes per second), bytes rising."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from math import exp, log
from typing import Annotated, Any

from policies.common.checks import check_count, check_number
from policies.common.errors import UsageError
from policies.common.fields import Rule

#: Pairs of bytes and bytes/s; empty where nothing was measured.
Pairs = tuple[tuple[int, float], ...]
#: Of a link's best rate, what a transfer may fall short of it and still be called efficient.
_SHORT = 0.05


def _check_curve(name: str, value: Any) -> Pairs:
    """A curve as tuples.

    Raises:
        UsageError: it is none; the sentence has the name.
    """
    if not isinstance(value, (tuple, list)) or not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in value):
        raise UsageError(f"{name} is {value!r}; it must be a list of pairs of bytes and bytes per second.")
    curve = tuple(
        (check_count(f"bytes in {name}", size, minimum=1), check_number(f"a rate in {name}", rate, zero=False))
        for size, rate in value
    )
    if any(one[0] >= other[0] for one, other in pairwise(curve)):
        raise UsageError(f"{name} has the sizes {', '.join(str(size) for size, _ in curve)}; they must rise.")
    return curve


LinkCurve = Annotated[
    Pairs,
    Rule(
        check=_check_curve,
        name="link_curve",
        schema={
            "description": "Pairs of bytes, rising, and bytes per second.",
            "type": "array",
            "items": {
                "type": "array",
                "prefixItems": [{"type": "integer", "minimum": 1}, {"type": "number", "exclusiveMinimum": 0}],
                "minItems": 2,
                "maxItems": 2,
            },
        },
    ),
]


def transfer_s(curve: Pairs, bytes_per_s: float, nbytes: float, transfers: float = 1.0) -> float:
    """Seconds of so many equal transfers one after the other, in which ``nbytes`` are moved in all; 0 without bytes.

    Args:
        curve: of the link; between two sizes the rate is linear in the logarithm of the size, outside it is that of the nearest.
        bytes_per_s: the link's rate where none was measured by size.
    """
    if nbytes <= 0:
        return 0.0
    return nbytes / (_rate(curve, nbytes / transfers) if curve else bytes_per_s)


def scaled(curve: Pairs, factor: float) -> Pairs:
    """The curve of a link that is so many times as fast at every size."""
    return tuple((size, factor * rate) for size, rate in curve)


def _rate(curve: Pairs, size: float) -> float:
    above = bisect_right(curve, size, key=lambda point: point[0])
    if above == 0 or above == len(curve):
        return curve[max(above - 1, 0)][1]
    (small, slow), (large, fast) = curve[above - 1 : above + 1]
    return slow + (fast - slow) * log(size / small) / log(large / small)


def efficient_bytes(curve: Pairs) -> float:
    """The smallest transfer that reaches the best rate of a curve within 5 %; between two sizes the rate is linear in the
    logarithm of the size.

    Args:
        curve: with at least one pair.
    """
    enough = (1 - _SHORT) * max(rate for _, rate in curve)
    before = curve[0]
    for size, rate in curve:
        if rate >= enough:
            break
        before = size, rate
    if before[0] >= size:
        return float(size)
    part = (enough - before[1]) / (rate - before[1])
    return exp((1 - part) * log(before[0]) + part * log(size))
