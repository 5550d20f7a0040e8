"""From the rows of a batch to what the engine takes, or to why a row cannot run.

The columns are those of `ray.data.llm`: ``messages`` or ``prompt`` (a text, or token ids), ``sampling_params``, and
``chat_template_kwargs``. A row is read and refused as a line of a requests file is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexmoe.openai.batch_line import MAX_CUSTOM_ID_CHARACTERS, Request, request_of
from flexmoe.openai.fields import RowError
from flexmoe.openai.json_line import InvalidLine, show
from flexmoe.params import EngineRequest
from flexmoe.prefixes.digests import page_digests
from flexmoe.prefixes.finder import find_prefixes
from flexmoe.preflight.prepare import Preparer
from flexmoe.ray.columns import column, rows_of
from flexmoe.ray.token_journal import KEY_BYTES

ERROR_COLUMN = "__inference_error__"
_PROMPTS = ("messages", "prompt")
_OTHERS = ("sampling_params", "chat_template_kwargs")
#: What would have to come back beside the text, and has no column.
_WITHOUT_COLUMN = ("logprobs", "echo")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedRequest:
    """A row that can run.

    Args:
        key: `KEY_BYTES` that stand for the row's id, prompt and parameters, and the model: the journal's name of it.
    """

    key: bytes
    request: EngineRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Reads batches.

    Args:
        preparer: makes engine requests.
        model: stands for the model, and for what else decides the completions.
        sampling_params: of rows without a column of them.
        id_column: has an id for each row, all of them different; None: rows have none.
    """

    preparer: Preparer
    model: str
    sampling_params: Mapping[str, Any]
    id_column: str | None

    def read(self, batch: Any) -> list[KeyedRequest | str]:
        """What becomes of each row: a request, or why it cannot run. What an earlier stage refused keeps its reason.

        Raises:
            UsageError: this is no batch of Ray Data's.
        """
        rows = [self._request(row) for row in self._rows(batch)]
        asked = [(place, row) for place, row in enumerate(rows) if isinstance(row, Request)]
        read: list[KeyedRequest | str] = [row if isinstance(row, str) else "" for row in rows]
        for (place, row), parts in zip(asked, self.preparer.prepare_all(asked), strict=True):
            read[place] = self._keyed(row, parts)
        return _with_prefixes(read)

    def _rows(self, batch: Any) -> Iterator[dict[str, Any]]:
        """The columns that matter, row by row."""
        wanted = (*_PROMPTS, *_OTHERS, ERROR_COLUMN, *([] if self.id_column is None else [self.id_column]))
        columns = {name: values for name in wanted if (values := column(batch, name)) is not None}
        for place in range(rows_of(batch)):
            yield {name: values[place] for name, values in columns.items() if values[place] is not None}

    def _request(self, row: Mapping[str, Any]) -> Request | str:
        """A row with its sentence, where it has one already or cannot be read."""
        if row.get(ERROR_COLUMN):
            return str(row[ERROR_COLUMN])
        prompts = [name for name in _PROMPTS if name in row]
        if not prompts:
            return "the row has neither messages nor a prompt; give one of them"
        params = row.get("sampling_params", self.sampling_params)
        if not isinstance(params, Mapping):
            return f"sampling_params is {show(params)}; give an object of names and values"
        line = {**params, prompts[0]: row[prompts[0]]}
        if "chat_template_kwargs" in row:
            line["chat_template_kwargs"] = row["chat_template_kwargs"]
        try:
            request = request_of({**line, **self._id(row)}, 1)
        except InvalidLine as error:
            return str(error)
        return request if request.error is None else request.error.message

    def _id(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The id of a row as a line has it.

        Raises:
            InvalidLine: the row has none.
        """
        if self.id_column is None:
            return {}
        given = row.get(self.id_column)
        if not isinstance(given, (str, int)) or isinstance(given, bool):
            raise InvalidLine(
                f"{self.id_column} is {show(given)}; give a number, or a text of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters"
            )
        return {"custom_id": str(given)}

    def _keyed(self, row: Request, parts: Sequence[EngineRequest] | RowError) -> KeyedRequest | str:
        if isinstance(parts, RowError):
            return parts.message
        if len(parts) > 1 or parts[0].params.n > 1:
            return "a row has one completion here; make a row of each prompt, and of each of the n completions"
        unwanted = next((name for name in _WITHOUT_COLUMN if name in row.sampling), "echo" if row.prefix else None)
        if unwanted is not None:
            return f"{unwanted} has no column here; leave it out, or complete the rows with flexmoe run"
        [request] = parts
        named = None if self.id_column is None else row.custom_id
        said = json.dumps([self.model, named, request.prompt_token_ids, repr(request.params)])
        key = hashlib.blake2b(said.encode(), digest_size=KEY_BYTES).digest()
        if named is None:  # draws depend on what the row says alone, not on its place in a batch
            request = replace(request, stream_key=key.hex())
        return KeyedRequest(key=key, request=request)


def _with_prefixes(read: list[KeyedRequest | str]) -> list[KeyedRequest | str]:
    """The same, with what prompts of the batch begin with alike."""
    keyed = [(place, row) for place, row in enumerate(read) if isinstance(row, KeyedRequest)]
    tree = find_prefixes(page_digests(row.request.prompt_token_ids) for _, row in keyed)
    for number, (place, row) in enumerate(keyed):
        read[place] = replace(row, request=replace(row.request, prefix_ends=tree.ends(number)))
    return read
