"""What becomes of a batch outside of the engine: its file is validated, its end is written down, its time runs out.

A batch that was open when the process ended, however that ended, is opened again from its directory; its journal says what was
done, and the database what was meant. Every step may be cut off and is done again then.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flexmoe.batch.job_parts import open_job
from flexmoe.errors import FlexMoEError, StorageError
from flexmoe.job.job import Job
from flexmoe.serving.limits import Limits
from flexmoe.serving.store.batches import OPEN, BatchRecord, BatchStore
from flexmoe.serving.store.files import FileStore
from flexmoe.serving.work.background import BackgroundTasks
from flexmoe.serving.work.batch_run import BatchRun, cached_tokens
from flexmoe.serving.work.models import Served, ServedModels
from flexmoe.serving.work.validation import BatchInput, Fault
from flexmoe.serving.work.work_queue import WorkQueue
from policies.common import file_io
from policies.common.file_io import storage_errors

log = logging.getLogger(__name__)
_TICK_S = 1.0
#: Of an output file's purpose, as OpenAI has it.
_OUTPUT = "batch_output"


class Lifecycle:
    """Validates and ends batches, on two threads of its own, and a third that watches the clock.

    Args:
        directory: of the server's data.
        batches, files: what is known of both.
        models: that are served.
        work_queue: where batches wait once they are validated.
        limits: of the server.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        directory: Path,
        batches: BatchStore,
        files: FileStore,
        models: ServedModels,
        work_queue: WorkQueue,
        limits: Limits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory, self._batches, self._files = directory / "batches", batches, files
        self._models, self._work_queue, self._limits, self._clock = models, work_queue, limits, clock
        self._validating, self._ending = BackgroundTasks("flexmoe-validate"), BackgroundTasks("flexmoe-finish")
        self._stopped = threading.Event()
        self._unrecovered: set[str] = set()
        self._watch = threading.Thread(target=self._watch_clock, name="flexmoe-clock", daemon=True)
        with storage_errors(self._directory):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def is_ready(self) -> bool:
        """Whether every batch that was open at the start is at work again, or has ended."""
        return not self._unrecovered

    def now(self) -> int:
        """Seconds since 1970."""
        return int(self._clock())

    def recover(self) -> None:
        """Takes up what the last process has left; then the clock is watched."""
        opened = self._batches.open()
        names = {record.id for record in opened}
        for left in self._directory.iterdir():
            record = self._batches.get(left.name)
            if left.name not in names and (record is None or record.status != "failed"):
                shutil.rmtree(left, ignore_errors=True)
        self._files.sweep()
        self._unrecovered = names
        for record in opened:
            self.validate(record)
        self._watch.start()

    def prepare(self, record: BatchRecord) -> bool:
        """Gives a new batch its directory, with its file; False where the file is gone.

        Raises:
            StorageError: the disk is full, or failed.
        """
        place = self._input(record.id)
        if place.exists():
            return True
        file = self._files.get(record.input_file_id)
        if file is None:
            return False
        with storage_errors(place):
            place.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                os.link(self._files.path(file), place)
            except FileExistsError:
                return True
            except FileNotFoundError:
                return False
            file_io.sync_directory(place.parent)
            file_io.sync_directory(self._directory)
        return True

    def validate(self, record: BatchRecord) -> None:
        """Has a batch validated, after those before it."""
        self._validating.submit(lambda: self._validate(record.id))

    def finish(self, run: BatchRun) -> None:
        """Has a batch ended that the engine does not have any longer; rows without a line get one."""
        self._ending.submit(lambda: self._finish(run))

    def reopen(self, run: BatchRun) -> None:
        """Opens a batch anew from its journal, because what was in the engine is lost."""
        run.job.close()
        self.validate(run.record)

    def reopen_later(self, run: BatchRun) -> None:
        """The same, once the disk has had time to recover."""
        run.job.close()
        self._validating.later(lambda: self._validate(run.id))

    def fail(self, run: BatchRun, error: FlexMoEError) -> None:
        """Ends a batch whose file or directory cannot be used any longer; what it had done stays in its directory."""
        run.job.close()
        self._fail(run.record, [Fault(code="invalid_input", message=str(error))])

    def cancel(self, record: BatchRecord) -> BatchRecord | None:
        """Has a batch cancelled; None where it has ended, or nothing of it is left to run."""
        now = self.now()
        changed = self._batches.advance(
            record.id, "cancelling", ("validating", "in_progress"), cancelling_at=now, ending="cancelled"
        )
        if changed is not None:
            self._end_early(changed.id, "cancelled")
        return changed

    def close(self) -> None:
        """Stops the threads; what they have begun is done again at the next start. Batches are closed."""
        self._stopped.set()
        if self._watch.is_alive():
            self._watch.join()
        self._validating.close()
        self._ending.close()
        for run in self._work_queue.runs():
            run.job.close()

    def _validate(self, batch_id: str) -> None:
        record = self._batches.get(batch_id)
        if record is None or record.has_ended:
            self._unrecovered.discard(batch_id)
            return
        served = self._served(record)
        if served is not None:
            self._open(record, served)
        self._unrecovered.discard(batch_id)

    def _served(self, record: BatchRecord) -> Served | None:
        """The model of a batch; None where its file cannot run, and then it has failed."""
        if record.model is not None:
            served = self._models.get(record.model)
            if served is None:
                message = f"the model {record.model} is not served any longer"
                self._fail(record, [Fault(code="model_not_found", message=message)])
            return served
        if not self.prepare(record):
            self._fail(record, [Fault(code="file_not_found", message="the input file was deleted")])
            return None
        found = BatchInput(self._input(record.id), record.endpoint, self._models, self._limits.rows)
        if found.served is None:
            self._fail(record, found.faults)
        return found.served

    def _open(self, record: BatchRecord, served: Served) -> None:
        directory = self._directory / record.id
        options = replace(
            served.options,
            input_file=self._input(record.id),
            output_file=directory / "output.jsonl",
            input_format="jsonl",
            on_invalid="record",
        )
        try:
            job = open_job(options, served.model, model_name=served.id)
        except StorageError:
            raise
        except FlexMoEError as error:
            self._fail(record, [Fault(code="invalid_input", message=str(error))])
            return
        try:
            measured = None if job.report is not None else job.look()
        except StorageError:
            job.close()
            raise
        except FlexMoEError as error:
            job.close()
            self._fail(record, [Fault(code="invalid_input", message=str(error))])
            return
        if measured is None:
            self._publish(record.id, served.id, job)
            return
        self._start(BatchRun(record, served.id, job, measured))

    def _start(self, run: BatchRun) -> None:
        """A batch is validated: it waits for the engine, unless there is nothing to wait for."""
        done = run.progress
        values = {"model": run.model, "total": done.rows, "completed": done.ok, "failed": done.failed}
        begun = self._batches.advance(run.id, "in_progress", ("validating",), in_progress_at=self.now(), **values)
        record = begun or self._batches.get(run.id)
        if record is None:
            run.job.close()
            return
        run.record, run.ending = record, record.ending
        if run.ending is None and self.now() >= record.expires_at:
            run.ending = "expired"
        if run.ending is not None or not run.job.rows_left:
            self.finish(run)
            return
        self._work_queue.add(run)
        # A cancel that came since the record was read has not found the batch in the work queue.
        now = self._batches.get(run.id)
        if now is not None and now.ending is not None:
            self._end_early(run.id, now.ending)

    def _finish(self, run: BatchRun) -> None:
        record = self._batches.get(run.id)
        if record is None or record.has_ended:
            run.job.close()
            return
        if run.job.report is None and run.job.rows_left:
            ending = run.ending or "engine_error"
            if ending == "expired":  # it has to end so after a kill, too
                self._batches.advance(run.id, record.status, OPEN, ending=ending)
            run.give_up(ending)
        self._publish(run.id, run.model, run.job)

    def _publish(self, batch_id: str, model: str, job: Job) -> None:
        """Writes output and error file, makes files of them that clients can get, and ends the batch."""
        now = self.now()
        self._batches.advance(batch_id, "finalizing", ("validating", "in_progress"), finalizing_at=now)
        record = self._batches.get(batch_id)  # from now on it cannot be cancelled
        if record is None:
            return
        result = job.report or job.publish()
        expires_s = None if record.files_expire_s is None else now + record.files_expire_s
        if result.rows_ok:
            name = f"{record.id}_output.jsonl"
            self._files.adopt(record.output_file_id, result.output_path, name, _OUTPUT, now, expires_s)
        if result.error_path is not None:
            name = f"{record.id}_error.jsonl"
            self._files.adopt(record.error_file_id, result.error_path, name, _OUTPUT, now, expires_s)
        status = record.ending if record.ending in ("cancelled", "expired") else "completed"
        self._batches.advance(
            record.id,
            status,
            OPEN,
            **{f"{status}_at": now},
            model=model,
            total=result.rows_ok + result.rows_failed,
            completed=result.rows_ok,
            failed=result.rows_failed,
            prompt_tokens=result.prompt_tokens,
            generated_tokens=result.generated_tokens,
            cached_tokens=cached_tokens(result.output_path),
        )
        job.close()
        shutil.rmtree(self._directory / record.id, ignore_errors=True)

    def _fail(self, record: BatchRecord, faults: list[Fault]) -> None:
        errors = [fault.to_json() for fault in faults]
        self._batches.advance(record.id, "failed", OPEN, failed_at=self.now(), errors=errors)
        if record.in_progress_at is None:  # else its journal is worth keeping
            shutil.rmtree(self._directory / record.id, ignore_errors=True)

    def _end_early(self, batch_id: str, ending: str) -> None:
        run = self._work_queue.end(batch_id, ending)
        if run is not None:
            self.finish(run)

    def _watch_clock(self) -> None:
        while not self._stopped.wait(_TICK_S):
            try:
                now = self.now()
                self._files.expire(now)
                for run in self._work_queue.runs():
                    if now >= run.record.expires_at and run.ending is None:
                        self._end_early(run.id, "expired")
            except FlexMoEError as error:
                log.warning("%s", error)

    def _input(self, batch_id: str) -> Path:
        return self._directory / batch_id / "input.jsonl"
