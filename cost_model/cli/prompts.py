"""The length histogram of a file of prompts: exact for token ids, counted or estimated for text.

The file is what `python -m flexmoe.run -i` reads (a JSON object per line), or plain text, a prompt per line. Only what
decides lengths is looked at: the runtime checks the rest before it starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.common import json_files
from policies.common.errors import DataError, InputMissingError
from policies.common.reading import whole, without_bom, without_nulls
from policies.workload import Workload

#: Text of which no tokenizer is known: about four bytes make a token of English in vocabularies of 32 K and more.
BYTES_PER_TOKEN = 4
#: What a chat template writes around a message, about.
CHAT_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """``workload`` of a file, and ``notes``: sentences on how its lengths were found."""

    workload: Workload
    notes: tuple[str, ...]


def read_prompts(
    path: Path, *, gen_len: int, context: int, tokenizer_dir: Path | None = None, num_requests: int | None = None
) -> Prompts:
    """Lengths of the rows of a file.

    Args:
        gen_len: completion length of rows without ``max_tokens``.
        context: tokens that the model admits; completions are cut there, and longer prompts are left out, as the
            runtime does.
        tokenizer_dir: directory that may hold a ``tokenizer.json`` to count text with.
        num_requests: rows of the job, of which the file is a sample; default: those of the file.

    Raises:
        InputMissingError: the file is missing or cannot be read.
        DataError: a line is no request, or no row is left; the sentence names the line.
    """
    reader = _Reader(_text_counter(tokenizer_dir), gen_len)
    found: Counter[tuple[int, int]] = Counter()
    too_long = 0
    for prompt, completion in reader.rows(path):
        if prompt >= context:
            too_long += 1
        else:
            found[max(prompt, 1), min(completion, context - max(prompt, 1))] += 1
    if not found:
        raise DataError(f"{path} holds no row that the model could run; write one request per line.")
    workload, total = Workload.of_lengths(found.elements(), num_requests), found.total()
    notes = [f"lengths of {total} rows of {path.name}{reader.how()}"]
    if too_long:
        notes.append(f"{too_long} rows do not fit the context of {context} tokens and are left out")
    return Prompts(workload=workload, notes=tuple(notes))


class _Reader:
    """The (prompt, completion) tokens of a file's rows, and how text was counted."""

    def __init__(self, count_text: Callable[[str], int] | None, gen_len: int):
        self._count_text, self._gen_len = count_text, gen_len
        self._texts = self._chats = 0

    def how(self) -> str:
        """What to say of the lengths."""
        if not self._texts:
            return ""
        how = "counted by the model's tokenizer" if self._count_text else f"estimated: {BYTES_PER_TOKEN} bytes a token"
        return f", text {how}" + (f", {CHAT_TOKENS} tokens more per chat message" if self._chats else "")

    def rows(self, path: Path) -> Iterator[tuple[int, int]]:
        """One pair per prompt."""
        as_json = None
        for number, line in _lines(path):
            if as_json is None:
                as_json = line.lstrip().startswith("{")
            if not as_json:
                yield self._tokens(line), self._gen_len
                continue
            try:
                yield from self._row(without_nulls(json_files.parse(line)))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number}: {error}.") from error

    def _row(self, row: Any) -> Iterator[tuple[int, int]]:
        if not isinstance(row, dict):
            raise ValueError("it must be a JSON object")  # noqa: TRY004 - a fault of the file
        body = row.get("body", row)
        if not isinstance(body, dict):
            raise ValueError("body must be a JSON object")  # noqa: TRY004 - a fault of the file
        completion = self._gen_len
        for name in ("max_tokens", "max_completion_tokens"):
            if name in body:
                completion = _count(name, body[name])
        return ((self._prompt(prompt), completion) for prompt in _prompts_of(body))

    def _prompt(self, prompt: Any) -> int:
        if isinstance(prompt, int):
            return prompt
        if isinstance(prompt, str):
            return self._tokens(prompt)
        if isinstance(prompt, dict):
            self._chats += 1
            return CHAT_TOKENS + self._tokens(_content(prompt))
        if prompt and all(isinstance(part, dict) for part in prompt):
            return sum(map(self._prompt, prompt))
        return len(prompt)

    def _tokens(self, text: str) -> int:
        self._texts += 1
        if self._count_text:
            return self._count_text(text)
        return -(-len(text.encode("utf-8")) // BYTES_PER_TOKEN)


def _prompts_of(body: dict[str, Any]) -> Iterable[Any]:
    """Its prompts: each a number of tokens, a text, a list of token ids, or a list of messages."""
    if "prompt_tokens" in body:
        return (_count("prompt_tokens", body["prompt_tokens"]),)
    prompt = body.get("messages", body.get("prompt"))
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("it needs a prompt (text or token ids), messages, or prompt_tokens")
    if all(isinstance(item, dict) for item in prompt) or all(whole(item) is not None for item in prompt):
        return (prompt,)
    if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) and item for item in prompt):
        return prompt
    raise ValueError("its prompt is neither text nor token ids, nor a list of such")


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _count(name: str, value: Any) -> int:
    number = whole(value)
    if number is None or number < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return number


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(map(without_bom, file), start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except OSError as error:
        raise InputMissingError(f"the prompts file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the prompts file {path} is not UTF-8 text.") from error


def _text_counter(directory: Path | None) -> Callable[[str], int] | None:
    """Counts tokens with a directory's tokenizer; None without one, or without the library that reads it."""
    path = directory / "tokenizer.json" if directory else None
    if path is None or not path.is_file():
        return None
    try:
        import tokenizers  # optional: transformers brings it
    except ImportError:
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise DataError(f"the tokenizer {path} cannot be used: {error}.") from error
    return lambda text: len(tokenizer.encode(text).ids)
