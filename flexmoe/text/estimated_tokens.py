"""How many tokens a text has, about, where there is no tokenizer to ask."""

from __future__ import annotations

from collections.abc import Sequence

#: About four bytes make a token of English in vocabularies of 32 K and more.
BYTES_PER_TOKEN = 4
#: What a chat template writes around a message, about.
CHAT_TOKENS = 4


class EstimatedTokens:
    """In the place of transformers' tokenizer in a `Tokenizer`: token ids that mean nothing, of about the right number.

    Attributes:
        texts: how many have been counted.
    """

    chat_template = "{% for m in messages %}{{ m['content'] }}" + " " * BYTES_PER_TOKEN * CHAT_TOKENS + "{% endfor %}"
    special_tokens_map: dict[str, str] = {}
    all_special_ids: tuple[int, ...] = ()
    eos_token_id = None

    def __init__(self) -> None:
        self.texts = 0

    def __call__(self, texts: Sequence[str], **_: object) -> dict[str, list[list[int]]]:
        """Ids of each text; a text that is no UTF-8 raises, as it does with a tokenizer."""
        self.texts += len(texts)
        return {"input_ids": [self.encode(text) for text in texts]}

    def encode(self, text: str, **_: object) -> list[int]:
        """Ids of a text, one at least: most tokenizers begin a text with a token of their own."""
        return [0] * max(1, -(-len(text.encode("utf-8")) // BYTES_PER_TOKEN))

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        """Nothing: the ids stand for no text."""
        return ""

    def get_chat_template(self, name: str | None = None) -> str:
        """A template that writes as much as most do."""
        return self.chat_template
