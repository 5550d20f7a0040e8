"""An answer in pieces: the chunks of a stream, whose texts together are that of the whole answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flexmoe.outputs import RequestOutput
from flexmoe.serving.work.completion_codec import CompletionCodec, CompletionRequest, Text
from flexmoe.serving.work.online_requests import OnlineRequest


@dataclass(slots=True)
class _Sent:
    """How much of a choice has been sent."""

    content: str = ""
    reasoning: str = ""


class ChunkStream:
    """The chunks of one answer.

    Args:
        codec: makes texts of tokens.
        completion: what is to be completed.
    """

    def __init__(self, codec: CompletionCodec, completion: CompletionRequest) -> None:
        self._codec, self._completion = codec, completion
        self._is_chat = completion.request.kind == "chat"
        self._sent = [_Sent() for _ in range(len(completion.parts) * completion.samples)]

    def beginning(self) -> Iterator[dict[str, Any]]:
        """What comes before the first token: of a chat, who speaks."""
        if self._is_chat:
            for index in range(len(self._sent)):
                yield self._chunk([self._chat_choice(index, {"role": "assistant", "content": ""})])

    def new(self, online: OnlineRequest) -> list[dict[str, Any]]:
        """What has become certain since the last time."""
        chunks = []
        for prompt, state in online.generated():
            index = prompt * self._completion.samples + state.index
            delta = self._delta(index, self._codec.text_so_far(self._completion, prompt, state))
            if delta:
                chunks.append(self._chunk([self._choice(index, delta)]))
        return chunks

    def end(self, results: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """The rest of every choice with why it ended, and the tokens where they are asked for."""
        body = self._codec.body(self._completion, results)
        chunks = []
        for choice in body["choices"]:
            index = choice["index"]
            delta = self._delta(index, _text_of(choice))
            chunk = self._choice(index, delta)
            calls = choice.get("message", {}).get("tool_calls")
            if calls:
                chunk["delta"]["tool_calls"] = [{"index": at} | call for at, call in enumerate(calls)]
            chunks.append(self._chunk([chunk | self._ending(choice)]))
        if self._completion.include_usage:
            chunks.append(self._chunk([]) | {"usage": body["usage"]})
        return chunks

    def _delta(self, index: int, piece: Text) -> dict[str, str]:
        """What is to be sent of a choice that is certain so far; by field."""
        sent, delta = self._sent[index], {}
        for name in ("reasoning", "content"):
            have, now = getattr(sent, name), getattr(piece, name)
            if len(now) > len(have) and now.startswith(have):
                delta[name] = now[len(have) :]
                setattr(sent, name, now)
        return delta

    def _choice(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        if not self._is_chat:
            return {"index": index, "text": delta.get("content", ""), "logprobs": None, "finish_reason": None}
        names = {"content": "content", "reasoning": "reasoning_content"}
        return self._chat_choice(index, {names[name]: text for name, text in delta.items()})

    def _chat_choice(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _ending(self, choice: dict[str, Any]) -> dict[str, Any]:
        names = ("logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids")
        return {name: choice[name] for name in names if name in choice}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        completion = self._completion
        chunk = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{completion.key}",
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": completion.created_s,
            "model": completion.request.model,
            "choices": choices,
        }
        return chunk | ({"usage": None} if completion.include_usage else {})


def _text_of(choice: dict[str, Any]) -> Text:
    if "text" in choice:
        return Text(content=choice["text"])
    message = choice["message"]
    return Text(content=message["content"] or "", reasoning=message.get("reasoning_content") or "")
