"""Which cases of a matrix are quick: few that have every value, and the pairs of values that matter; the others are slow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest


def drawn(cases: Sequence[tuple], pairs: Iterable[tuple[int, int]] = (), axes: Any = tuple) -> list:
    """The cases as parameters of a test, of which most have the mark `slow`.

    Those that are quick have among them every value that the cases have at every place, and for the ``pairs`` of places every
    pair of values there. They are found greedily: next is the case that has most of what is still wanted, the first of equals.

    Args:
        cases: values of the test's parameters.
        pairs: places of which the pairs count.
        axes: gives the values of a case that count, in their places; its own by default.
    """
    places = [tuple(axes(case)) for case in cases]
    pairs = frozenset(pairs)
    wanted = [
        {(at, str(value)) for at, value in enumerate(values)}
        | {
            (one, str(values[one]), other, str(values[other]))
            for one, other in combinations(range(len(values)), 2)
            if (one, other) in pairs
        }
        for values in places
    ]
    quick, left = set(), set().union(*wanted)
    while left:
        best = max(range(len(cases)), key=lambda at: (len(wanted[at] & left), -at))
        quick.add(best)
        left -= wanted[best]
    return [pytest.param(*case, marks=() if at in quick else pytest.mark.slow) for at, case in enumerate(cases)]
