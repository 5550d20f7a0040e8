"""How far a job is and how fast it goes: a bar on a terminal, a line now and then elsewhere.

Rows are a poor measure of what is left, because the longest come first: the estimate is made of tokens.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

log = logging.getLogger(__name__)
LOG_INTERVAL_S = 30.0
#: Rates called recent are of so many seconds.
_RECENT_S = 60.0
_DRAW_INTERVAL_S = 0.5
#: A line that `Steps` logs.
_STEP_LINE = re.compile(r", step (\d+) of (\d+): (.+)$")
_STEPS_BAR = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} rows [{elapsed}{postfix}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is still to be done, in tokens; completions count as what they are expected to be."""

    prompt_tokens: float
    generated_tokens: float


class Rates:
    """Tokens per second, since the beginning and recently.

    Args:
        clock: seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self.prompt_tokens = self.generated_tokens = 0
        self._marks: deque[tuple[float, int, int]] = deque([(self._start, 0, 0)])

    def add(self, prompt_tokens: int, generated_tokens: int) -> None:
        """Counts a sweep."""
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens
        now = self._clock()
        if now - self._marks[-1][0] >= 1:
            self._marks.append((now, self.prompt_tokens, self.generated_tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _RECENT_S:
            self._marks.popleft()

    def whole(self) -> tuple[float, float]:
        """Prompt and generated tokens per second since the beginning."""
        return self._since(self._start, 0, 0)

    def recent(self) -> tuple[float, float]:
        """The same of the last minute, or of all where the job is younger."""
        return self._since(*self._marks[0])

    def seconds_left(self, left: Left) -> float | None:
        """Seconds that the rest takes at the recent rates; None while there are none.

        Prompts and completions are computed side by side, so that the one that takes longer decides.
        """
        times: list[float] = []
        for tokens, recent, whole in zip((left.prompt_tokens, left.generated_tokens), self.recent(), self.whole()):
            rate = recent or whole
            if tokens > 0 and not rate:
                return None
            if tokens > 0:
                times.append(tokens / rate)
        return max(times, default=0.0)

    def _since(self, start: float, prompt_tokens: int, generated_tokens: int) -> tuple[float, float]:
        seconds = max(self._clock() - start, 1e-9)
        return (self.prompt_tokens - prompt_tokens) / seconds, (self.generated_tokens - generated_tokens) / seconds


class Progress:
    """Shows a job's progress on stderr.

    Args:
        rows: rows of the job.
        done: rows that are finished already.
        bar: draw a bar; otherwise a line is logged every `LOG_INTERVAL_S`.
        left: asked for what is left whenever something is shown; None: nobody knows.
        what: names the bar.
        clock: seconds.
    """

    def __init__(
        self,
        rows: int,
        done: int,
        *,
        bar: bool,
        left: Callable[[], Left] | None,
        what: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rates = Rates(clock)
        self._rows, self._done, self._left, self._clock = rows, done, left, clock
        self._logged = clock()
        # With miniters=0 it draws between rows too: a sweep of a large model takes minutes.
        self._bar = _tqdm(rows, done, desc=what, miniters=0, mininterval=_DRAW_INTERVAL_S) if bar else None

    def row(self) -> None:
        """A row is finished."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)

    def sweep(self, prompt_tokens: int, generated_tokens: int) -> None:
        """A sweep is over."""
        self.rates.add(prompt_tokens, generated_tokens)
        if self._bar is not None:
            self._bar.set_postfix_str(self.describe(), refresh=False)
            self._bar.update(0)  # draws, unless it did a moment ago
        elif self._clock() - self._logged >= LOG_INTERVAL_S:
            self._logged = self._clock()
            log.info("%d of %d rows, %s", self._done, self._rows, self.describe())

    def tell(self, line: str) -> None:
        """A line that stays: above the bar, or in the log."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            log.info("%s", line)

    def describe(self) -> str:
        """How long the rest will take, which a narrow terminal must not cut off, and the rates (recent ones, and overall)."""
        (prompt, generated), (all_prompt, all_generated) = self.rates.recent(), self.rates.whole()
        if self._left is None:
            return f"in {all_prompt:.0f} out {all_generated:.1f} token/s"
        seconds = self.rates.seconds_left(self._left())
        return (
            f"{'?' if seconds is None else duration(seconds)} left, "
            f"in {prompt:.0f} out {generated:.1f} token/s of late ({all_prompt:.0f} and {all_generated:.1f} in all)"
        )

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class Counter:
    """Counts the rows of something short: a bar that goes away, or a line every `LOG_INTERVAL_S`.

    Args:
        rows: how many there are.
        what: is done to them.
        bar: draw a bar.
    """

    def __init__(self, rows: int, what: str, *, bar: bool) -> None:
        self._rows, self._what, self._done, self._logged = rows, what, 0, time.monotonic()
        self._bar = _tqdm(rows, 0, desc=what, leave=False, bar_format=None) if bar else None

    def add(self) -> None:
        """One more row."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)
        elif time.monotonic() - self._logged >= LOG_INTERVAL_S:
            self._logged = time.monotonic()
            log.info("%s: %d of %d rows", self._what, self._done, self._rows)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Volume:
    """Shows how much of something has been written, and how long the rest takes: a bar, or a line every `LOG_INTERVAL_S`.

    Args:
        total_bytes: all of it.
        done_bytes: what was there before.
        what: is done, for example "quantizing".
        bar: draw a bar.
        clock: seconds.
    """

    def __init__(
        self,
        total_bytes: int,
        done_bytes: int,
        what: str,
        *,
        bar: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._before, self._done, self._what, self._clock = (
            total_bytes,
            done_bytes,
            done_bytes,
            what,
            clock,
        )
        self._start = self._logged = clock()
        size = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
        self._bar = _tqdm(total_bytes, done_bytes, desc=what, leave=False, bar_format=None, **size) if bar else None

    def add(self, nbytes: int) -> None:
        """So many bytes more."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif self._clock() - self._logged >= LOG_INTERVAL_S:
            self._logged = self._clock()
            log.info("%s: %s", self._what, self.describe())

    def describe(self) -> str:
        """Share, rate, and how long the rest will take."""
        rate = (self._done - self._before) / max(self._clock() - self._start, 1e-9)
        left = duration((self._total - self._done) / rate) if rate else "?"
        share = 100 * self._done / max(1, self._total)
        return f"{share:.0f} % of {self._total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, {left} left"

    def __enter__(self) -> Volume:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """``1 d 02:03:04``, ``2:03:04`` or ``3:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Steps:
    """Names the steps of something that takes a minute: beside a bar, or in a line each.

    Args:
        what: they are steps of.
        bar: draw a bar.
    """

    def __init__(self, what: str, *, bar: bool) -> None:
        self._what, self._shows_bar = what, bar
        self._bar: Any = None

    def begin(self, number: int, total: int, name: str) -> None:
        """A step begins.

        Args:
            number: its place, from 1.
            total: how many there are.
        """
        if not self._shows_bar:
            log.info("%s, step %d of %d: %s", self._what, number, total, name)
            return
        if self._bar is None:
            self._bar = _tqdm(total, 0, desc=self._what, unit="step", leave=False, bar_format=_STEPS_BAR)
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.n = number - 1
        self._bar.refresh()

    def relay(self, line: str) -> None:
        """A line of another process: shows the step, if it names one."""
        if found := _STEP_LINE.search(line):
            self.begin(int(found[1]), int(found[2]), found[3])

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _tqdm(rows: int, done: int, **options: Any) -> Any:
    from tqdm import tqdm

    # A terminal that does not know its size says 0, and tqdm would draw nothing.
    size = _size(sys.stderr)
    columns, lines = shutil.get_terminal_size() if size is not None and 0 in size else (None, None)
    given = {"unit": "row", "bar_format": _BAR, "ncols": columns, "nrows": lines, **options}
    return tqdm(total=rows, initial=done, file=sys.stderr, **given)


def _size(stream: TextIO) -> os.terminal_size | None:
    """Columns and lines of a terminal, 0 where it does not know; None of what is no terminal."""
    try:
        return os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return None
