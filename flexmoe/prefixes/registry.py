"""The prefixes of the rows that an engine has, by the tokens themselves: rows share pages only where all of them are equal."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from policies.admission.row_state import Prefix
from policies.admission.shared_prefix import shared_tokens

#: Unused prefixes are forgotten when there are twice as many as were in use, and so many at least.
_FEWEST = 1024


class PrefixRegistry:
    """Finds the prefix of a row that begins as others do.

    Args:
        page_tokens: tokens of a page.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens, self._most = page_tokens, _FEWEST
        self._known: dict[tuple[Prefix[Any] | None, bool, bytes], Prefix[Any]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, prompt: Sequence[int], ends: Iterable[int], past: bool = False) -> Prefix[Any] | None:
        """The longest prefix of a prompt; those that nobody has had before are new.

        Args:
            prompt: token ids.
            ends: tokens up to which others may begin alike. Whether they do, the tokens say.
            past: the row's keys are rotated as those of longer rows, so that it has nothing in common with shorter ones.

        Returns:
            Prefix | None: None where no page can be shared.
        """
        self._forget()
        most, prefix, begin = shared_tokens(len(prompt), self._page_tokens), None, 0
        for end in sorted({min(end, most) // self._page_tokens * self._page_tokens for end in ends}):
            if end > begin:
                key = prefix, past, array("q", prompt[begin:end]).tobytes()
                found = self._known.get(key)
                if found is None:
                    found = self._known[key] = Prefix(tokens=end, parent=prefix)
                prefix, begin = found, end
        return prefix

    def _forget(self) -> None:
        if len(self._known) > self._most:
            # A prefix is in use as long as a longer one is, so nothing that stays loses what it follows.
            self._known = {key: prefix for key, prefix in self._known.items() if prefix.wanted or prefix.copies}
            self._most = max(_FEWEST, 2 * len(self._known))
