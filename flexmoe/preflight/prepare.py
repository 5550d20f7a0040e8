"""From a request to what the engine takes, or to why it cannot run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from flexmoe.checkpoint.generation_config import SamplingDefaults
from flexmoe.errors import DataError, FlexMoEError, UsageError
from flexmoe.openai.batch_line import Request
from flexmoe.openai.fields import RowError
from flexmoe.params import DEFAULT_MAX_TOKENS, EngineRequest, SamplingParams
from flexmoe.preflight.served_model import ServedModel
from flexmoe.text.chat_template import ENDLESS
from flexmoe.text.tokenizer import Tokenizer

#: Completions of one row; all of them wait in memory for the last one.
MAX_CHOICES = 4096
#: A text of more characters for each token of the context is hardly one that fits: a beginning of it is tokenized first,
#: since a tokenizer takes hundreds of bytes for each token that it makes. Each further beginning is so much longer.
_CHARACTERS_PER_TOKEN, _GROWTH = 8, 4
#: The end of a beginning may be tokens that the whole text does not have.
_SPARE_TOKENS = 64
#: Texts are tokenized together up to so many characters.
_CHARACTERS_TOGETHER = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model bounds.

    Args:
        vocab_size: token ids are below it.
        context: most tokens of a prompt and its completion.
    """

    vocab_size: int
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparer:
    """Makes engine requests of rows: renders, tokenizes, fills in what a row leaves open, and refuses what cannot run.

    It depends on nothing but its arguments and the row, so that any process that has the same makes the same.

    Args:
        default_max_tokens: for rows that name no limit; None: `DEFAULT_MAX_TOKENS` for prompts, and chats are open.
    """

    tokenizer: Tokenizer
    limits: Limits
    default_max_tokens: int | None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    served: ServedModel = field(default_factory=ServedModel.of)

    def prepare(self, request: Request, row: int) -> list[EngineRequest] | RowError:
        """One engine request for each prompt of a row, named ``<row>/<prompt>``; or why it cannot run."""
        return self.prepare_all([(row, request)])[0]

    def prepare_all(self, rows: Sequence[tuple[int, Request]]) -> list[list[EngineRequest] | RowError]:
        """What `prepare` makes of each (row, request), with all texts tokenized together."""
        return list(self.prepare_each(rows))

    def prepare_each(self, rows: Iterable[tuple[int, Request]]) -> Iterator[list[EngineRequest] | RowError]:
        """As `prepare_all`, and after a chat template that took all its time no further row is rendered before the caller
        has what became of this one: he may give up."""
        asked: list[tuple[int, Request, list[_Text | tuple[int, ...]] | RowError]] = []
        for row, request in rows:
            parts = self._asked(request)
            asked.append((row, request, parts))
            if isinstance(parts, RowError) and parts.message.startswith(ENDLESS):
                yield from self._together(asked)
                asked = []
        yield from self._together(asked)

    def is_open(self, request: Request) -> bool:
        """Whether a row has no limit but the context: a chat that names none, where there is no default."""
        return self.default_max_tokens is None and request.kind == "chat" and "max_tokens" not in request.sampling

    def _together(
        self, asked: Sequence[tuple[int, Request, list[_Text | tuple[int, ...]] | RowError]]
    ) -> Iterator[list[EngineRequest] | RowError]:
        texts = [part for *_, parts in asked if not isinstance(parts, RowError) for part in parts]
        tokenized = iter(self._tokenized(texts))
        for row, request, parts in asked:
            if isinstance(parts, RowError):
                yield parts
            else:
                yield self._finished(request, row, [next(tokenized) for _ in parts])

    def _asked(self, request: Request) -> list[_Text | tuple[int, ...]] | RowError:
        """The prompts of a row as texts or ids."""
        if request.error is not None:
            return request.error
        mismatch = self.served.mismatch(request.model) if self.served.strict else None
        if mismatch is not None:
            return RowError(
                code="model_not_found", message=f"{mismatch}; change the row or leave its model out", param="model"
            )
        how = request.rendering
        if request.messages is None:
            special = how.add_special_tokens is not False
            return [_Text(prompt, special) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        if how.tools and "tools" not in (self.tokenizer.chat_template or "tools"):
            message = "the chat template describes no tools; leave them out, or use a template that does"
            return RowError.unsupported("tools", message)
        try:
            text = self.tokenizer.render(
                request.messages,
                {**how.template_kwargs, **({"tools": list(how.tools)} if how.tools else {})},
                add_generation_prompt=how.add_generation_prompt,
                continue_final_message=how.continue_final_message,
            )
        except DataError as error:
            return _invalid_prompt(request, str(error))
        return [_Text(text, how.add_special_tokens is True)]

    def _tokenized(self, parts: Sequence[_Text | tuple[int, ...]]) -> list[tuple[int, ...] | DataError]:
        """Token ids of each part, or why it has none."""
        results: list[tuple[int, ...] | DataError] = [() if isinstance(part, _Text) else part for part in parts]
        for special in (True, False):
            texts = {i: p.text for i, p in enumerate(parts) if isinstance(p, _Text) and p.special == special}
            for place, ids in zip(texts, self._encoded(list(texts.values()), special), strict=True):
                results[place] = ids
        return results

    def _encoded(self, texts: list[str], special: bool) -> Iterator[tuple[int, ...] | DataError]:
        """Token ids of each text, or why it has none; few enough at once that their memory is small."""
        together: list[str] = []
        for text in texts:
            if together and sum(map(len, together)) + len(text) > _CHARACTERS_TOGETHER:
                yield from self._encoded_at_once(together, special)
                together = []
            if len(text) <= _CHARACTERS_PER_TOKEN * self._too_many:
                together.append(text)
            else:
                yield from self._encoded_at_once(together, special)
                yield self._encoded_long(text, special)
                together = []
        yield from self._encoded_at_once(together, special)

    @property
    def _too_many(self) -> int:
        """Tokens of a beginning that say of a text that it does not fit the context."""
        return self.limits.context + _SPARE_TOKENS

    def _encoded_long(self, text: str, special: bool) -> tuple[int, ...] | DataError:
        length = _CHARACTERS_PER_TOKEN * self._too_many
        while length < len(text):
            [ids] = self._encoded_at_once([text[:length]], special)
            if isinstance(ids, DataError):
                return ids
            if len(ids) > self._too_many:
                return _TooLongError(self._too_long(f"more than {self.limits.context}"))
            length *= _GROWTH
        [ids] = self._encoded_at_once([text], special)
        return ids

    def _encoded_at_once(self, texts: list[str], special: bool) -> Iterable[tuple[int, ...] | DataError]:
        try:
            return self.tokenizer.encode_all(texts, add_special_tokens=special)
        except DataError as error:
            if len(texts) == 1:
                return [error]
            # One of them is at fault, and the others are not: take them by themselves.
            return [ids for text in texts for ids in self._encoded_at_once([text], special)]

    def _finished(
        self, request: Request, row: int, tokenized: Sequence[tuple[int, ...] | DataError]
    ) -> list[EngineRequest] | RowError:
        failed = next((ids for ids in tokenized if isinstance(ids, DataError)), None)
        if failed is not None:
            code = "context_length_exceeded" if isinstance(failed, _TooLongError) else "invalid_prompt"
            return RowError(code=code, message=str(failed), param=_prompt_field(request))
        prompts = [ids for ids in tokenized if not isinstance(ids, DataError)]
        default = None if self.is_open(request) else self.default_max_tokens or DEFAULT_MAX_TOKENS
        try:
            params = self.defaults.params(request.sampling, default)
        except UsageError as error:  # what the row says and what it leaves open may contradict each other
            return RowError.refused(error)
        refused = self._refused_params(params, request, len(prompts))
        refused = refused or next(filter(None, (self._refused_prompt(request, ids, params) for ids in prompts)), None)
        if refused is not None:
            return refused
        return [
            EngineRequest(
                request_id=f"{row}/{number}",
                prompt_token_ids=ids,
                params=params,
                stream_key=f"{request.custom_id}/{number}",
            )
            for number, ids in enumerate(prompts)
        ]

    def _refused_params(self, params: SamplingParams, request: Request, prompts: int) -> RowError | None:
        vocab, context = self.limits.vocab_size, self.limits.context
        if prompts * params.n > MAX_CHOICES:
            message = (
                f"{prompts} prompts with n = {params.n} make {prompts * params.n} choices; at most {MAX_CHOICES} may be"
            )
            return RowError.invalid("n", f"{message} in one row: divide it")
        if params.stop and not self.tokenizer.is_available:
            return RowError.invalid(
                "stop", "stop strings need the model's tokenizer, and there is none; use stop_token_ids"
            )
        outside = [id for id in dict(params.logit_bias) if id >= vocab]
        if outside:
            return RowError.invalid(
                "logit_bias", f"logit_bias names token {outside[0]}, outside the vocabulary of {vocab}"
            )
        outside = [id for id in params.stop_token_ids if id >= vocab]
        if outside:
            return RowError.invalid("stop_token_ids", f"token {outside[0]} is outside the vocabulary of {vocab}")
        problem = self._ungrammatical(params)
        if problem is not None:
            return RowError(code="invalid_structure", message=problem, param=request.structure_field)
        limit = request.sampling.get("max_tokens", 0)
        if limit > context:
            return RowError.invalid(
                "max_tokens", f"max_tokens is {limit}, more than the model's context of {context} tokens"
            )
        return None

    def _ungrammatical(self, params: SamplingParams) -> str | None:
        """Why there are no completions of the structure that a row asks for."""
        if params.structure is None:
            return None
        try:
            return self.tokenizer.grammars().problem(params.structure)
        except FlexMoEError as error:
            return str(error)

    def _refused_prompt(self, request: Request, ids: tuple[int, ...], params: SamplingParams) -> RowError | None:
        if not ids:
            return _invalid_prompt(request, "the prompt has no tokens; give one that is not empty")
        if max(ids) >= self.limits.vocab_size:
            message = f"token {max(ids)} of the prompt is outside the vocabulary of {self.limits.vocab_size}"
            return _invalid_prompt(request, message)
        room = self.limits.context - len(ids)
        if room < (0 if params.max_tokens == 0 else 1):
            message = self._too_long(str(len(ids)))
            return RowError(code="context_length_exceeded", message=message, param=_prompt_field(request))
        return None

    def _too_long(self, tokens: str) -> str:
        return f"the prompt has {tokens} tokens, and the model's context is {self.limits.context}; shorten it"


class _TooLongError(DataError):
    """A text has more tokens than the context; how many more is not known."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt that is to be tokenized, with the `special` tokens that the tokenizer adds or without them."""

    text: str
    special: bool


def _prompt_field(request: Request) -> str:
    return "prompt" if request.messages is None else "messages"


def _invalid_prompt(request: Request, message: str) -> RowError:
    return RowError(code="invalid_prompt", message=message, param=_prompt_field(request))
