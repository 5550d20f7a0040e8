"""Text to token ids and back, by the checkpoint's own tokenizer; and which ids end a sequence.

Special tokens follow the tokenizer's rules, as in transformers and vLLM: text that spells one (such as `</s>`) becomes that
token, in a prompt and in a chat's messages alike. Whoever passes on text of strangers removes such spellings first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmoe.errors import DataError
from flexmoe.structured.grammars import Grammars
from flexmoe.text.backend import VOCABULARY_FILES, TokenizerError, build
from flexmoe.text.chat_template import DEFAULT_TIMEOUT_S, ChatTemplate, first_line
from flexmoe.text.token_text import TokenText, TokenTexts
from policies.common.option_names import option


class Tokenizer:
    """The tokenizer of a checkpoint directory; without tokenizer files, or with some that cannot be used, it serves requests in
    token ids only.

    Use `Tokenizer.load`.

    Args:
        backend: a transformers tokenizer, or None when there is none.
        source: where it came from, for messages.
        chat_template: instead of the backend's own.
        created_s: the time that a chat template may ask for; None means that of the rendering.
        render_timeout_s: CPU seconds that the chat template may take for one chat.
        problem: why there is no backend although there are files; raised when it is needed.

    Raises:
        DataError: `chat_template` is no template.
    """

    def __init__(
        self,
        backend: Any | None,
        source: str,
        *,
        chat_template: str | None = None,
        created_s: int | None = None,
        render_timeout_s: float = DEFAULT_TIMEOUT_S,
        problem: TokenizerError | None = None,
    ) -> None:
        self._backend, self._source, self.problem = backend, source, problem
        self._texts = None if backend is None else TokenTexts(backend)
        self._created_s, self._timeout_s = created_s, render_timeout_s
        self._template: ChatTemplate | None = None
        self._no_template: str | None = None
        self._grammars: Grammars | None = None
        if chat_template is not None:
            variables = {} if backend is None else backend.special_tokens_map
            self._template = self._compiled(chat_template, variables)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], **options: Any) -> Tokenizer:
        """Loads the tokenizer of `directory`; one that cannot be built is an error when text needs it.

        Args:
            **options: those of `Tokenizer`: ``chat_template``, ``created_s``, ``render_timeout_s``.

        Raises:
            DataError: the chat template that is given is no template.
        """
        if not any((Path(directory) / name).is_file() for name in VOCABULARY_FILES):
            return cls(None, str(directory), **options)
        try:
            return cls(build(Path(directory)), str(directory), **options)
        except TokenizerError as problem:
            return cls(None, str(directory), problem=problem, **options)

    @property
    def is_available(self) -> bool:
        """Whether there is a backend."""
        return self._backend is not None

    @property
    def backend(self) -> Any:
        """The transformers tokenizer.

        Raises:
            DataError: the checkpoint has no tokenizer files.
            TokenizerError: it has some that cannot be used, as wherever text is needed.
        """
        return self._require()

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template.

        Raises:
            DataError: it is no template.
        """
        return Tokenizer(
            self._backend,
            self._source,
            chat_template=source,
            created_s=self._created_s,
            render_timeout_s=self._timeout_s,
            problem=self.problem,
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with the special tokens (such as BOS) that the tokenizer itself adds.

        Raises:
            DataError: the checkpoint has no tokenizer files, or its tokenizer cannot encode the text.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[tuple[int, ...]]:
        """What `encode` gives for each text, several at a time.

        Args:
            add_special_tokens: False for what a chat template wrote, which writes them itself.

        Raises:
            DataError: as `encode`, for any of them.
        """
        if not texts:
            return []
        backend = self._require()
        try:
            # verbose=False: what is too long is the engine's to judge, not tokenizer_config.json's.
            encoded = backend(list(texts), add_special_tokens=add_special_tokens, truncation=False, verbose=False)
        except Exception as error:
            raise DataError(f"the tokenizer cannot encode this text ({first_line(error)})") from error
        return [tuple(ids) for ids in encoded["input_ids"]]

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a chat under the checkpoint's template.

        Args:
            variables: more of the template's variables.
            add_generation_prompt: end with what begins the assistant's answer.
            continue_final_message: end with the content of the last message.

        Raises:
            DataError: there are no tokenizer files or no chat template, or the template refuses the messages or does
                not come to an end.
        """
        self._require()
        if self._template is None and self._no_template is None:
            self._compile()
        if self._template is None:
            raise DataError(self._no_template)
        return self._template.render(
            messages,
            variables,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def decode(self, token_ids: Sequence[int]) -> str | None:
        """The text that token ids add to a text before them, without special tokens; None without a tokenizer.

        Tokenizers that begin words with a space drop it at the very beginning of a text: a completion keeps it.
        """
        return None if self._texts is None else self._texts.continuation(token_ids)

    @property
    def detokenize(self) -> Callable[..., str] | None:
        """`decode` as a function, which also takes ``skip_special_tokens=False``; None without a tokenizer."""
        return None if self._texts is None else self._texts.continuation

    def decode_prompt(self, token_ids: Sequence[int]) -> str | None:
        """The text of token ids with which a text begins, without special tokens; None without a tokenizer."""
        return None if self._texts is None else self._texts.beginning(token_ids)

    def token_text(self, token_id: int) -> TokenText:
        """A single token as log-probabilities show it."""
        return TokenText.unknown(token_id) if self._texts is None else self._texts.token(token_id)

    def token_id(self, piece: str) -> int | None:
        """The id of a token by what the vocabulary calls it; None where it has no such token."""
        if self._backend is None:
            return None
        found: int | None = self._backend.convert_tokens_to_ids(piece)
        return found if found is not None and self._backend.convert_ids_to_tokens(found) == piece else None

    def grammars(self) -> Grammars:
        """What compiles grammars for the vocabulary; made once.

        Raises:
            UsageError: the package for it is not installed, or cannot use this tokenizer.
            DataError: there is no tokenizer.
        """
        if self._grammars is None:
            self._grammars = Grammars(self._require())
        return self._grammars

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template; None where there is none, or one that cannot be read."""
        if self._template is None and self._no_template is None and self._backend is not None:
            self._compile()
        return None if self._template is None else self._template.source

    @property
    def eos_token_id(self) -> int | None:
        return None if self._backend is None else self._backend.eos_token_id

    def _compiled(self, source: str, variables: Mapping[str, Any]) -> ChatTemplate:
        return ChatTemplate(source, variables, created_s=self._created_s, timeout_s=self._timeout_s)

    def _compile(self) -> None:
        """Compiles the checkpoint's template when the first chat asks for it: other rows do without."""
        backend = self._require()
        try:
            # A checkpoint may have several templates, by name; transformers knows which is meant.
            source = backend.get_chat_template(None) if getattr(backend, "chat_template", None) else None
            if source is None:
                self._no_template = (
                    f"{self._source} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                    f"add one, name one with {option('chat_template')}, or give a prompt instead of messages"
                )
            else:
                self._template = self._compiled(source, backend.special_tokens_map)
        except (DataError, ValueError) as error:
            self._no_template = f"{first_line(error)}; repair it, or name one with {option('chat_template')}"

    def _require(self) -> Any:
        if self.problem is not None:
            raise self.problem
        if self._backend is None:
            raise DataError(
                f"{self._source} has no tokenizer files (none of {', '.join(VOCABULARY_FILES)}); add them, or give "
                "prompts as token ids"
            )
        return self._backend


def eos_ids(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Ids that end a sequence: all of generation_config.json, else of config.json, and the tokenizer's one, as in vLLM.

    Args:
        generation_config: contents of generation_config.json; empty when there is none.
        config: contents of config.json.
        tokenizer: may be None.

    Returns:
        The ids in this order, each once; empty when nobody names one.

    Raises:
        DataError: `eos_token_id` is neither a token id nor a list of them.
    """
    last = None if tokenizer is None else tokenizer.eos_token_id
    own = () if last is None else (last,)
    for name, source in (("generation_config.json", generation_config), ("config.json", config)):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise DataError(f"eos_token_id in {name} is {value!r}; it must be a token id or a list of token ids")
        if ids:
            return tuple(dict.fromkeys((*ids, *own)))
    return own
