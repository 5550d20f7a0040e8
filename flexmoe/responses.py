"""One finished row to one line of OpenAI Batch output. A repeated job writes the same bytes, but for the time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from flexmoe.errors import UsageError
from flexmoe.params import CompletionOutput, RequestOutput
from flexmoe.requests import Request
from flexmoe.tokenizer import Tokenizer


class ResponseEncoder:
    """Encodes the rows of one job.

    Args:
        tokenizer: makes the texts; one without files makes none, and they are null.
        content_hash: of the requests file; with a row's `custom_id` it decides the row's ids.
        model_name: reported for rows that name no model.
        created_s: reported as the time of every completion, in seconds since 1970.
    """

    def __init__(self, tokenizer: Tokenizer, *, content_hash: str, model_name: str, created_s: int) -> None:
        self._tokenizer, self._content_hash = tokenizer, content_hash
        self._model_name, self._created_s = model_name, created_s

    def success(self, request: Request, results: Sequence[RequestOutput]) -> bytes:
        """The line of a row that ran, with its line end.

        Args:
            results: one for each prompt of the row, in order.
        """
        key = self._key(request)
        prompt_tokens, generated_tokens = count_tokens(results)
        body = {
            "id": f"{'chatcmpl' if request.kind == 'chat' else 'cmpl'}-{key}",
            "object": "chat.completion" if request.kind == "chat" else "text_completion",
            "created": self._created_s,
            "model": self._model_name if request.model is None else request.model,
            "choices": [self._choice(request, index, result) for index, result in enumerate(results)],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": generated_tokens,
                "total_tokens": prompt_tokens + generated_tokens,
            },
        }
        return _line(key, request, {"status_code": 200, "request_id": f"req_{key}", "body": body}, None)

    def failure(self, request: Request, code: str, message: str, *, status: int | None) -> bytes:
        """The line of a row that did not run, with its line end.

        Args:
            code: for programs, `message` for people.
            status: the HTTP status that a server would have answered with; None when the row got no response at all.
        """
        key = self._key(request)
        response = None
        if status is not None:
            body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
            response = {"status_code": status, "request_id": f"req_{key}", "body": body}
        return _line(key, request, response, {"code": code, "message": message})

    def _choice(self, request: Request, index: int, result: RequestOutput) -> dict[str, Any]:
        output = result.outputs[0]
        text = self._tokenizer.decode(_visible(output))
        choice: dict[str, Any] = {"index": index}
        if request.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": output.finish_reason}
        if request.return_token_ids:
            choice |= {"prompt_token_ids": list(result.prompt_token_ids), "token_ids": list(output.token_ids)}
        return choice

    def _key(self, request: Request) -> str:
        """The same for the same row of the same file, so that a repeated job writes the same bytes."""
        return hashlib.sha256(f"{self._content_hash}\n{request.custom_id}".encode()).hexdigest()[:32]


def count_tokens(results: Sequence[RequestOutput]) -> tuple[int, int]:
    """Prompt tokens and generated tokens of a row's results."""
    prompt_tokens = sum(len(result.prompt_token_ids) for result in results)
    return prompt_tokens, sum(len(result.outputs[0].token_ids) for result in results)


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
    """The ids that make the text: the one that stopped the row is not part of it, special or not."""
    return output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids


def _line(key: str, request: Request, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    row = {"id": f"batch_req_{key}", "custom_id": request.custom_id, "response": response, "error": error}
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
