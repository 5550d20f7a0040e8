"""One batch at work: its job, held open, and its rows on their way through an engine that it shares."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from flexmoe.job.job import Done, Job
from flexmoe.job.runner import Room
from flexmoe.openai.fields import RowError
from flexmoe.outputs import RequestOutput
from flexmoe.params import EngineRequest, InFlight
from flexmoe.preflight.lengths import Measured
from flexmoe.serving.store.batches import BatchRecord

#: Why the rows that are left of a batch have no answer.
ENDINGS = {
    "cancelled": RowError(code="batch_cancelled", message="This request was not run: the batch was cancelled."),
    "expired": RowError(
        code="batch_expired", message="This request could not be executed before the completion window expired."
    ),
    "engine_error": RowError(code="engine_error", message="This request could not be run: the engine failed on it."),
}
_NUMBERS = itertools.count()


class BatchRun:
    """A batch whose rows have been looked at.

    Args:
        record: as it was when it was opened.
        model: the id of its model.
        job: held until the batch ends.
        measured: lengths of the rows that are left.

    Attributes:
        key: what the ids of its requests begin with, before a colon.
        ending: why it is to end before its rows have run (a key of `ENDINGS`); None as long as it is not.
        in_engine: whether the engine's thread has it; only that thread touches the job then.
    """

    def __init__(self, record: BatchRecord, model: str, job: Job, measured: Measured) -> None:
        self.record, self.model, self.job, self.measured = record, model, job, measured
        self.ending: str | None = record.ending
        self.in_engine = False
        self.key = f"b{next(_NUMBERS)}"
        self._requests: Iterator[EngineRequest] | None = None

    @property
    def id(self) -> str:
        """Of the batch."""
        return self.record.id

    @property
    def progress(self) -> Done:
        """How far it is."""
        return self.job.progress

    @property
    def needed_tokens(self) -> int:
        """Tokens of KV cache that its longest row takes."""
        return self.measured.longest_row - 1

    @property
    def tokens_left(self) -> float:
        """Prompt tokens and new tokens of the rows that have not finished, as far as they are expected."""
        left = self.job.row_stream.left()
        return left.prompt_tokens + left.generated_tokens

    def begin(self, engine: Room, block_rows: int) -> None:
        """Its rows may be pulled for this engine.

        Raises:
            FlexMoEError: the input cannot be read.
        """
        if self._requests is None:
            self._requests = self.job.row_stream.begin(engine, block_rows)
        else:
            self.job.row_stream.refuse_without_room(engine)

    def pull(self) -> EngineRequest | None:
        """The next request; None where all rows are in the engine or have ended.

        Raises:
            FlexMoEError: the input cannot be read.
        """
        request = None if self._requests is None else next(self._requests, None)
        return request and replace(request, request_id=f"{self.key}:{request.request_id}")

    def take(self, result: RequestOutput) -> None:
        """Keeps the result of one of its requests.

        Raises:
            StorageError: the disk is full, or failed.
        """
        self.job.row_stream.take(replace(result, request_id=self._own(result.request_id)))

    def checkpoint(self, in_flight: Sequence[InFlight]) -> None:
        """Keeps what its rows have generated.

        Args:
            in_flight: of all rows in the engine; those of others are left out.

        Raises:
            StorageError: the disk is full, or failed.
        """
        own = [each for each in in_flight if key_of(each.request_id) == self.key]
        self.job.row_stream.checkpoint(replace(each, request_id=self._own(each.request_id)) for each in own)

    def give_up(self, ending: str) -> None:
        """Makes error lines of all rows that have none; none may be in the engine.

        Args:
            ending: a key of `ENDINGS`.

        Raises:
            StorageError: the disk is full, or failed.
        """
        self.job.row_stream.give_up(ENDINGS[ending])

    def _own(self, request_id: str) -> str:
        return request_id.removeprefix(f"{self.key}:")


def cached_tokens(output: Path) -> int:
    """Prompt tokens that were not computed for their row, of all lines of an output file together."""
    with output.open("rb") as lines:
        usages = (json.loads(line)["response"]["body"]["usage"] for line in lines)
        return sum(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0) for usage in usages)


def key_of(request_id: str) -> str:
    """Of whom a request of the engine is: the key of a batch or an online request. Those of all of them meet in one engine."""
    return request_id.partition(":")[0]
