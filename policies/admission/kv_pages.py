"""How many KV pages a row holds: of layers that attend to all tokens, and of layers that look back through a window.

A page holds some tokens of a row in some layers that are alike, a group. Groups have equally many layers, so that pages of all
groups come from one pool and count alike. Layers with a window need no page that no query to come sees; while a run is
computed they hold what its first query sees, and the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """Pages of a row by its tokens.

    Args:
        page_tokens: tokens of a page.
        full: groups of layers that attend to all tokens.
        windowed: groups of layers that look back through the window.
        window: tokens that these see, the query's own included; of no meaning where there are none.
    """

    page_tokens: int
    full: int = 1
    windowed: int = 0
    window: int = 0

    def covering(self, tokens: int) -> int:
        """Pages of a group that tokens from the first one on lie in."""
        return -(-tokens // self.page_tokens)

    def first(self, past: int) -> int:
        """The first page of a windowed group that a run after ``past`` tokens sees."""
        return max(0, past - self.window + 1) // self.page_tokens

    @property
    def ring(self) -> int:
        """Pages of a windowed group that a row which decodes holds at most."""
        return self._spanned(1)

    def kept_from(self, tokens: int) -> int:
        """The first page of a windowed group that a row of so many tokens keeps between sweeps."""
        return max(0, self.covering(tokens) - self.ring)

    def run_from(self, past: int, run: int) -> int:
        """The first page of a windowed group that a row holds while a run after ``past`` tokens is computed: a row that decodes
        takes its oldest page for its newest."""
        return min(self.first(past), max(0, self.covering(past + run) - self.ring))

    def held(self, tokens: int) -> int:
        """Pages of a row of so many tokens between sweeps."""
        pages = self.covering(tokens)
        return self.full * pages + (self.windowed * min(pages, self.ring) if self.windowed else 0)

    def during(self, past: int, run: int) -> int:
        """Pages of a row while a run after ``past`` tokens is computed."""
        pages = self.covering(past + run)
        return self.full * pages + (self.windowed * (pages - self.run_from(past, run)) if self.windowed else 0)

    def before(self, tokens: int) -> int:
        """Pages that a run after so many tokens, whole pages, sees."""
        pages = self.covering(tokens)
        return self.full * pages + (self.windowed * (pages - self.first(tokens)) if self.windowed else 0)

    def shared(self, tokens: int) -> int:
        """Those of them that rows which begin after so many tokens go on seeing: of layers without a window."""
        return self.full * self.covering(tokens)

    def most(self, tokens: int, chunk: int) -> int:
        """Pages that a row of up to so many tokens holds at most, in runs of up to ``chunk`` tokens."""
        pages = self.covering(tokens)
        return self.full * pages + (self.windowed * min(pages, self._spanned(chunk)) if self.windowed else 0)

    def seen(self, tokens: int, chunk: int) -> int:
        """Pages of one group that a run of up to ``chunk`` tokens of a row of up to so many sees at most."""
        pages = self.covering(tokens)
        return pages if self.full else min(pages, self._spanned(min(tokens, chunk)))

    def mean(self, tokens: float) -> float:
        """Pages of rows of so many tokens in the mean, the part of a page that is empty counted among them."""
        pages = tokens / self.page_tokens
        return self.full * pages + (self.windowed * min(pages, self.ring) if self.windowed else 0)

    def entering(self, prompt: float, tokens: int) -> float:
        """Pages that prompts hold only while they are computed, so many tokens of them in a sweep."""
        if not self.windowed:
            return 0.0
        chunk = min(prompt, tokens)
        beyond = min(prompt / self.page_tokens, self._spanned(ceil(chunk))) - self.ring
        return self.windowed * max(0.0, beyond) * tokens / chunk

    def longest_row(self, pages: int, chunk: int, limit: int = 1 << 40) -> int:
        """Tokens of the longest row that so many pages hold, in runs of up to ``chunk`` tokens; at most ``limit``."""
        if not self.windowed:
            return min(limit, pages // self.full * self.page_tokens)
        low, high = 0, limit // self.page_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.most(middle * self.page_tokens, chunk) <= pages else (low, middle - 1)
        return low * self.page_tokens

    def _spanned(self, chunk: int) -> int:
        """Pages that the tokens which a run of so many sees lie in at most, its own included."""
        return self.covering(max(1, self.window) + chunk - 2) + 1
