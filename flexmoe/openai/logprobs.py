"""Log-probabilities as OpenAI's two endpoints report them.

They cover every id that was generated, as in vLLM: the one that ended the completion too, and those behind a stop string.
Impossible tokens have -9999, since JSON has no infinity.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexmoe.outputs import CompletionOutput, RequestOutput, TokenLogprob
from flexmoe.text.tokenizer import Tokenizer

LEAST = -9999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The texts in which tokens lie.

    Args:
        prompt: what is echoed before the completion; "" for nothing.
        text: the completion.
        special: special tokens are part of it.
    """

    prompt: str
    text: str
    special: bool = False


def chat_logprobs(tokenizer: Tokenizer, output: CompletionOutput) -> dict[str, Any] | None:
    """`logprobs` of a chat's choice; None where none were asked."""
    if output.logprobs is None:
        return None
    content = []
    for entry in output.logprobs:
        top = [_chat_token(tokenizer, token, logprob) for token, logprob in entry.top]
        content.append(_chat_token(tokenizer, entry.token_id, entry.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, output: CompletionOutput, alignment: Alignment, echoed: RequestOutput | None
) -> dict[str, Any] | None:
    """`logprobs` of a completion's choice; None where none were asked.

    Args:
        echoed: whose prompt comes before the completion; None for nobody's. The first token of a prompt follows nothing
            and has null for its log-probability.
    """
    if output.logprobs is None:
        return None
    entries: list[TokenLogprob | None] = list(output.logprobs)
    ids, text = list(output.token_ids), alignment.text
    offsets = _offsets(tokenizer, ids, len(alignment.prompt), text, special=alignment.special)
    if echoed is not None:
        prompt_ids = echoed.prompt_token_ids
        entries = [None, *(echoed.prompt_logprobs or ()), *entries]
        offsets = _offsets(tokenizer, prompt_ids, 0, alignment.prompt) + offsets
        ids = [*prompt_ids, *ids]
    return {
        "tokens": [tokenizer.token_text(token).text for token in ids],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top(tokenizer, entry) for entry in entries],
        "text_offset": offsets,
    }


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    shown = tokenizer.token_text(token)
    return {
        "token": shown.text,
        "logprob": _finite(logprob),
        "bytes": None if shown.bytes is None else list(shown.bytes),
    }


def _top(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    """The most probable tokens by their text, the one that stands there among them; of equal texts the best counts."""
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        top.setdefault(tokenizer.token_text(token).text, _finite(logprob))
    return top


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)


def _offsets(
    tokenizer: Tokenizer, token_ids: Sequence[int], start: int, text: str, *, special: bool = False
) -> list[int]:
    """Where in the choice's text each token begins, in characters; `text` is theirs, and begins at `start`."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, characters, visible = [], 0, []
    for token in token_ids:
        shown = tokenizer.token_text(token)
        piece_bytes = shown.bytes if (shown.visible or special) and shown.bytes else b""
        if piece_bytes and decoder.getstate()[0] and not _continues(piece_bytes):
            # The character that was begun is none: its place is that of the tokens before.
            piece = decoder.decode(b"", final=True)
            visible.append(piece)
            characters += len(piece)
        offsets.append(characters)
        if piece_bytes:
            piece = decoder.decode(piece_bytes)
            visible.append(piece)
            characters += len(piece)
    joined = "".join(visible)
    # Tokenizers that begin words with a space drop it where a text begins.
    dropped = int(joined.startswith(" ") and joined[1:] == text)
    return [start + min(max(offset - dropped, 0), len(text)) for offset in offsets]


def _continues(piece: bytes) -> bool:
    """Whether bytes continue a character of UTF-8 that was begun before."""
    return piece[0] & 0xC0 == 0x80
