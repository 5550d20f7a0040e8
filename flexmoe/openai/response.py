"""One finished row to one line of OpenAI Batch output. A repeated job writes the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from flexmoe.errors import UsageError
from flexmoe.openai.batch_line import Prompt, Request
from flexmoe.openai.fields import RowError
from flexmoe.openai.logprobs import Alignment, chat_logprobs, completion_logprobs
from flexmoe.openai.reasoning import Answer, ReasoningParser
from flexmoe.openai.tool_calls import ToolParser
from flexmoe.outputs import CompletionOutput, RequestOutput
from flexmoe.text.tokenizer import Tokenizer


class ResponseEncoder:
    """Encodes the rows of one job.

    Args:
        tokenizer: makes the texts. Without its files there are none: they are empty, and the token ids are always there.
        fingerprint: of the job; with a row's `custom_id` it decides the row's ids.
        model_name: reported for rows that name no model.
        created_s: reported as the time of every completion, in seconds since 1970.
        keep_reasoning: leave what a model thinks in the content of its answer.
        cached_tokens: tell in the usage how many tokens of the prompts were not computed for the row. A resumed job computes some
            again, so these numbers alone may be others then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        fingerprint: str,
        model_name: str,
        created_s: int,
        keep_reasoning: bool = False,
        cached_tokens: bool = False,
    ) -> None:
        self._tokenizer, self._fingerprint = tokenizer, fingerprint
        self._model_name, self._created_s = model_name, created_s
        self._cached_tokens = cached_tokens
        parser = None if keep_reasoning else ReasoningParser(tokenizer)
        self._reasoning = parser if parser is not None and parser.style is not None else None
        self._tools = ToolParser(tokenizer)

    def success(self, request: Request, results: Sequence[RequestOutput]) -> bytes:
        """The line of a row that ran, with its line end.

        Args:
            request: its prompts are needed only where they are echoed.
            results: one for each prompt of the row, in order.
        """
        key = self._key(request)
        body = self.body(request, results, key, self._created_s)
        return _line(key, request, {"status_code": 200, "request_id": f"req_{key}", "body": body}, None)

    def body(self, request: Request, results: Sequence[RequestOutput], key: str, created_s: int) -> dict[str, Any]:
        """The completion of a request, as a server answers it.

        Args:
            results: as for `success`.
            key: what makes its id.
            created_s: its time.
        """
        prompt_tokens, generated_tokens = count_tokens(results)
        choices, reasoning_tokens = self._choices(request, results, key)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated_tokens,
            "total_tokens": prompt_tokens + generated_tokens,
        }
        if self._cached_tokens:
            cached = sum(result.num_cached_tokens or 0 for result in results)
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        if reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
        return {
            "id": f"{'chatcmpl' if request.kind == 'chat' else 'cmpl'}-{key}",
            "object": "chat.completion" if request.kind == "chat" else "text_completion",
            "created": created_s,
            "model": self._model_name if request.model is None else request.model,
            "choices": choices,
            "usage": usage,
        }

    def failure(self, request: Request, error: RowError, *, status: int | None) -> bytes:
        """The line of a row that did not run, with its line end.

        Args:
            status: the HTTP status that a server would have answered with; None when the row got no response at all.
        """
        key = self._key(request)
        if status is None:
            return _line(key, request, None, {"code": error.code, "message": error.message})
        body = {"message": error.message, "type": "invalid_request_error", "param": error.param, "code": error.code}
        return _line(key, request, {"status_code": status, "request_id": f"req_{key}", "body": {"error": body}}, None)

    def _choices(
        self, request: Request, results: Sequence[RequestOutput], key: str
    ) -> tuple[list[dict[str, Any]], int | None]:
        """All completions of the first prompt, then those of the second, and so on, as OpenAI numbers them; and how many of
        their tokens are reasoning, None where nobody knows."""
        choices: list[dict[str, Any]] = []
        reasoning_tokens: list[int | None] = []
        for number, result in enumerate(results):
            prompt = request.prompts[number] if request.echo and request.prompts else None
            for output in result.outputs:
                answer = self._answer(request, result, output)
                reasoning_tokens.append(None if answer is None else answer.reasoning_tokens)
                call_key = f"{key}/{len(choices)}"
                choice = self._choice(request, prompt, result, output, answer, call_key)
                choices.append({"index": len(choices)} | choice)
        known = [tokens for tokens in reasoning_tokens if tokens is not None]
        return choices, sum(known) if known and len(known) == len(reasoning_tokens) else None

    def _answer(self, request: Request, result: RequestOutput, output: CompletionOutput) -> Answer | None:
        """A chat's completion apart from its reasoning; None where the two are not told apart."""
        if request.kind != "chat" or self._reasoning is None:
            return None
        skip = request.sampling.get("skip_special_tokens") is not False
        return self._reasoning.split(
            result.prompt_token_ids,
            output.token_ids,
            self._text(output),
            skip_special_tokens=skip,
            without_calls=request.functions is not None,
        )

    def _choice(
        self,
        request: Request,
        prompt: Prompt | None,
        result: RequestOutput,
        output: CompletionOutput,
        answer: Answer | None,
        call_key: str,
    ) -> dict[str, Any]:
        text = self._text(output)
        if request.kind == "chat":
            message: dict[str, Any] = {"role": "assistant", **_message(request.prefix, text, answer), "refusal": None}
            message |= self._calls(request, output, message["content"], call_key)
            choice: dict[str, Any] = {"message": message, "logprobs": chat_logprobs(self._tokenizer, output)}
        else:
            before = self._prompt_text(prompt, result) if request.echo else ""
            scored = result if request.echo else None
            special = request.sampling.get("skip_special_tokens") is False
            aligned = Alignment(prompt=before, text=text, special=special)
            logprobs = completion_logprobs(self._tokenizer, output, aligned, scored)
            choice = {"text": before + text, "logprobs": logprobs}
        called = output.finish_reason == "stop" and "tool_calls" in choice.get("message", ())
        choice |= {"finish_reason": "tool_calls" if called else output.finish_reason, "stop_reason": output.stop_reason}
        if request.return_token_ids or not self._tokenizer.is_available:
            choice |= {"prompt_token_ids": list(result.prompt_token_ids), "token_ids": list(output.token_ids)}
        return choice

    def _calls(self, request: Request, output: CompletionOutput, content: str | None, call_key: str) -> dict[str, Any]:
        """The calls of a message with the content before them; {} where there are none."""
        if request.functions is None:
            return {}
        content, calls = self._tools.split(output.token_ids, content, request.functions)
        made = [call.to_json(f"{call_key}/{number}") for number, call in enumerate(calls)]
        return {"content": content, "tool_calls": made} if made else {}

    def _text(self, output: CompletionOutput) -> str:
        return output.text if output.text is not None else self._tokenizer.decode(_visible(output)) or ""

    def _prompt_text(self, prompt: Prompt | None, result: RequestOutput) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode_prompt(result.prompt_token_ids) or ""

    def _key(self, request: Request) -> str:
        """The same for the same row of the same job, so that a repeated or resumed job writes the same bytes."""
        return hashlib.sha256(f"{self._fingerprint}\n{request.custom_id}".encode()).hexdigest()[:32]


def _message(prefix: str, text: str, answer: Answer | None) -> dict[str, str | None]:
    """The texts of a chat's message. A model that may think has `reasoning_content`, null where it did not."""
    if answer is None:
        return {"content": prefix + text}
    content = None if answer.content is None and not prefix else prefix + (answer.content or "")
    return {"reasoning_content": answer.reasoning, "content": content}


def count_tokens(results: Sequence[RequestOutput]) -> tuple[int, int]:
    """Prompt tokens and generated tokens of a row's results; a prompt counts once, whatever its completions."""
    prompt_tokens = sum(len(result.prompt_token_ids) for result in results)
    return prompt_tokens, sum(len(output.token_ids) for result in results for output in result.outputs)


def creation_time_s() -> int:
    """Seconds since 1970: SOURCE_DATE_EPOCH where it is set, so that a repeated job is the same to the byte.

    Raises:
        UsageError: SOURCE_DATE_EPOCH is no whole number.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return int(time.time())
    try:
        return int(epoch)
    except ValueError:
        raise UsageError(f"SOURCE_DATE_EPOCH is {epoch!r}; give whole seconds since 1970, or unset it") from None


def _visible(output: CompletionOutput) -> tuple[int, ...]:
    """The ids that make the text: the one that ended the completion is not part of it, special or not."""
    return output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids


def _line(key: str, request: Request, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    row = {"id": f"batch_req_{key}", "custom_id": request.custom_id, "response": response, "error": error}
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace") + b"\n"  # a path, which may be named, need not be UTF-8
