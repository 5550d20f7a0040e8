"""What token ids say: in a row, and each by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """One token by itself.

    Args:
        text: what it adds to a text. Part of a character has no text of its own and is written as OpenAI does, for
            example `bytes:\\xe6\\x97`; a special token as the vocabulary has it; an unknown one as `token_id:7`.
        bytes: its UTF-8 bytes; None for an unknown one.
        visible: whether it is part of a completion's text: special tokens are not.
    """

    text: str
    bytes: bytes | None
    visible: bool

    @classmethod
    def unknown(cls, token_id: int) -> TokenText:
        """A token that the tokenizer does not know; the text is vLLM's."""
        return cls(text=f"token_id:{token_id}", bytes=None, visible=False)


class TokenTexts:
    """Texts of the ids of one tokenizer.

    Args:
        backend: a transformers tokenizer.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        added = getattr(backend, "added_tokens_decoder", {}).items()  # mistral's own tokenizers have none
        self._special = frozenset((*backend.all_special_ids, *(id for id, token in added if token.special)))
        self._anchor, self._anchor_text = self._find_anchor()
        self._tokens: dict[int, TokenText] = {}

    def beginning(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids with which a text begins."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def continuation(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text that ids add to a text before them."""
        text = self.beginning((*self._anchor, *token_ids), skip_special_tokens=skip_special_tokens)
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        # Where a decoder rewrites what came before, there is no such text: then they are read by themselves.
        return self.beginning(token_ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> TokenText:
        """One token by itself."""
        found = self._tokens.get(token_id)
        if found is None:
            found = self._tokens[token_id] = self._read(token_id)
        return found

    def _find_anchor(self) -> tuple[tuple[int, ...], str]:
        """A short text to decode before others, so that they are not the beginning."""
        for letter in "ax0":
            ids = tuple(self._backend.encode(letter, add_special_tokens=False))
            text = self.beginning(ids)
            if text.endswith(letter) and not self._special.intersection(ids):
                return ids, text
        return (), ""

    def _read(self, token_id: int) -> TokenText:
        piece = self._backend.convert_ids_to_tokens(token_id) if 0 <= token_id < len(self._backend) else None
        if piece is None:
            return TokenText.unknown(token_id)
        if token_id in self._special:
            return TokenText(text=piece, bytes=piece.encode("utf-8"), visible=False)
        text = self.continuation((token_id,))
        raw = text.encode("utf-8") if _REPLACEMENT not in text else _bytes_of(piece)
        if raw is None:
            raw = text.encode("utf-8")
        return TokenText(text=_as_text(raw), bytes=raw, visible=True)


def _as_text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a vocabulary's piece that stands for some; None where it does not."""
    found = _BYTE_PIECE.fullmatch(piece)
    if found:
        return bytes([int(found[1], 16)])
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for what follows U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
