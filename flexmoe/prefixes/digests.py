"""Digests of the beginnings of a prompt, one for each whole page that others may have in common with it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from cost_model.memory.allocation import PAGE_TOKENS
from policies.admission.shared_prefix import shared_tokens

#: Bytes of a digest.
DIGEST_BYTES = 8


def page_digests(prompt: Sequence[int], page_tokens: int = PAGE_TOKENS) -> bytes:
    """Of the first page, of the first two pages, and so on: as long as all that a row with this prompt could begin after.

    Equal beginnings have equal digests. Others have different ones as good as always, but who shares pages compares tokens.
    """
    rolling, digests = hashlib.blake2b(digest_size=DIGEST_BYTES), []
    for at in range(0, shared_tokens(len(prompt), page_tokens), page_tokens):
        rolling.update(array("q", prompt[at : at + page_tokens]).tobytes())
        digests.append(rolling.digest())
    return b"".join(digests)
