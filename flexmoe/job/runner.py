"""The rows of a job on their way through the engine: from the file into `stream`, and from there into the journal.

Whatever ends the stream, all finished rows are in the journal; what the rows in flight have generated follows every few
minutes, when the job is asked to stop, and where possible when something fails.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from flexmoe.inputs.request_file import Rows
from flexmoe.job.journal import Journal
from flexmoe.job.remaining import Remaining
from flexmoe.openai.batch_line import Request
from flexmoe.openai.fields import RowError
from flexmoe.openai.response import ResponseEncoder, count_tokens
from flexmoe.outputs import RequestOutput
from flexmoe.params import EngineRequest, InFlight, Resumed
from flexmoe.preflight.preflight import Preflight
from flexmoe.preflight.prepare import Preparer
from flexmoe.progress import Left, Progress
from flexmoe.system.interrupts import Interrupted, Interrupts
from policies.admission.order import WINDOW_BLOCKS, longest_first

log = logging.getLogger(__name__)
CHECKPOINT_INTERVAL_S = 300.0
_BLOCK_ROWS, _PREPARED_ROWS = 64, 32


class Room(Protocol):
    """What a job has to know of an engine before its rows run there."""

    def check(self, request: EngineRequest) -> str | None:
        """Why this request can never run, as a sentence; None when it can."""

    @property
    def largest_row_tokens(self) -> int:
        """Tokens of the longest prompt with its completion that there is room for."""


class Engine(Room, Protocol):
    """What a job needs of `flexmoe.LLM`."""

    def stream(
        self, requests: Iterable[EngineRequest], on_sweep: Callable[[], None] | None = None
    ) -> Iterator[RequestOutput]:
        """Pulls requests lazily, yields each one's result once, in any order, and calls ``on_sweep`` after every sweep."""

    def in_flight(self) -> list[InFlight]:
        """What unfinished requests have generated; after a stream that failed, what they had when it did."""

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt tokens computed and tokens generated, ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How a job is run; nothing here changes what it makes.

    Args:
        checkpoint_interval_s: seconds between two writes of what the rows in flight have generated.
        bar: show one.
        clock: seconds.
    """

    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    bar: bool = False
    clock: Callable[[], float] = time.monotonic


@dataclass(slots=True)
class _Waiting:
    """A row that the engine has: what its output line needs, and the prompts that are back."""

    request: Request
    missing: int
    results: dict[int, RequestOutput] = field(default_factory=dict)


class RowStream:
    """Runs the rows that are left.

    Args:
        rows: of the job.
        found: what the pre-flight found.
        journal: what has been done; it gets what is done now.
        preparer: makes engine requests of rows.
        encoder: makes lines of results.
        interrupts: what may ask the job to stop.
    """

    def __init__(
        self,
        rows: Rows,
        found: Preflight,
        journal: Journal,
        preparer: Preparer,
        encoder: ResponseEncoder,
        options: StreamOptions,
        interrupts: Interrupts,
    ) -> None:
        self._rows, self._found, self._journal = rows, found, journal
        self._preparer, self._encoder = preparer, encoder
        self._options, self._interrupts = options, interrupts
        self._waiting: dict[int, _Waiting] = {}
        self._remaining = Remaining(found.lengths, journal.recovered_tokens)
        self._computed = 0, 0

    @property
    def rows_left(self) -> int:
        """Rows that have no line yet."""
        return len(self._rows) - self._journal.rows_done

    def refuse_rows(self) -> None:
        """Makes error rows of those that the pre-flight refused, before any work is done for the others."""
        before = self._journal.rows_failed
        for row, error in self._found.refused():
            self._fail(row, self._rows[row], error, status=400)
        self._tell_refused(before)

    def run(self, engine: Engine, block_rows: int | None = None, watch: Callable[[], str | None] | None = None) -> None:
        """Runs what is left.

        Args:
            block_rows: rows that are in flight together; the windows of the order of work follow from it.
            watch: called after every sweep; a sentence that it returns is told beside the progress.

        Raises:
            Interrupted: the job was asked to stop. What has been done is kept, as it is after any other error.
            DataError: the input was changed.
            StorageError: the disk is full, or failed.
        """
        requests, options = self.begin(engine, block_rows), self._options
        done = self._journal.rows_done
        progress = Progress(len(self._rows), done, bar=options.bar, left=self.left, clock=options.clock)
        sweeps = _Sweeps(self, engine, progress, self._interrupts, options, watch)
        with contextlib.closing(progress), self._interrupts.put_off():
            stream = engine.stream(requests, sweeps.end)
            try:
                for result in stream:
                    if self.take(result):
                        progress.row()
            except Interrupted:
                raise
            except Exception:
                self._keep_what_was_in_flight(engine)
                raise
            finally:
                if hasattr(stream, "close"):
                    stream.close()
        if self.rows_left:
            raise RuntimeError(f"the engine's stream ended with {self.rows_left} rows unanswered")

    def begin(self, engine: Room, block_rows: int | None = None) -> Iterator[EngineRequest]:
        """What is left as requests, for who drives the engine himself: he gives each result to `take`.

        Args:
            engine: what it has no room for becomes error rows now.
            block_rows: as in `run`.
        """
        self.refuse_without_room(engine)
        return self._pull(block_rows or _BLOCK_ROWS)

    def give_up(self, error: RowError) -> None:
        """Makes error rows of all that have no line yet; none of them may be in the engine any longer."""
        self._waiting.clear()
        rows = [row for row in range(len(self._rows)) if row not in self._journal]
        for row in rows:
            line = self._encoder.failure(self._rows[row], error, status=None)
            self._journal.finish(row, line, failed=True)
            self._remaining.finish(row, None)
        log.info("%d rows have an error line each: %s", len(rows), error.message)

    def checkpoint(self, in_flight: Iterable[InFlight]) -> None:
        """Keeps what the rows in flight have generated, those of their prompts that are back included."""
        states = itertools.chain(in_flight, self._back())
        self._journal.checkpoint((*_place(state.request_id), state) for state in states)

    def count(self, prompt_tokens: int, generated_tokens: int) -> None:
        """So many tokens have been computed by now."""
        self._computed = prompt_tokens, generated_tokens

    def done(self) -> str:
        """How far the job is, in words."""
        return f"{self._journal.rows_done} of {len(self._rows)} rows are done"

    def left(self) -> Left:
        """Tokens that are left to compute."""
        return self._remaining.left(*self._computed)

    def refuse_without_room(self, engine: Room) -> None:
        """Longer than any memory tier can hold is known only now; such a row must not wait for ever.

        Who runs the rest of the rows in another engine calls it again.
        """
        room, before = engine.largest_row_tokens, self._journal.rows_failed
        for row, needed in enumerate(self._found.lengths.needed):
            # The last token of a row never enters the cache.
            if needed - 1 <= room or row in self._journal:
                continue
            request = self._rows[row]
            parts = self._preparer.prepare(request, row)
            if isinstance(parts, RowError):
                self._fail(row, request, parts, status=400)
            elif reason := next(filter(None, map(engine.check, parts)), None):
                self._fail(row, request, RowError(code="cannot_run", message=reason), status=400)
        self._tell_refused(before)

    def _tell_refused(self, before: int) -> None:
        refused = self._journal.rows_failed - before
        if refused:
            log.warning("%d of %d rows cannot run; the error file says why", refused, len(self._rows))

    def _order(self, block_rows: int) -> Iterator[int]:
        """The rows that are left: those that have been begun, then those of each window that generate most; rows with a long prefix in common
        are together."""
        begun = self._journal.partial_rows
        known, length = set(begun), self._found.lengths.expected
        others = (row for row in range(len(self._rows)) if row not in self._journal and row not in known)
        window, order = WINDOW_BLOCKS * block_rows, self._found.order()
        waiting = longest_first(others, length, window) if order is None else order.waiting(list(others), window)
        return itertools.chain(longest_first(begun, length, len(begun) or 1), waiting)

    def _pull(self, block_rows: int) -> Iterator[EngineRequest]:
        for row, request, parts in self._prepared(block_rows):
            if row in self._journal:  # refused since it was put in order
                continue
            if isinstance(parts, RowError):  # only where a template or a tokenizer does not do the same twice
                self._fail(row, request, parts, status=400)
                continue
            # The prompts come back with the results: waiting rows need not hold their texts.
            self._waiting[row] = _Waiting(request.without_prompt(), len(parts))
            yield from self._resumed(row, parts)

    def _prepared(self, block_rows: int) -> Iterator[tuple[int, Request, list[EngineRequest] | RowError]]:
        """The rows that are left, a few at a time: tokenized together they take half the time, which the engine waits."""
        order = self._order(block_rows)
        while rows := [(row, self._rows[row]) for row in itertools.islice(order, _PREPARED_ROWS)]:
            for (row, request), parts in zip(rows, self._preparer.prepare_all(rows), strict=True):
                yield row, request, parts

    def _resumed(self, row: int, parts: list[EngineRequest]) -> Iterator[EngineRequest]:
        """The row's requests, with what was generated of them before."""
        before = self._journal.take_partial(row)
        for prompt, part in enumerate(parts):
            part = replace(part, prefix_ends=self._found.prefix_ends(row, prompt))
            samples = [before.get((prompt, sample)) for sample in range(part.params.n)]
            if any(samples):
                states = tuple(Resumed() if sample is None else sample.resumed() for sample in samples)
                part = replace(part, resumed=states)
            yield part

    def _back(self) -> Iterator[InFlight]:
        """The samples of prompts that are back, while others of their rows are not."""
        for waiting in self._waiting.values():
            for result in waiting.results.values():
                for output in result.outputs:
                    logprobs = None if output.logprobs is None else list(output.logprobs)
                    ids = list(output.token_ids)
                    yield InFlight(request_id=result.request_id, index=output.index, token_ids=ids, logprobs=logprobs)

    def take(self, result: RequestOutput) -> bool:
        """Takes a prompt's result; returns whether its row is finished with it."""
        row, prompt = _place(result.request_id)
        waiting = self._waiting[row]
        waiting.results[prompt] = result
        if len(waiting.results) < waiting.missing:
            return False
        del self._waiting[row]
        results = [waiting.results[index] for index in range(waiting.missing)]
        failed = next((r for r in results if r.error is not None), None)
        if failed is not None and failed.error is not None:
            self._fail(
                row,
                waiting.request,
                RowError(code=failed.error_code or "engine_error", message=failed.error),
                status=None,
            )
        else:
            self._succeed(row, waiting.request, results)
        return True

    def _fail(self, row: int, request: Request, error: RowError, *, status: int | None) -> None:
        log.info("row %s (line %d) failed: %s", request.custom_id, request.line_number, error.message)
        self._journal.finish(row, self._encoder.failure(request, error, status=status), failed=True)
        self._remaining.finish(row, None)

    def _succeed(self, row: int, request: Request, results: list[RequestOutput]) -> None:
        prompt_tokens, generated_tokens = count_tokens(results)
        line = self._encoder.success(request, results)
        self._journal.finish(row, line, prompt_tokens=prompt_tokens, generated_tokens=generated_tokens)
        self._remaining.finish(row, generated_tokens)

    def _keep_what_was_in_flight(self, engine: Engine) -> None:
        """On the way out of a failure: it spares the tokens since the last checkpoint, where that can be done."""
        try:
            self.checkpoint(engine.in_flight())
        except Exception as error:  # noqa: BLE001 - the failure that led here is the one to report
            log.warning("what the rows in flight have generated could not be kept: %s", error)


class _Sweeps:
    """What is done after every sweep."""

    def __init__(
        self,
        rows: RowStream,
        engine: Engine,
        progress: Progress,
        interrupts: Interrupts,
        options: StreamOptions,
        watch: Callable[[], str | None] | None,
    ) -> None:
        self._watch = watch
        self._rows, self._engine, self._progress, self._interrupts = rows, engine, progress, interrupts
        self._interval_s, self._clock = options.checkpoint_interval_s, options.clock
        self._checkpoint_s = options.clock()
        self._before = self._last = engine.tokens

    def end(self) -> None:
        """A sweep is over, and the rows that finished in it have their lines.

        Raises:
            Interrupted: the job was asked to stop.
        """
        now, last, before = self._engine.tokens, self._last, self._before
        self._last = now
        self._rows.count(now[0] - before[0], now[1] - before[1])
        self._progress.sweep(now[0] - last[0], now[1] - last[1])
        if self._watch is not None and (sentence := self._watch()) is not None:
            self._progress.tell(sentence)
        if self._interrupts.pending is not None and self._rows.rows_left:
            self._rows.checkpoint(self._engine.in_flight())
            raise Interrupted(self._interrupts.pending, self._rows.done())
        if self._clock() - self._checkpoint_s >= self._interval_s:
            self._rows.checkpoint(self._engine.in_flight())
            self._checkpoint_s = self._clock()


def _place(request_id: str) -> tuple[int, int]:
    """Row and prompt of a request."""
    row, prompt = request_id.split("/")
    return int(row), int(prompt)
