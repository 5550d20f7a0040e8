"""A preflight divided among processes: both sides of it, the one that divides and the one that looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

from flexmoe.errors import DataError
from flexmoe.inputs.lines import RawRow
from flexmoe.inputs.parsers import Parser, parser_of
from flexmoe.inputs.request_file import Rows
from flexmoe.openai.fields import RowError
from flexmoe.preflight.lengths import RowLength
from flexmoe.preflight.prepare import Preparer
from flexmoe.preflight.prepare_setup import PreparerSetup
from flexmoe.preflight.worker_pool import Answer, Task, WorkerPool, serve
from policies.common.command_line import do_without_torch
from policies.common.option_names import are_flags, option, use_flags

Chunk = list[tuple[int, RawRow]]
Found = tuple[int, RowLength | RowError]

#: A chunk that takes longer is lost: its rows are tried one by one, and a row that takes longer is an error row.
_LIMIT_S, _BYTES_PER_S = 120.0, 50_000
#: More rows than this that crash or hang are a fault of the tokenizer, not of the rows.
_MOST_LOST = 10
#: The program of a worker.
WORKER = "flexmoe.preflight.worker"


def look(preparer: Preparer, parser: Parser, chunk: Chunk, prefixes: bool = False) -> Iterator[Found]:
    """The size of each row of a chunk, or why it cannot run; ``prefixes``: with the digests of its prompts."""
    context = preparer.limits.context
    requests = [(row, request) for row, raw in chunk if (request := raw.parse(parser)) is not None]
    for (row, _), result in zip(requests, preparer.prepare_each(requests), strict=True):
        yield row, result if isinstance(result, RowError) else RowLength.of(result, context, prefixes=prefixes)


class DividedLook:
    """Looks at rows in several processes; a chunk whose process was lost is tried again, row by row.

    Args:
        rows: of the job.
        setup: how requests are made of them.
        count: most processes.
        prefixes: as for `look`.
    """

    def __init__(self, rows: Rows, setup: PreparerSetup, count: int, prefixes: bool = False) -> None:
        self._rows, self._count = rows, count
        self._setup = {
            "preparer": setup.to_json(),
            "parser": rows.requests.parser.setup(),
            "flags": are_flags(),
            "prefixes": prefixes,
        }
        self._again: list[Chunk] = []
        self._lost: list[int] = []

    def run(self, chunks: Iterator[Chunk]) -> Iterator[Found]:
        """What `look` finds for every chunk, in any order.

        Raises:
            DataError: row after row crashes or hangs.
        """

        def next_task() -> Task | None:
            chunk = self._again.pop() if self._again else next(chunks, None)
            return None if chunk is None else _task(chunk)

        with WorkerPool(WORKER, self._setup, self._count) as pool:
            for answer in pool.run(next_task):
                if answer.lost is None:
                    yield from map(_unpacked, answer.result)
                else:
                    yield from self._retry(answer)

    def _retry(self, answer: Answer) -> Iterator[Found]:
        rows = [row for row, _ in answer.task.work]
        if len(rows) > 1:
            self._again += [[(row, self._rows.raw(row))] for row in reversed(rows)]
            return
        [row] = rows
        self._lost.append(self._rows.raw(row).number)
        if len(self._lost) > _MOST_LOST:
            listed = ", ".join(map(str, self._lost))
            raise DataError(
                f"row after row cannot be tokenized (lines {listed}: {answer.lost}); look at these rows, or name another "
                f"template with {option('chat_template')}"
            )
        yield row, RowError(code="invalid_prompt", message=f"the prompt cannot be tokenized: {answer.lost}")


def _task(chunk: Chunk) -> Task:
    size = sum(len(raw.data or b"") for _, raw in chunk)
    return Task(work=[[row, raw.packed()] for row, raw in chunk], limit_s=_LIMIT_S + size / _BYTES_PER_S)


def _packed(found: Found) -> list[Any]:
    row, result = found
    return [row, isinstance(result, RowError), *astuple(result)]


def _unpacked(values: list[Any]) -> Found:
    row, refused, *rest = values
    kind = RowError if refused else RowLength
    return row, kind(**dict(zip(kind.__dataclass_fields__, rest, strict=True)))


def start(setup: dict[str, Any]) -> Callable[[Any], Any]:
    """A worker's part: from its setup to what does a chunk."""
    use_flags(setup["flags"])
    preparer = PreparerSetup.of_json(setup["preparer"]).preparer()
    parser, prefixes = parser_of(setup["parser"]), setup["prefixes"]
    return lambda work: [
        _packed(found) for found in look(preparer, parser, [(row, RawRow.unpacked(raw)) for row, raw in work], prefixes)
    ]


if __name__ == "__main__":
    do_without_torch()
    serve(start)
