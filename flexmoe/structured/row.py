"""What a row may be followed by: the state of its grammar after the tokens that it has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from flexmoe.errors import FlexMoEError
from flexmoe.structured.asked import StructuredOutputsParams
from flexmoe.structured.grammars import Grammars


class RowGrammar:
    """The grammar of one row. Its matcher is made when it is first needed, in whichever thread that is.

    Args:
        grammars: of the model.
        asked: what the row has to look like.
        ends: ids that end the row; they are permitted where its text is complete.
        generated: tokens that it resumes after.

    Attributes:
        mask: of the next token, a bit for each id of the tokenizer, the lowest first: uint8 ``[bytes]``; None before the first one.
        must_end: whether the library has found that only an end may follow, which it may do late.
        problem: why the grammar cannot be followed any further, as a sentence; None as long as it can.
    """

    __slots__ = ("_asked", "_before", "_ends", "_grammars", "_matcher", "mask", "must_end", "problem")

    def __init__(
        self, grammars: Grammars, asked: StructuredOutputsParams, ends: Collection[int], generated: Sequence[int]
    ) -> None:
        self._grammars, self._asked, self._ends = grammars, asked, frozenset(ends)
        self._before: Sequence[int] = generated
        self._matcher: Any = None
        self.mask: np.ndarray | None = None
        self.must_end = False
        self.problem: str | None = None

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer."""
        return self._grammars.vocab_size

    @property
    def matcher(self) -> Any:
        """The library's; None where there is a problem."""
        if self._matcher is None and self.problem is None:
            try:
                self._matcher = self._grammars.matcher(self._asked)
            except FlexMoEError as error:
                self.problem = str(error)
                return None
            before, self._before = self._before, ()
            self._consume([token for token in before if token not in self._ends])
        return None if self.problem else self._matcher

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing but an end may follow."""
        matcher = self.matcher
        return self.must_end or (matcher is not None and bool(matcher.is_stopped()) and not matcher.is_error())

    def append_token(self, token: int) -> None:
        """A token was chosen; one that ends the row is no part of its text."""
        if not self.must_end and token not in self._ends and self.matcher is not None:
            self._consume([token])

    def take(self, mask: np.ndarray) -> None:
        """Keep a mask that the library has made, with the ids that end the row in place of its own.

        Args:
            mask: uint8 ``[bytes]``; changed.
        """
        if self._matcher.is_error():
            self._fail()
            return
        end = self._grammars.end_id
        may_end = bool(mask[end >> 3] & 1 << (end & 7))
        _set(mask, end, False)
        if may_end:
            self.must_end = not mask.any()
            for token in self._ends or ({end} if self.must_end else ()):
                _set(mask, token, True)
        self.mask = mask

    def _consume(self, tokens: list[int]) -> None:
        if tokens and not self._matcher.consume_tokens(tokens):
            self._fail()

    def _fail(self) -> None:
        why = " ".join(self._matcher.get_error().split())
        self.problem, self.mask, self._matcher = f"the grammar cannot be followed any further: {why:.300}", None, None


def _set(mask: np.ndarray, token: int, permitted: bool) -> None:
    at, bit = token >> 3, np.uint8(1 << (token & 7))
    if at < len(mask):
        mask[at] = mask[at] | bit if permitted else mask[at] & ~bit
