"""Bodies of requests: JSON, read as strictly as a line of a batch, and files, which go to the disk piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from flexmoe.openai.json_line import SCHEMA_FIELDS, InvalidLine, parse_json
from flexmoe.serving.errors import ApiError, invalid, too_large
from flexmoe.serving.store.files import Upload
from policies.common.reading import without_nulls

#: So many bytes go to a thread that reads and writes them together: each hand-over costs as much as 100 KB do.
_TOGETHER_BYTES = 1 << 20
#: Of a field that is no file, and of all names and headers of a part.
_FIELD_BYTES, _MOST_FIELDS = 4 << 10, 16


def described(schema: dict[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    """What the OpenAPI document says of an endpoint's body, which is read by hand.

    Args:
        schema: JSON Schema of its fields.
    """
    content = {media_type: {"schema": {"type": "object", **schema}}}
    return {"requestBody": {"required": True, "content": content}}


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object of a request. A field that is null is absent.

    Raises:
        ApiError: there is none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as application/json", code="unsupported_media_type")
    return await run_in_threadpool(_object, await _body(request))


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except InvalidLine as error:
        raise ApiError(400, f"the body cannot be read: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body has to be a JSON object", code="invalid_json")
    return dict(without_nulls(value, SCHEMA_FIELDS))


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ApiError(400, "the body was cut off", code="incomplete_body") from None


class FormReader:
    """A form with one file, read while it comes in.

    Args:
        boundary: between its parts.
        upload: gets the bytes of the file.
        most_bytes: of the file.

    Attributes:
        filename: that the client gave; None before the file has begun.
        fields: the other parts, by name.
        is_whole: whether the form has come to its end.
    """

    def __init__(self, boundary: bytes, upload: Upload, most_bytes: int) -> None:
        self._upload, self._most_bytes = upload, most_bytes
        self.filename: str | None = None
        self.fields: dict[str, str] = {}
        self.is_whole = False
        self._header, self._value, self._headers = b"", b"", dict[str, bytes]()
        self._name, self._in_file, self._content = "", False, b""
        self._parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
                "on_end": self._form_ends,
            },
        )

    def write(self, pieces: Iterable[bytes]) -> None:
        """Reads the next bytes of the form.

        Raises:
            ApiError: it is none, or the file is too long.
            StorageError: the disk is full, or failed.
        """
        try:
            for data in pieces:
                self._parser.write(data)
        except FormParserError as error:
            raise ApiError(400, f"the form cannot be read: {error}", code="invalid_form") from None

    def _part_begins(self) -> None:
        self._headers, self._content, self._parts = {}, b"", self._parts + 1
        if self._parts > _MOST_FIELDS:
            raise ApiError(400, f"the form has more than {_MOST_FIELDS} parts", code="invalid_form")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = _short(self._header + data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value = _short(self._value + data[start:end])

    def _header_ends(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value
        self._header, self._value = b"", b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._in_file = self._name == "file" and b"filename" in options
        if not self._in_file:
            return
        if self.filename is not None:
            raise invalid("file", "the form has two files; send one")
        self.filename = options[b"filename"].decode("utf-8", "replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._upload.write(memoryview(data)[start:end])
            if self._upload.size_bytes > self._most_bytes:
                raise too_large(self._most_bytes)
        else:
            self._content = _short(self._content + data[start:end])

    def _part_ends(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._content.decode("utf-8", "replace")

    def _form_ends(self) -> None:
        self.is_whole = True


async def read_form(request: Request, upload: Upload, most_bytes: int) -> tuple[str, Mapping[str, str]]:
    """Reads a form with a file; its bytes go to ``upload``.

    Returns:
        The name that the client gave the file, and the other fields.

    Raises:
        ApiError: it is no such form, is cut off, or the file is too long.
        StorageError: the disk is full, or failed.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(415, "send the file as multipart/form-data", code="unsupported_media_type")
    try:
        form = FormReader(boundary, upload, most_bytes)
    except FormParserError as error:
        raise ApiError(400, f"the form cannot be read: {error}", code="invalid_form") from None
    waiting: list[bytes] = []
    try:
        async for piece in request.stream():
            waiting.append(piece)
            if sum(map(len, waiting)) >= _TOGETHER_BYTES:
                pieces, waiting = waiting, []
                await run_in_threadpool(form.write, pieces)
    except ClientDisconnect:
        raise ApiError(400, "the upload was cut off", code="incomplete_body") from None
    await run_in_threadpool(form.write, waiting)
    if not form.is_whole:
        raise ApiError(400, "the form has no end: the upload was cut off", code="incomplete_body")
    if form.filename is None:
        raise invalid("file", "the form has no file; send one as the part `file`", "missing_required_parameter")
    return form.filename, form.fields


def _short(text: bytes) -> bytes:
    if len(text) > _FIELD_BYTES:
        raise ApiError(400, f"a field or header of the form is longer than {_FIELD_BYTES} bytes", code="invalid_form")
    return text
