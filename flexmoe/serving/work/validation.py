"""The faults of a batch's file for which it cannot run at all, each with its line, and the model that it asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.errors import DataError
from flexmoe.inputs.lines import INVALID_LINE
from flexmoe.inputs.request_file import RequestFile
from flexmoe.openai.batch_line import URLS, Request
from flexmoe.openai.json_line import show
from flexmoe.serving.work.models import Served, ServedModels
from policies.common.file_io import storage_errors

MOST_FAULTS = 100
#: A file may have as many blank lines as requests.
_LINES_PER_ROW = 2
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Args:
        line: 1-based; None where it is none of a single line.
        param: the field at fault, where it is one.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As an entry of a batch's ``errors.data``."""
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


class BatchInput:
    """A batch's file, read once.

    Args:
        path: of the file.
        endpoint: that the batch names; all its lines have to.
        models: that are served.
        most_rows: that a batch may have.

    Attributes:
        faults: the first `MOST_FAULTS`; empty where the batch can run.
        served: the model that all rows ask for; None where there are faults.

    Raises:
        FlexMoEError: the file cannot be read.
    """

    def __init__(self, path: Path, endpoint: str, models: ServedModels, most_rows: int) -> None:
        self.faults: list[Fault] = []
        self.served: Served | None = None
        self._models, self._endpoint = models, endpoint
        line_count = _line_count(path)
        if line_count > _LINES_PER_ROW * most_rows:  # to read them would take minutes and gigabytes
            self._refuse_many(f"{line_count} lines", most_rows)
            return
        try:
            with RequestFile.open(path, on_invalid="record") as file:
                self._look(file, most_rows)
        except DataError:
            self.faults = [Fault(code="empty_file", message="the file holds no requests; write one on each line")]

    def _refuse_many(self, held: str, most_rows: int) -> None:
        message = f"the file holds {held}, and a batch may have {most_rows} requests; divide it"
        self.faults.append(Fault(code="too_many_requests", message=message))

    def _look(self, file: RequestFile, most_rows: int) -> None:
        if len(file) > most_rows:
            self._refuse_many(f"{len(file)} requests", most_rows)
            return
        self._check(file)
        if self.faults:
            self.served = None

    def _check(self, requests: Iterable[Request]) -> None:
        for request in requests:
            fault = self._fault(request)
            if fault is not None:
                self.faults.append(fault)
            if len(self.faults) == MOST_FAULTS:
                return

    def _fault(self, request: Request) -> Fault | None:
        line = request.line_number
        if request.error is not None and request.error.code == INVALID_LINE:
            return Fault(code=INVALID_LINE, message=request.error.message, line=line, param=request.error.param)
        if request.kind != URLS[self._endpoint]:
            message = f"the request is none for {self._endpoint}, which the batch names; make another batch of it"
            return Fault(code="mismatched_endpoint", message=message, line=line, param="url")
        return self._model_fault(request)

    def _model_fault(self, request: Request) -> Fault | None:
        asked, line, param = request.model, request.line_number, "body.model"
        served = self._models.only if asked is None else self._models.get(asked)
        if served is None:
            given = f"there is no model {show(asked)}" if asked is not None else "the request names no model"
            message = f"{given}; served are {', '.join(each.id for each in self._models)}"
            return Fault(code="model_not_found", message=message, line=line, param=param)
        if self.served is not None and served.id != self.served.id:
            message = (
                f"the request asks for {served.id}, and those before it for {self.served.id}; a batch has one model"
            )
            return Fault(code="mismatched_model", message=message, line=line, param=param)
        self.served = served
        return None


def _line_count(path: Path) -> int:
    """Line ends in a file.

    Raises:
        StorageError: it cannot be read.
    """
    with storage_errors(path), path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))
