"""A batch job: a JSONL of requests in, a JSONL of completions out, through `stream` alone.

Rows finish in any order. Each finished row is encoded at once (`responses`) and put aside in a file beside the output
(`spool`); at the end the lines are published in input order (`output_files`), so that a file under the final name is
always a whole one.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from flexmoe.errors import DataError
from flexmoe.output_files import PathLike, publish, resolve_outputs, storage_errors
from flexmoe.params import EngineRequest, RequestOutput
from flexmoe.request_file import RequestFile
from flexmoe.requests import Request
from flexmoe.responses import ResponseEncoder, count_tokens, creation_time_s
from flexmoe.spool import Spool
from flexmoe.tokenizer import Tokenizer
from flexmoe.workload import engine_requests

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What a job needs of `flexmoe.LLM`."""

    def stream(self, requests: Iterable[EngineRequest]) -> Iterator[RequestOutput]:
        """Pulls requests lazily and yields each one's result once, in any order."""

    def check(self, request: EngineRequest) -> str | None:
        """Why this request can never run, as a sentence; None when it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """What a finished job did. Tokens are those of the rows that went to the output file.

    Args:
        error_path: the file of the failed rows; None when there are none.
        wall_s: seconds from the first read of the input to the output under its final name.
    """

    rows_ok: int
    rows_failed: int
    prompt_tokens: int
    generated_tokens: int
    output_path: Path
    error_path: Path | None
    wall_s: float


def check_job(input_path: PathLike, output_path: PathLike, error_path: PathLike | None = None) -> int:
    """All checks that need no model, for a command line to run before it loads one; `run_job` repeats them.

    Returns:
        The number of requests.

    Raises:
        UsageError, StorageError, InputMissingError, DataError: as `run_job`.
    """
    resolve_outputs(Path(input_path), output_path, error_path)
    with RequestFile.open(input_path) as requests:
        return len(requests)


def run_job(
    input_path: PathLike,
    output_path: PathLike,
    llm: Engine,
    *,
    tokenizer: Tokenizer,
    default_max_tokens: int,
    error_path: PathLike | None = None,
    model_name: str = "flexmoe",
    progress: bool | None = None,
) -> JobReport:
    """Completes every request of a JSONL file and writes OpenAI Batch output lines in input order.

    Args:
        input_path: OpenAI Batch lines or plain rows, see `flexmoe.requests`.
        output_path: rows that succeeded; replaced as a whole at the end, or not at all.
        llm: the engine; a row that its `check` refuses becomes an error row before the first one runs.
        tokenizer: the checkpoint's; one without files serves token ids only, and texts are then null.
        default_max_tokens: for rows that name no limit.
        error_path: rows that failed; by default `output_files.default_error_path`. No file when no row failed.
        model_name: reported for rows that name no model.
        progress: show a bar; None means only when stderr is a terminal.

    Raises:
        UsageError: two of the files are the same, or an output is no regular file.
        InputMissingError: there is no such input file.
        DataError: a line of the input is malformed.
        StorageError: an output directory cannot be written, or the disk is full.
    """
    start = time.monotonic()
    created_s = creation_time_s()
    output, errors = resolve_outputs(Path(input_path), output_path, error_path)
    with RequestFile.open(input_path) as requests, Spool(len(requests), output.parent) as spool:
        encoder = ResponseEncoder(
            tokenizer, content_hash=requests.content_hash, model_name=model_name, created_s=created_s
        )
        job = _Job(requests, llm, tokenizer, encoder, spool, default_max_tokens)
        job.refuse_rows()
        job.run(sys.stderr.isatty() if progress is None else progress)
        rows_failed = spool.rows_failed
        # The output comes last: who sees it may read the error file beside it.
        if rows_failed:
            publish(errors, lambda file: spool.copy(file, failed=True))
        else:
            with storage_errors(errors):
                errors.unlink(missing_ok=True)
        publish(output, lambda file: spool.copy(file, failed=False))
    return JobReport(
        rows_ok=len(requests) - rows_failed,
        rows_failed=rows_failed,
        prompt_tokens=job.prompt_tokens,
        generated_tokens=job.generated_tokens,
        output_path=output,
        error_path=errors if rows_failed else None,
        wall_s=time.monotonic() - start,
    )


@dataclass(slots=True)
class _InFlight:
    """A row that the engine has: what its output line needs, and the choices that are back."""

    request: Request
    missing: int
    results: dict[int, RequestOutput] = field(default_factory=dict)


class _Job:
    def __init__(
        self,
        requests: RequestFile,
        llm: Engine,
        tokenizer: Tokenizer,
        encoder: ResponseEncoder,
        spool: Spool,
        default_max_tokens: int,
    ) -> None:
        self.requests, self.llm, self.tokenizer = requests, llm, tokenizer
        self.encoder, self.spool, self.default_max_tokens = encoder, spool, default_max_tokens
        self.prompt_tokens = self.generated_tokens = 0
        self._in_flight: dict[int, _InFlight] = {}

    def refuse_rows(self) -> None:
        """Turns every row that can never run into an error row, before any work is done for the others."""
        for row, request in enumerate(self.requests):
            code, message = self._refusal(request, row)
            if code:
                self._fail(row, request, code, message, status=400)
        if self.spool.rows_failed:
            log.warning("%d of %d rows cannot run; the error file says why", self.spool.rows_failed, len(self.requests))

    def run(self, progress: bool) -> None:
        """Streams the remaining rows through the engine."""
        stream = self.llm.stream(self._pull())
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(_bar(len(self.requests), progress))
            if hasattr(stream, "close"):
                stack.callback(stream.close)
            bar.update(self.spool.rows_done)
            for result in stream:
                before = self.spool.rows_done
                self._take(result)
                bar.update(self.spool.rows_done - before)
        missing = len(self.requests) - self.spool.rows_done
        if missing:
            raise RuntimeError(f"the engine's stream ended with {missing} rows unanswered")

    def _refusal(self, request: Request, row: int) -> tuple[str, str]:
        if request.error:
            return "unsupported_request", request.error
        try:
            parts = self._engine_requests(request, row)
        except DataError as error:
            return "invalid_prompt", str(error)
        for part in parts:
            if not part.prompt_token_ids:
                return "invalid_prompt", "the prompt has no tokens; give a prompt that is not empty"
            reason = self.llm.check(part)
            if reason is not None:
                return "cannot_run", reason
        return "", ""

    def _engine_requests(self, request: Request, row: int) -> list[EngineRequest]:
        return engine_requests(request, row, self.tokenizer, self.default_max_tokens)

    def _pull(self) -> Iterator[EngineRequest]:
        for row in range(len(self.requests)):
            if row in self.spool:
                continue
            request = self.requests[row]
            parts = self._engine_requests(request, row)
            # The prompts come back with the results: waiting rows need not hold their texts.
            self._in_flight[row] = _InFlight(replace(request, prompts=(), messages=None), len(parts))
            yield from parts

    def _take(self, result: RequestOutput) -> None:
        row, choice = map(int, result.request_id.split("/"))
        waiting = self._in_flight[row]
        waiting.results[choice] = result
        if len(waiting.results) < waiting.missing:
            return
        del self._in_flight[row]
        results = [waiting.results[index] for index in range(waiting.missing)]
        error = next((r.error for r in results if r.error is not None), None)
        if error is not None:
            self._fail(row, waiting.request, "engine_error", error, status=None)
        else:
            self._succeed(row, waiting.request, results)

    def _fail(self, row: int, request: Request, code: str, message: str, *, status: int | None) -> None:
        log.info("row %s (line %d) failed: %s", request.custom_id, request.line_number, message)
        self.spool.put(row, self.encoder.failure(request, code, message, status=status), failed=True)

    def _succeed(self, row: int, request: Request, results: list[RequestOutput]) -> None:
        self.spool.put(row, self.encoder.success(request, results), failed=False)
        prompt_tokens, generated_tokens = count_tokens(results)
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens


def _bar(total: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="row", disable=not show, file=sys.stderr)
