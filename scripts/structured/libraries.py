"""The two libraries that follow grammars, behind one interface: llguidance as this project uses it, and xgrammar."""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np

from flexmoe.errors import FlexMoEError
from flexmoe.structured.asked import StructuredOutputsParams
from flexmoe.structured.grammars import Grammars


class RefusedError(Exception):
    """A library does not compile a schema."""


class Matcher(Protocol):
    """The state of one text."""

    def take(self, token: int) -> bool:
        """Whether the text may go on so."""

    def may_end(self) -> bool:
        """Whether the text is complete."""

    def mask(self) -> np.ndarray:
        """Ids that may follow, the end's among them: int32 ``[vocab / 32]``."""


class Library(Protocol):
    """One library over one vocabulary."""

    name: str

    def matcher(self, schema: Any) -> Matcher:
        """A matcher of a JSON Schema at its beginning.

        Raises:
            RefusedError: it cannot be compiled.
        """


class _Llguidance:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def take(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1

    def may_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    def mask(self) -> np.ndarray:
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)


class Llguidance:
    """llguidance, with the options and refusals of `flexmoe.structured`."""

    name = "llguidance"

    def __init__(self, tokenizer: Any) -> None:
        self._grammars = Grammars(tokenizer)

    def matcher(self, schema: Any) -> Matcher:
        try:
            return _Llguidance(self._grammars.matcher(StructuredOutputsParams(json=schema)))
        except FlexMoEError as error:
            raise RefusedError(str(error)) from None


class _Xgrammar:
    def __init__(self, library: Any, compiled: Any, end: int, vocab_size: int) -> None:
        self._library, self._end = library, end
        self._matcher = library.GrammarMatcher(compiled)
        self._bits = library.allocate_token_bitmask(1, vocab_size)

    def take(self, token: int) -> bool:
        return not self._matcher.is_terminated() and bool(self._matcher.accept_token(token))

    def may_end(self) -> bool:
        return bool(self.mask()[self._end // 32] >> (self._end % 32) & 1)

    def mask(self) -> np.ndarray:
        self._bits.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._bits, 0)
        return self._bits.numpy()[0]


class Xgrammar:
    """xgrammar, told not to forbid properties that a schema leaves open."""

    name = "xgrammar"

    def __init__(self, tokenizer: Any) -> None:
        import xgrammar

        self._library, self._end, self._vocab_size = xgrammar, tokenizer.eos_token_id, len(tokenizer)
        self._compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer), max_threads=1)

    def matcher(self, schema: Any) -> Matcher:
        try:
            compiled = self._compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        except Exception as error:
            raise RefusedError(str(error)) from None
        return _Xgrammar(self._library, compiled, self._end, self._vocab_size)


LIBRARIES = (Llguidance, Xgrammar)
