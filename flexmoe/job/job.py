"""A batch job: rows of requests in, OpenAI Batch output lines in input order out, and nothing lost on the way.

    with Job(files, setup, identity) as job:    # the input is checked, the work directory held
        if job.report is None:                  # else it was finished before
            measured = job.look()               # every row tokenized and measured; those that cannot run refused
            job.run(llm)                        # or the part of it that is left
            report = job.publish()

Whatever ends it in between, the same calls resume it (`workspace`, `journal`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexmoe.errors import UsageError
from flexmoe.inputs.options import InputOptions, open_requests
from flexmoe.inputs.request_file import Rows
from flexmoe.job.identity import versions
from flexmoe.job.journal import Journal
from flexmoe.job.manifest import Finished, Manifest
from flexmoe.job.output_files import PathLike, publish, remove, resolve_outputs
from flexmoe.job.remaining import open_tokens
from flexmoe.job.result import JobResult
from flexmoe.job.runner import Engine, RowStream, StreamOptions
from flexmoe.job.shards import Shard
from flexmoe.job.workspace import Workspace
from flexmoe.openai.response import ResponseEncoder, creation_time_s
from flexmoe.preflight.lengths import Lengths, Measured
from flexmoe.preflight.preflight import Preflight, preflight
from flexmoe.preflight.prepare import Preparer
from flexmoe.preflight.prepare_setup import PreparerSetup
from flexmoe.system.interrupts import Interrupts
from flexmoe.text.tokenizer import Tokenizer

#: What is told whether or not the user asks for a log.
log = logging.getLogger("flexmoe.progress")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFiles:
    """What a job reads and writes.

    Args:
        input: a file of requests, a dataset's directory or its name.
        output: rows that succeeded, in input order; replaced as a whole at the end, or not at all. That of a shard gets
            the shard's name.
        errors: rows that failed; None means beside the output.
        shard: the part of the input that is this job's.
        options: how the input is read.
        overwrite: start a new job where files or another job are; the old output is kept until the new job has made progress.
    """

    input: PathLike
    output: PathLike
    errors: PathLike | None = None
    shard: Shard | None = None
    options: InputOptions = field(default_factory=InputOptions)
    overwrite: bool = False

    def outputs(self) -> tuple[Path, Path]:
        """The final paths of the output and of the error file.

        Raises:
            UsageError, StorageError: they cannot be used.
        """
        output = Path(self.output) if self.shard is None else self.shard.path(Path(self.output))
        return resolve_outputs(Path(self.input), output, self.errors)

    def row_numbers(self, total: int) -> range:
        """The numbers of the job's rows, of ``total`` in the input."""
        return range(total) if self.shard is None else self.shard.rows(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How far a job is. Tokens are those of the rows that did not fail."""

    rows: int
    ok: int
    failed: int
    prompt_tokens: int
    generated_tokens: int


class Job:
    """A job that this process holds until `close`; a context manager.

    Args:
        files: its files.
        setup: how requests are made of rows.
        identity: what decides the completions, beside the input: a job that was begun with another one is not resumed.
        model_name: reported for rows that name no model.
        choices: values of flags behind the identity, for the message of a refusal (`Manifest.choices`).
        keep_reasoning: leave what a model thinks in the content of its answers.
        stream: how it is run.
        interrupts: what may ask it to stop.
        prefix_caching: find what prompts have in common, and run rows that begin alike together.

    Attributes:
        report: of the job when it was finished before; else None.
        tokenizer: of its rows, once `look` has needed it.

    Raises:
        UsageError: files are the same or there already, flags are others than those the job was begun with, or another
            run holds it.
        InputMissingError: there is no such input.
        DataError: the input is malformed, or is not what the job was begun with.
        StorageError: something cannot be read or written.
    """

    def __init__(
        self,
        files: JobFiles,
        setup: PreparerSetup,
        identity: Mapping[str, Any] | None = None,
        *,
        model_name: str = "flexmoe",
        choices: Mapping[str, str] | None = None,
        keep_reasoning: bool = False,
        stream: StreamOptions | None = None,
        interrupts: Interrupts | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self._prefix_caching = prefix_caching
        self._start_s, self._now = time.monotonic(), creation_time_s()
        self._files, self._stream_options = files, stream or StreamOptions(bar=sys.stderr.isatty())
        self._interrupts = interrupts or Interrupts()
        self._keep_reasoning = keep_reasoning
        self._parts = contextlib.ExitStack()
        self._output, self._errors = files.outputs()
        try:
            requests = self._parts.enter_context(open_requests(files.input, files.options, self._output.parent))
            self._rows = Rows(requests=requests, numbers=files.row_numbers(len(requests)))
            wanted = self._manifest(identity or {}, requests.content_hash, model_name, choices or {})
            self._workspace = self._parts.enter_context(
                Workspace(self._output, self._errors, wanted, overwrite=files.overwrite)
            )
        except BaseException:
            self._parts.close()
            raise
        self._setup = setup.at(self._workspace.manifest.created_s)
        self.tokenizer: Tokenizer | None = None
        self._found: Preflight | None = None
        self._stream: RowStream | None = None
        self._journal: Journal | None = None  # who asks for the workspace's opens it, where the job has ended
        finished = self._workspace.finished
        self.report = None if finished is None else self._report(finished, len(self._rows), was_finished=True)

    @property
    def rows(self) -> Rows:
        """The job's rows."""
        return self._rows

    @property
    def lengths(self) -> Lengths | None:
        """Lengths of the rows that are left, once `look` has measured them."""
        return None if self._found is None else self._found.lengths

    @property
    def progress(self) -> Done:
        """How far the job is, or was when it ended; for any thread."""
        journal = self._journal or self._workspace.journal
        ok = journal.rows_done - journal.rows_failed
        return Done(
            rows=len(self._rows),
            ok=ok,
            failed=journal.rows_failed,
            prompt_tokens=journal.prompt_tokens,
            generated_tokens=journal.generated_tokens,
        )

    @property
    def row_stream(self) -> RowStream:
        """The rows that are left, for who drives the engine himself; after `look`."""
        if self._stream is None:
            raise UsageError("the rows have not been looked at; call look() before they run")
        return self._stream

    def lines_so_far(self, *, failed: bool) -> tuple[int, Iterator[bytes]]:
        """Bytes and lines of the rows that are done, in the order of the rows; for any thread.

        Raises:
            StorageError: the job is finished or closed.
        """
        return (self._journal or self._workspace.journal).snapshot(failed=failed)

    @property
    def rows_left(self) -> int:
        """Rows that have no line yet."""
        return len(self._rows) - self._workspace.journal.rows_done

    def look(self) -> Measured:
        """Tokenizes and measures the rows that are left; those that can never run become error rows.

        Returns:
            The rows that are left in a few numbers.

        Raises:
            DataError, StorageError: as `preflight`.
        """
        self._tell_what_is_resumed()
        self._journal = journal = self._workspace.journal
        preparer = self._setup.preparer()
        bar, self.tokenizer = self._stream_options.bar, preparer.tokenizer
        self._found = preflight(
            self._rows,
            self._setup,
            preparer=preparer,
            done=journal.__contains__,
            bar=bar,
            open_tokens=open_tokens(self._rows, journal, preparer),
            prefixes=self._prefix_caching,
        )
        self._parts.callback(self._found.close)
        self._stream = self._row_stream(preparer, self._found)
        self._stream.refuse_rows()
        return self._found.lengths.measured(preparer.limits.context)

    def run(self, engine: Engine, block_rows: int | None = None, watch: Callable[[], str | None] | None = None) -> None:
        """Runs the rows that are left; after `look`.

        Args:
            block_rows: rows that the engine has in flight together.
            watch: called after every sweep; a sentence that it returns is told beside the progress.

        Raises:
            Interrupted: the job was asked to stop; what has been done is kept, as it is after any other error.
            DataError: the input was changed.
            StorageError: the disk is full, or failed.
        """
        self.row_stream.run(engine, block_rows, watch)

    def publish(self) -> JobResult:
        """Gives the output and the error file their names, once every row has its line.

        Raises:
            StorageError: the disk is full, or failed; the next start publishes.
        """
        journal = self._workspace.journal
        if self.rows_left:
            raise UsageError(f"{self.rows_left} rows have no line yet; call run() before publish()")
        self._workspace.begin()
        journal.checkpoint()
        # The output comes last: who sees it may read the error file beside it.
        errors = publish(self._errors, journal.lines(failed=True)) if journal.rows_failed else None
        if errors is None:
            remove(self._errors)
        output = publish(self._output, journal.lines(failed=False))
        finished = Finished(
            rows_ok=journal.rows_done - journal.rows_failed,
            prompt_tokens=journal.prompt_tokens,
            generated_tokens=journal.generated_tokens,
            output=output,
            errors=errors,
            failed_rows=tuple(journal.failed_rows()),
        )
        resumed = journal.recovered_rows
        self._workspace.finish(finished)
        return self._report(finished, resumed)

    def close(self) -> None:
        """Lets go of the job; a second call does nothing."""
        self._parts.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _manifest(
        self, identity: Mapping[str, Any], content_hash: str, model_name: str, choices: Mapping[str, str]
    ) -> Manifest:
        shard = self._files.shard
        return Manifest(
            identity={"input": content_hash, **self._files.options.identity(self._files.input), **identity},
            rows=len(self._rows),
            shard=None if shard is None else (shard.index, shard.count),
            created_s=self._now,
            model_name=model_name,
            versions=versions(),
            choices=choices,
        )

    def _row_stream(self, preparer: Preparer, found: Preflight) -> RowStream:
        manifest = self._workspace.manifest
        encoder = ResponseEncoder(
            preparer.tokenizer,
            fingerprint=manifest.fingerprint,
            model_name=manifest.model_name,
            created_s=manifest.created_s,
            keep_reasoning=self._keep_reasoning,
            cached_tokens=self._prefix_caching,
        )
        journal = self._workspace.journal
        return RowStream(self._rows, found, journal, preparer, encoder, self._stream_options, self._interrupts)

    def _report(self, finished: Finished, rows_resumed: int, *, was_finished: bool = False) -> JobResult:
        return JobResult(
            rows_ok=finished.rows_ok,
            rows_failed=len(finished.failed_rows),
            rows_resumed=rows_resumed,
            prompt_tokens=finished.prompt_tokens,
            generated_tokens=finished.generated_tokens,
            output_path=self._output,
            error_path=None if finished.errors is None else self._errors,
            wall_s=0.0 if was_finished else time.monotonic() - self._start_s,
            was_finished=was_finished,
            note=self._setup.served().note(self._rows.requests.models),
        )

    def _tell_what_is_resumed(self) -> None:
        journal, rows = self._workspace.journal, len(self._rows)
        begun, tokens = len(journal.partial_rows), journal.recovered_tokens
        if journal.rows_done or begun:
            told = "resuming %s: %d of %d rows are done, and %d are begun, with %d tokens"
            log.info(told, self._output, journal.rows_done, rows, begun, tokens)
