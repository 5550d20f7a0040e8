"""What a model thinks before it answers, taken apart from the answer.

Two ways of writing it are known. *Think*: ``<think>…</think>`` before the answer; many chat templates write the first mark
themselves, at the end of the prompt. *Harmony* (gpt-oss): messages in channels,
``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>``, of which the final channel is
the answer. Where a mark is a token of its own it is found among the ids, since texts may leave special tokens out; else in the text.
Sources: vLLM's `reasoning` parsers, for names and for what is null; OpenAI's description of harmony.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from flexmoe.text.tokenizer import Tokenizer

Style = Literal["think", "harmony"]
OPEN, CLOSE = "<think>", "</think>"
CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
#: Marks of each style.
_MARKS: dict[Style, tuple[str, ...]] = {
    "harmony": (CHANNEL, MESSAGE, START, "<|end|>", "<|return|>", "<|call|>"),
    "think": (OPEN, CLOSE),
}
#: Of these a style is known: all are tokens, or a chat template mentions the last one.
_EVIDENCE: dict[Style, tuple[str, ...]] = {"harmony": (CHANNEL, MESSAGE), "think": (OPEN, CLOSE)}
#: A header of harmony with it goes to a function.
_TO = "to=functions."
#: The last tokens of a prompt, among which a template's mark is.
_TAIL_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A completion in two.

    Args:
        reasoning: None where there is none.
        content: None where the completion ended before its answer began.
        reasoning_tokens: ids whose text is reasoning; None where they are not known.
    """

    reasoning: str | None
    content: str | None
    reasoning_tokens: int | None = 0


@dataclass(frozen=True, slots=True)
class _Segment:
    """A stretch of a completion: the mark that it follows, which its text does not have, and how many ids it is.

    Args:
        mark: None at the beginning.
        shown: text of the mark as far as the completion's text has it.
    """

    mark: str | None
    shown: str
    text: str
    tokens: int


def style_of(template: str | None, is_token: Callable[[str], bool]) -> Style | None:
    """How a model writes what it thinks; None for one that is not known to.

    Args:
        template: of its chats.
        is_token: whether a text is one token of its tokenizer.
    """
    for style, marks in _EVIDENCE.items():
        if marks[-1] in (template or "") or all(map(is_token, marks)):
            return style
    return None


class ReasoningParser:
    """Takes completions apart.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.style = style_of(tokenizer.chat_template, lambda mark: tokenizer.token_id(mark) is not None)
        marks = () if self.style is None else _MARKS[self.style]
        ids = {mark: tokenizer.token_id(mark) for mark in marks}
        self._marks = {id: mark for mark, id in ids.items() if id is not None}
        self._are_tokens = len(self._marks) == len(marks)

    def split(
        self,
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        text: str,
        *,
        skip_special_tokens: bool = True,
        without_calls: bool = False,
    ) -> Answer:
        """A completion of a chat in two.

        Args:
            prompt_ids: the prompt, whose end may begin the thinking.
            token_ids: all ids of the completion.
            text: of the completion; a stop string may have cut it.
            skip_special_tokens: whether the text leaves special tokens out.
            without_calls: leave out messages that go to a function (`flexmoe.openai.tool_calls`).
        """
        if self.style is None:
            return Answer(reasoning=None, content=text)
        if self._are_tokens:
            segments = _cut(self._by_ids(token_ids, skip_special_tokens), len(text))
        else:
            segments = _by_text(text, _MARKS[self.style])
        found = (
            _harmony(segments, without_calls)
            if self.style == "harmony"
            else _think(segments, self._prompt_mark(prompt_ids))
        )
        return (
            found
            if self._are_tokens
            else Answer(reasoning=found.reasoning, content=found.content, reasoning_tokens=None)
        )

    def _by_ids(self, ids: Sequence[int], skip: bool) -> list[_Segment]:
        ends = [place for place, id in enumerate(ids) if id in self._marks] + [len(ids)]
        segments = [_Segment(None, "", self._text(ids[: ends[0]], skip), ends[0])]
        for place, end in zip(ends, ends[1:]):
            text = self._text(ids[place + 1 : end], skip)
            segments.append(
                _Segment(self._marks[ids[place]], self._text(ids[place : place + 1], skip), text, end - place - 1)
            )
        return segments

    def _text(self, ids: Sequence[int], skip: bool) -> str:
        decode = self._tokenizer.detokenize
        return decode(ids, skip_special_tokens=skip) if ids and decode is not None else ""

    def _prompt_mark(self, prompt_ids: Sequence[int]) -> str | None:
        """The mark with which a prompt ends; None for none."""
        tail = self._text(prompt_ids[-_TAIL_TOKENS:], skip=False).rstrip()
        return next((mark for mark in (OPEN, CLOSE) if tail.endswith(mark)), None)


def _by_text(text: str, marks: Sequence[str]) -> list[_Segment]:
    first, *others = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
    return [_Segment(None, "", first, 0)] + [
        _Segment(m, m, t, 0) for m, t in zip(others[::2], others[1::2], strict=True)
    ]


def _cut(segments: Sequence[_Segment], characters: int) -> list[_Segment]:
    """The segments as far as the text goes that a stop string has cut. A mark that no text shows stays where it ends."""
    kept = []
    for each in segments:
        if each.mark is not None and characters < len(each.shown):
            break
        characters -= len(each.shown)
        kept.append(_Segment(each.mark, each.shown, each.text[:characters], each.tokens))
        if characters < len(each.text):
            break
        characters -= len(each.text)
    return kept


def _think(segments: Sequence[_Segment], prompt_mark: str | None) -> Answer:
    """The prompt or the completion begins with the thinking, or a mark ends it that nothing began, as in a continued message."""
    first, rest = segments[0], list(segments[1:])
    if prompt_mark == CLOSE:
        return Answer(reasoning=None, content=_joined(segments))
    began = prompt_mark == OPEN
    if rest and rest[0].mark == OPEN and not first.text.strip():
        first, began = _Segment(None, "", rest[0].text, rest[0].tokens), True
        rest = rest[1:]
    end = next((place for place, each in enumerate(rest) if each.mark == CLOSE), None)
    if end is None and not began:
        return Answer(reasoning=None, content=_joined(segments))
    thought = [first, *rest[:end]]
    tokens = sum(each.tokens for each in thought)
    reasoning = _joined(thought).strip("\r\n") or None
    if end is None:
        return Answer(reasoning=reasoning, content=None, reasoning_tokens=tokens)
    close, *after = rest[end:]
    return Answer(reasoning=reasoning, content=(close.text + _joined(after)).lstrip("\r\n"), reasoning_tokens=tokens)


def _harmony(segments: Sequence[_Segment], without_calls: bool) -> Answer:
    """Messages of the final channel are the answer. What stands before any mark is one too, unless a header goes on there."""
    reasoning, content, tokens, channel = [], [], 0, ""
    first = segments[0]
    calls = without_calls and _TO in first.text
    if first.text and (len(segments) == 1 or segments[1].mark not in (CHANNEL, MESSAGE)):
        content.append(first.text)
    for each in segments[1:]:
        if each.mark == CHANNEL:
            channel = each.text.split()[0] if each.text.strip() else ""
            calls = calls or (without_calls and _TO in each.text)
        elif each.mark == MESSAGE and calls:
            calls = False
        elif each.mark == MESSAGE and channel in ("final", ""):
            content.append(each.text)
        elif each.mark == MESSAGE:
            reasoning.append(each.text)
            tokens += each.tokens
        elif each.mark == START:
            channel, calls = "", without_calls and _TO in each.text
    return Answer(
        reasoning="\n".join(reasoning) or None,
        content="".join(content) if content else None,
        reasoning_tokens=tokens,
    )


def _joined(segments: Sequence[_Segment]) -> str:
    return "".join(each.shown + each.text for each in segments)
