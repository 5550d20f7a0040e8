"""Finds stop strings in the text of a growing completion.

What counts is the text of all ids at once: a completion ends with the first token after which that text holds a stop
string. Decoding all of it for every token would cost the square of its length, so only the last ids are decoded while they
give the same end of the text as all of them; that is looked up again whenever the window moves, because how an id reads
may depend on those before it (bytes of one character, the space before the first word).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Detokenize = Callable[[Sequence[int]], str]

#: Ids in the window before it moves, and characters beyond the longest stop string that it keeps.
_WINDOW_TOKENS = 96
_SLACK_CHARACTERS = 16


class StopStrings:
    """Watches one completion.

    Args:
        stops: the strings, none of them empty.
        detokenize: text of token ids.
        after: a stop string that ends in the text of so many first ids does not count.
        included: it is part of the text.
    """

    def __init__(self, stops: tuple[str, ...], detokenize: Detokenize, *, after: int = 0, included: bool = False):
        self._stops, self._detokenize = stops, detokenize
        self._after, self._included = after, included
        self._tail = max(map(len, stops)) + _SLACK_CHARACTERS
        self._start, self._most = 0, _WINDOW_TOKENS

    def find(self, ids: Sequence[int]) -> tuple[str, str] | None:
        """Called once for each new id, with all ids so far.

        Returns:
            tuple[str, str] | None: the text before the first stop string (or up to its end, where it is included) and
            that string; the one given first where several begin at the same place.
        """
        if len(ids) <= self._after:
            return None
        window = self._detokenize(ids[self._start :])
        if any(stop in window for stop in self._stops):
            found = self._first(ids, self._detokenize(ids) if self._start else window)
            if found is not None:
                return found
        if len(ids) - self._start >= self._most:
            self._move(ids)
        return None

    def _first(self, ids: Sequence[int], text: str) -> tuple[str, str] | None:
        # Half a character at the end of the first ids is no text yet.
        passed = len(self._detokenize(ids[: self._after]).rstrip("\ufffd")) if self._after else 0
        places = []
        for number, stop in enumerate(self._stops):
            at = text.find(stop, max(0, passed - len(stop) + 1))
            if at >= 0:
                places.append((at, number))
        if not places:
            return None
        at, number = min(places)
        stop = self._stops[number]
        return text[: at + len(stop) * self._included], stop

    def _move(self, ids: Sequence[int]) -> None:
        """Let the window begin later, if the text's end still reads the same from there; else try much later."""
        start = len(ids) - _WINDOW_TOKENS // 2
        shorter = self._detokenize(ids[start:])
        if len(shorter) > self._tail and self._detokenize(ids)[-self._tail :] == shorter[-self._tail :]:
            self._start, self._most = start, _WINDOW_TOKENS
        else:
            self._most *= 2
