"""Before any weight is loaded: every row is rendered, tokenized and measured, and those that can never run are found.

Large files are divided among processes of their own (`workers`): a row that crashes or hangs a tokenizer then costs that
row, not the job. What the rows become is not kept, only how long they are; the engine's next rows are made again from the
file while it works on others, which costs it nothing that can be measured.
"""

from __future__ import annotations

import json
import logging
import tempfile
from array import array
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple

import numpy as np

from flexmoe.errors import DataError
from flexmoe.inputs.request_file import Rows
from flexmoe.openai.fields import RowError
from flexmoe.params import EXPECTED_NEW_TOKENS
from flexmoe.prefixes.finder import PrefixFinder, PrefixTree
from flexmoe.prefixes.order import PrefixOrder
from flexmoe.preflight.lengths import Lengths, RowLength
from flexmoe.preflight.prepare import Preparer
from flexmoe.preflight.prepare_setup import PreparerSetup
from flexmoe.preflight.worker import Chunk, DividedLook, look
from flexmoe.progress import Counter
from flexmoe.system.machine import usable_cores
from flexmoe.text.chat_template import ENDLESS
from policies.common.option_names import option

log = logging.getLogger(__name__)
#: Rows and bytes that are looked at together.
_CHUNK_ROWS, _CHUNK_BYTES = 256, 2**20
#: Fewer rows than this are done before a worker has started.
_FEW_ROWS = 2000
_MOST_WORKERS = 16
_MEMORY_BYTES = 2**20
#: Each of them has taken seconds: with more, the template is at fault, and the other rows would take days.
_MOST_ENDLESS = 20


class Preflight:
    """What was found.

    Args:
        rows: rows of the job, numbered from 0.
        open_tokens: as `Lengths`.
        prefixes: find what prompts have in common, too.

    Attributes:
        lengths: of the rows that can run and were looked at.
        prefixes: what they have in common; None where that is not wanted, or not known yet.
        rows_refused: how many can never run.
    """

    def __init__(self, rows: int, open_tokens: int = EXPECTED_NEW_TOKENS, *, prefixes: bool = False) -> None:
        self.lengths = Lengths(rows, open_tokens)
        self.prefixes: PrefixTree | None = None
        self._finder = PrefixFinder() if prefixes else None
        self._first_prompt = array("l", [-1]) * rows
        self.rows_refused = self._endless = 0
        self._refused = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)

    def refuse(self, row: int, error: RowError) -> None:
        """The row can never run.

        Raises:
            DataError: the chat template does not come to an end on row after row.
        """
        self.rows_refused += 1
        self._endless += error.message.startswith(ENDLESS)
        if self._endless > _MOST_ENDLESS:
            raise DataError(
                f"{error.message}; so it was on {self._endless} rows: name another one with {option('chat_template')}"
            )
        self._refused.write(json.dumps([row, *astuple(error)]).encode() + b"\n")

    def refused(self) -> Iterator[tuple[int, RowError]]:
        """The rows that can never run, and why; in no order."""
        self._refused.seek(0)
        for line in self._refused:
            row, code, message, param = json.loads(line)
            yield row, RowError(code=code, message=message, param=param)

    def note(self, row: int, result: RowLength | RowError) -> None:
        """What became of a row."""
        if isinstance(result, RowError):
            self.refuse(row, result)
        else:
            self.lengths[row] = result
            self._note_digests(row, result.digests)

    def find_prefixes(self) -> None:
        """What the prompts have in common, once all are noted."""
        if self._finder is None:
            return
        finder, self._finder = self._finder, None
        self.prefixes = finder.find()
        finder.close()
        self.lengths.common = self.prefixes.means()
        if len(self.prefixes):
            tokens, shared = sum(self.lengths.prompt_tokens), self.prefixes.shared_tokens
            log.info("%d of %d prompt tokens begin a prompt as they begin an earlier one", shared, tokens)

    def prefix_ends(self, row: int, prompt: int) -> tuple[int, ...]:
        """Tokens up to which a prompt of a row is like others of the job, ascending."""
        first = self._first_prompt[row]
        return () if self.prefixes is None or first < 0 else self.prefixes.ends(first + prompt)

    def order(self) -> PrefixOrder | None:
        """The order that keeps rows with a common prefix together, several prompts of a row by the first of them."""
        if self.prefixes is None or not len(self.prefixes):
            return None
        first = np.frombuffer(self._first_prompt, dtype=np.dtype("l"))
        nodes = np.where(first >= 0, self.prefixes.nodes[first], -1)
        return PrefixOrder(self.prefixes, nodes, self.lengths.expected)

    def close(self) -> None:
        """Lets go of what was noted."""
        self._refused.close()
        if self._finder is not None:
            self._finder.close()

    def _note_digests(self, row: int, digests: Sequence[str]) -> None:
        if self._finder is not None and digests:
            self._first_prompt[row] = len(self._finder)
            for each in digests:
                self._finder.add(b64decode(each))


def preflight(
    rows: Rows,
    setup: PreparerSetup,
    *,
    preparer: Preparer | None = None,
    done: Callable[[int], bool] = lambda row: False,
    bar: bool = False,
    workers: int | None = None,
    open_tokens: int = EXPECTED_NEW_TOKENS,
    prefixes: bool = False,
) -> Preflight:
    """Looks at every row.

    Args:
        rows: of the job.
        setup: how requests are made of them.
        preparer: what `setup` makes, where it has been made already.
        done: rows that need no look.
        bar: show one; otherwise a line is logged now and then.
        workers: most processes; 0 does the work in this one. None: as many as there are cores, and 0 for a few rows.
        open_tokens: as `Lengths`.
        prefixes: find what the prompts have in common.

    Raises:
        DataError: the tokenizer or the chat template crashes or hangs again and again, or the file was changed.
        StorageError: the file cannot be read.
    """
    found = Preflight(len(rows), open_tokens, prefixes=prefixes)
    wanted = (row for row in range(len(rows)) if not done(row))
    count = _workers(len(rows)) if workers is None else workers
    with Counter(len(rows), "checking", bar=bar) as counter:
        for row, result in _looked_at(rows, wanted, setup, preparer, count, prefixes):
            found.note(row, result)
            counter.add()
    found.find_prefixes()
    return found


def _workers(rows: int) -> int:
    cores = min(usable_cores(), _MOST_WORKERS)
    return 0 if rows < _FEW_ROWS or cores == 1 else cores


def _looked_at(
    rows: Rows, wanted: Iterator[int], setup: PreparerSetup, preparer: Preparer | None, count: int, prefixes: bool
) -> Iterator[tuple[int, RowLength | RowError]]:
    chunks, parser = _chunks(rows, wanted), rows.requests.parser
    if count:
        yield from DividedLook(rows, setup, count, prefixes).run(chunks)
    else:
        preparer = preparer or setup.preparer()
        for chunk in chunks:
            yield from look(preparer, parser, chunk, prefixes)


def _chunks(rows: Rows, wanted: Iterator[int]) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for row in wanted:
        raw = rows.raw(row)
        chunk.append((row, raw))
        size += len(raw.data or b"")
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
