"""A completion as a client asks for it: read, prepared for the engine, and what comes of it put in OpenAI's words."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexmoe.batch.job_parts import preparer_setup
from flexmoe.openai.batch_line import Request, request_of
from flexmoe.openai.fields import RowError
from flexmoe.openai.json_line import InvalidLine
from flexmoe.openai.reasoning import ReasoningParser
from flexmoe.openai.response import ResponseEncoder
from flexmoe.openai.tool_calls import ToolParser
from flexmoe.outputs import RequestOutput
from flexmoe.params import EngineRequest, InFlight
from flexmoe.preflight.prepare import Preparer
from flexmoe.serving.errors import ApiError, invalid, not_found
from flexmoe.serving.work.models import Served, ServedModels

#: As many prompts as OpenAI takes in one request.
MOST_CHOICES = 2048
#: What a character of which only the first bytes have come is decoded as.
_UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The text of a choice, as far as it is certain.

    Args:
        content: of the answer.
        reasoning: what was thought before it; "" for nothing.
    """

    content: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A completion that can run.

    Args:
        key: makes its id.
        parts: requests of the engine, one for each prompt.
        streams: whether the answer comes in pieces.
        include_usage: whether a last piece counts tokens.
    """

    served: Served
    request: Request
    key: str
    created_s: int
    parts: Sequence[EngineRequest]
    streams: bool
    include_usage: bool

    @property
    def samples(self) -> int:
        """Choices of each prompt."""
        return self.parts[0].params.n


class _ModelCodec:
    """What makes requests and answers of a model; its tokenizer serves one thread at a time."""

    def __init__(self, served: Served) -> None:
        self.lock = threading.Lock()
        self.preparer: Preparer = preparer_setup(served.options, served.model).preparer()
        keep = served.options.keep_reasoning_in_content
        self.encoder = ResponseEncoder(
            self.preparer.tokenizer, fingerprint="", model_name=served.id, created_s=0, keep_reasoning=keep
        )
        parser = None if keep else ReasoningParser(self.preparer.tokenizer)
        self.reasoning = parser if parser is not None and parser.style is not None else None
        self.tools = ToolParser(self.preparer.tokenizer)


class CompletionCodec:
    """Reads what clients ask, for the models that are served.

    Their tokenizers are loaded at once: libraries that are first imported by several threads at a time are found half made.

    Raises:
        FlexMoEError: what makes requests of a model cannot be used.
    """

    def __init__(self, models: ServedModels) -> None:
        self._models = models
        self._own = {served.id: _ModelCodec(served) for served in models}

    def read(self, body: Mapping[str, Any], url: str, now_s: int) -> CompletionRequest:
        """Reads the body of a request for a completion.

        Args:
            url: the endpoint, one of `flexmoe.openai.batch_line.URLS`.

        Raises:
            ApiError: it cannot be served.
            FlexMoEError: the model's tokenizer cannot be used.
        """
        streams, include_usage, rest = _streaming(body)
        served = self._served(rest)
        key = secrets.token_hex(16)
        # What is drawn depends on the id: with a seed it has to be the same, without one another every time.
        custom_id = key if rest.get("seed") is None else "seeded"
        line = {"custom_id": custom_id, "method": "POST", "url": url, "body": rest}
        try:
            request = request_of(line, 1)
        except InvalidLine as error:
            raise invalid(error.param, str(error)) from None
        _check_choices(request)
        own = self._own[served.id]
        with own.lock:
            parts = own.preparer.prepare(request, 0)
        if isinstance(parts, RowError):
            raise ApiError(400, parts.message, code=parts.code, param=parts.param)
        return CompletionRequest(
            served=served,
            request=request if request.echo else request.without_prompt(),
            key=key,
            created_s=now_s,
            parts=parts,
            streams=streams,
            include_usage=include_usage,
        )

    def body(self, completion: CompletionRequest, results: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer."""
        own = self._own[completion.served.id]
        with own.lock:
            return own.encoder.body(completion.request, results, completion.key, completion.created_s)

    def text_so_far(self, completion: CompletionRequest, prompt: int, state: InFlight) -> Text:
        """What is certain of an unfinished choice: no later token changes it.

        Args:
            prompt: the number of its prompt.
            state: what its sample has generated.
        """
        own = self._own[completion.served.id]
        decode = own.preparer.tokenizer.detokenize
        request = completion.request
        if decode is None or (request.echo and request.kind != "chat"):
            return Text()
        params = completion.parts[prompt].params
        with own.lock:
            text = decode(state.token_ids, skip_special_tokens=params.skip_special_tokens)
            held = max((len(stop) - 1 for stop in params.stop), default=0)
            text = text.rstrip(_UNFINISHED)
            text = text[: len(text) - held] if held else text
            before = own.tools.before if request.functions is not None else _all
            if request.kind != "chat" or own.reasoning is None:
                return Text(content=request.prefix + before(state.token_ids, text))
            answer = own.reasoning.split(
                completion.parts[prompt].prompt_token_ids,
                state.token_ids,
                text,
                skip_special_tokens=params.skip_special_tokens,
                without_calls=request.functions is not None,
            )
        if answer.reasoning is None:  # a mark that ends it may still come
            return Text()
        content = request.prefix + before(state.token_ids, answer.content) if answer.content else ""
        return Text(content=content, reasoning=answer.reasoning.rstrip())

    def _served(self, body: Mapping[str, Any]) -> Served:
        name = body.get("model")
        if not isinstance(name, str):
            raise invalid("model", "model is missing; give the id of a model as text", "missing_required_parameter")
        served = self._models.get(name)
        if served is None:
            raise not_found("model", name, "model")
        return served


def _all(token_ids: Sequence[int], content: str) -> str:
    return content


def _check_choices(request: Request) -> None:
    """All choices of a request enter the engine before rows of batches do, so there may not be many."""
    samples = request.sampling.get("n")
    choices = len(request.prompts) * (samples if isinstance(samples, int) else 1)
    if choices > MOST_CHOICES:
        message = f"the request asks for {choices} choices, of all prompts together, and the most is {MOST_CHOICES}; make a batch of it"
        raise invalid("prompt", message)


def _streaming(body: Mapping[str, Any]) -> tuple[bool, bool, dict[str, Any]]:
    """Whether the answer comes in pieces, whether usage is one of them, and the other fields."""
    rest = dict(body)
    streams, options = rest.pop("stream", None), rest.pop("stream_options", None)
    if streams is not None and not isinstance(streams, bool):
        raise invalid("stream", "stream has to be true or false")
    if options is not None and not streams:
        raise invalid("stream_options", "stream_options is for answers that are streamed; set stream to true")
    if options is not None and not isinstance(options, dict):
        raise invalid("stream_options", "stream_options has to be an object")
    options = options or {}
    unknown = [name for name in options if name not in ("include_usage", "include_obfuscation")]
    if unknown:
        raise invalid(f"stream_options.{unknown[0]}", f"stream_options.{unknown[0]} is not known; remove it")
    usage = options.get("include_usage")
    if usage is not None and not isinstance(usage, bool):
        raise invalid("stream_options.include_usage", "stream_options.include_usage has to be true or false")
    return bool(streams), bool(usage), rest
