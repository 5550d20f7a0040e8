"""Rows in an order in which those that begin alike are near each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flexmoe.prefixes.finder import PrefixTree
from policies.admission.order import longest_first

#: Rows of a prefix stay together where it is this part of what they come to, and otherwise wait by their lengths alone.
_WORTH_GROUPING = 0.25


class PrefixOrder:
    """The order in which the rows of a job wait: in windows along the tree of their prefixes, those of each window that generate most
    first, but rows with a long prefix in common together.

    Args:
        tree: prefixes of prompts.
        nodes: of each row the longest prefix of its prompt; -1: none.
        length: of a row, the tokens that it is expected to generate, and those of its prompt.
    """

    def __init__(self, tree: PrefixTree, nodes: np.ndarray, length: Callable[[int], tuple[int, int]]) -> None:
        self._nodes, self._length = nodes, length
        self._parents, self._levels = tree.parents, _levels(tree)
        self._groups = None
        if len(tree):
            lengths = np.fromiter((sum(length(row)) for row in range(len(nodes))), np.float64, len(nodes))
            self._groups = _groups(tree, self._levels, nodes, lengths)

    def waiting(self, rows: Sequence[int], window: int) -> Iterator[int]:
        """These rows in the order in which they wait.

        Args:
            window: rows of which those that generate most wait first.
        """
        if self._groups is None:
            return longest_first(rows, self._length, window)
        groups, nodes = self._groups, self._nodes
        near = self._near(np.asarray(rows, dtype=np.int64))

        def group(row: int) -> int:
            return int(groups[nodes[row]]) if nodes[row] >= 0 else -1

        return longest_first(near.tolist(), self._length, window, group)

    def _near(self, rows: np.ndarray) -> np.ndarray:
        """Rows of a prefix one after another, prefixes in the order of their first rows."""
        places, nodes, levels = np.arange(len(rows)), self._nodes[rows], self._levels
        first = np.full(len(self._parents), len(rows), dtype=np.int64)
        np.minimum.at(first, nodes[nodes >= 0], places[nodes >= 0])
        for level in range(int(levels.max()), 1, -1):
            own = np.flatnonzero(levels == level)
            np.minimum.at(first, self._parents[own], first[own])
        keys = [places]
        for level in range(int(levels.max()), 0, -1):
            there = (nodes >= 0) & (levels[nodes] == level)
            keys.append(np.where(there, first[nodes], places))
            nodes = np.where(there, self._parents[nodes], nodes)
        near: np.ndarray = rows[np.lexsort(keys)]
        return near


def _levels(tree: PrefixTree) -> np.ndarray:
    """Of each prefix, how many there are up to it."""
    levels, above = np.zeros(len(tree), dtype=np.int64), np.arange(len(tree))
    while (there := above >= 0).any():
        levels += there
        above = np.where(there, tree.parents[above], above)
    return levels


def _groups(tree: PrefixTree, levels: np.ndarray, nodes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of each prefix, the longest one that it begins with, or itself, whose rows are worth keeping together; -1: none."""
    rows = np.bincount(nodes[nodes >= 0], minlength=len(tree)).astype(np.float64)
    sums = np.bincount(nodes[nodes >= 0], weights=lengths[nodes >= 0], minlength=len(tree))
    for level in range(int(levels.max()), 1, -1):
        own = np.flatnonzero(levels == level)
        np.add.at(rows, tree.parents[own], rows[own])
        np.add.at(sums, tree.parents[own], sums[own])
    groups = np.full(len(tree), -1, dtype=np.int64)
    for level in range(1, int(levels.max()) + 1):
        own = np.flatnonzero(levels == level)
        above = np.where(tree.parents[own] >= 0, groups[tree.parents[own]], -1)
        more = tree.tokens[own] - np.where(above >= 0, tree.tokens[above], 0)
        groups[own] = np.where(more * rows[own] >= _WORTH_GROUPING * sums[own], own, above)
    return groups
