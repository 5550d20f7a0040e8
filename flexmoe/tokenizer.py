"""Text to token ids and back, by the checkpoint's own tokenizer; and which ids end a sequence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmoe.errors import DataError

# One of these holds the vocabulary; tokenizer_config.json alone does not make a tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class Tokenizer:
    """The tokenizer of a checkpoint directory; one without tokenizer files serves requests in token ids only.

    Use `Tokenizer.load`.

    Args:
        backend: a transformers tokenizer, or None when there is none.
        source: where it came from, for messages.
    """

    def __init__(self, backend: Any | None, source: str) -> None:
        self._backend = backend
        self._source = source

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Loads the tokenizer of `directory`, from local files and without running code from them.

        Raises:
            DataError: tokenizer files are there and cannot be used.
        """
        if not any((Path(directory) / name).is_file() for name in VOCABULARY_FILES):
            return cls(None, str(directory))
        from transformers import AutoTokenizer  # imported here because it takes seconds

        try:
            backend = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False, clean_up_tokenization_spaces=False
            )
        # A damaged file surfaces as whatever the parser behind it raises, bare Exception included.
        except Exception as error:
            raise DataError(
                f"the tokenizer files in {directory} cannot be used ({_first_line(error)}); download them again"
            ) from error
        return cls(backend, str(directory))

    @property
    def is_available(self) -> bool:
        return self._backend is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with the special tokens (such as BOS) that the tokenizer itself adds.

        Raises:
            DataError: the checkpoint has no tokenizer files.
        """
        return self._ids(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a chat under the checkpoint's template, up to where the assistant's answer begins.

        The template writes the special tokens itself, so that none is added to what it wrote.

        Raises:
            DataError: there are no tokenizer files or no chat template, or the template refuses the messages.
        """
        backend = self._require()
        if not getattr(backend, "chat_template", None):
            raise DataError(
                f"{self._source} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); add one, or give a prompt instead of messages"
            )
        try:
            text = backend.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        # Templates are programs of the checkpoint: they fail with jinja2's errors or with any of Python's.
        except Exception as error:
            raise DataError(f"the chat template does not accept these messages: {_first_line(error)}") from error
        return self._ids(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str | None:
        """Text of token ids without special tokens, or None when there is no tokenizer."""
        if self._backend is None:
            return None
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        return None if self._backend is None else self._backend.eos_token_id

    def _ids(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # verbose=False: what is too long is the engine's to judge, not tokenizer_config.json's.
        encoded = self._require()(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
        return tuple(encoded["input_ids"])

    def _require(self) -> Any:
        if self._backend is None:
            raise DataError(
                f"{self._source} has no tokenizer files (none of {', '.join(VOCABULARY_FILES)}); add them, or give "
                "prompts as token ids"
            )
        return self._backend


def eos_ids(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Ids that end a sequence: all of generation_config.json, else of config.json, else the tokenizer's one.

    Args:
        generation_config: contents of generation_config.json; empty when there is none.
        config: contents of config.json.
        tokenizer: asked last; may be None.

    Returns:
        The ids in file order, each once; empty when nobody names one.

    Raises:
        DataError: `eos_token_id` is neither a token id nor a list of them.
    """
    for name, source in (("generation_config.json", generation_config), ("config.json", config)):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise DataError(f"eos_token_id in {name} is {value!r}; it must be a token id or a list of token ids")
        if ids:
            return tuple(dict.fromkeys(ids))
    last = None if tokenizer is None else tokenizer.eos_token_id
    return () if last is None else (last,)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
