"""Compiles what rows ask for against a model's vocabulary, by llguidance, and says what cannot be compiled.

The library knows which keywords of JSON Schema it does not implement, and refuses a schema with one. Where it would accept a
text that is not valid all the same, the schema is refused here (`_unsound`).

No torch is imported: the preflight's processes check schemas, too.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from flexmoe.errors import FlexMoEError, UsageError
from flexmoe.structured.asked import StructuredOutputsParams
from policies.common.errors import EXIT_USAGE

#: Between two tokens of JSON. A model that may write any amount of whitespace may write nothing else until its last token.
WHITESPACE = r"( |\n {0,32})?"
#: Every character is written in one way, so that no name of a property can be written in a second one.
_ESCAPES = 'nrbtf\\"'
_UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")
#: Grammars that are kept compiled. One takes from some hundred kB to several MB, with what its rows have seen of it.
_KEPT = 64
MISSING = "structured output needs the package llguidance, not installed here; run pip install 'flexmoe[structured]'"


class GrammarError(FlexMoEError):
    """What is asked for cannot be compiled; the sentence is the library's."""

    exit_code = EXIT_USAGE


def llguidance() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise UsageError(MISSING) from None


def grammar_text(asked: StructuredOutputsParams) -> str:
    """What is asked for in the library's own notation.

    Raises:
        UsageError: the library is not installed.
        GrammarError: it is known to be beyond the library.
    """
    library = llguidance()
    if asked.kind in ("json", "json_object"):
        schema = json.loads(asked.schema)
        problem = "nothing is valid against the schema false" if schema is False else _unsound(schema)
        if problem is not None:
            raise GrammarError(problem)
        options: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": _ESCAPES}
        options["whitespace_flexible"] = not asked.disable_any_whitespace
        if not asked.disable_any_whitespace:
            options["whitespace_pattern"] = asked.whitespace_pattern or WHITESPACE
        schema = "{}" if schema is True else asked.schema
        text: str = library.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        return text
    given = json.dumps(asked.choice) if asked.kind == "choice" else getattr(asked, asked.kind)
    try:
        return str(library.grammar_from(asked.kind, given))
    except ValueError as error:
        raise GrammarError(_sentence(str(error))) from None


class Grammars:
    """The grammars of one model, each compiled once; may be used by several threads.

    Args:
        backend: the transformers tokenizer.

    Attributes:
        end_id: the id by whose being permitted the library says that a text may end. What ends a row is the row's matter.
        vocab_size: ids of the tokenizer.

    Raises:
        UsageError: the library is not installed, or cannot read the tokenizer.
    """

    def __init__(self, backend: Any) -> None:
        self._library = llguidance()
        self._limits = self._library.LLParserLimits(verbose_errors=False)
        self.end_id = _end_id(backend)
        self._vocabulary = _vocabulary(self._library, backend, self.end_id)
        self.vocab_size: int = self._vocabulary.vocab_size
        self._lock = threading.Lock()
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()

    def problem(self, asked: StructuredOutputsParams) -> str | None:
        """Why nothing can be completed so, as a sentence; None where it can."""
        try:
            self.matcher(asked)
        except FlexMoEError as error:
            return f"structured output cannot be made so: {error}"
        return None

    def matcher(self, asked: StructuredOutputsParams) -> Any:
        """A matcher of the library's at its beginning, for one row.

        Raises:
            GrammarError: it cannot be compiled, or no text matches.
        """
        with self._lock:
            found = self._compiled.get(asked)
            if found is not None:
                self._compiled.move_to_end(asked)
                return found.deep_copy()
        made = self._compile(asked)
        with self._lock:
            self._compiled[asked] = made
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return made.deep_copy()

    def _compile(self, asked: StructuredOutputsParams) -> Any:
        matcher = self._library.LLMatcher(self._vocabulary, grammar_text(asked), log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(_sentence(matcher.get_error()))
        first = matcher.deep_copy()  # what a mask finds out would stay with the matcher
        if not any(first.compute_bitmask()) or first.is_error():
            raise GrammarError("there is no text in the model's vocabulary that begins so")
        return matcher


def _end_id(backend: Any) -> int:
    """A special token, which no text has."""
    special: list[int] = backend.all_special_ids
    if not special:
        raise UsageError("structured output needs a tokenizer with a token that ends texts, and the model's has none")
    return int(special[0] if backend.eos_token_id is None else backend.eos_token_id)


def _vocabulary(library: Any, backend: Any, end_id: int) -> Any:
    """The library's view of a tokenizer."""
    fast = getattr(backend, "backend_tokenizer", None)
    if fast is None:
        raise UsageError("structured output needs a tokenizer.json, and the model's tokenizer has none; convert it")
    description = json.loads(fast.to_str()) | {"padding": None, "truncation": None}
    try:
        return library.LLTokenizer(json.dumps(description), eos_token=end_id)
    except Exception as error:  # the library raises whatever is behind it
        raise UsageError(f"structured output cannot use the model's tokenizer: {_sentence(str(error))}") from None


def _unsound(schema: Any) -> str | None:
    """Why a schema would be followed wrongly, or None.

    A name that the schema does not list may be written twice, and counts twice for the library: readers of JSON count it once. And
    of a constant it leaves out characters for which there is no escape (`_ESCAPES`).
    """
    if any(_UNWRITABLE.search(text) for text in _strings(schema)):
        return "it holds a control character that is not written, U+0000 to U+001F without \\b, \\f, \\n, \\r and \\t, or U+007F"
    for each in _objects(schema):
        least, required = each.get("minProperties"), each.get("required")
        known = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, (int, float)) and least > known + 1:
            return f"minProperties = {least} counts a name that is written twice; require the names, or all but one"
    return None


def _strings(value: Any) -> Iterator[str]:
    """All texts of a JSON value, names among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects of a JSON value; examples among them are no schemas, and are no loss."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _objects(each)


def _sentence(text: str) -> str:
    """What the library says, in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}…"
