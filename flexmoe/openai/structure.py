"""The fields of a request that say what its text has to look like: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexmoe.errors import UsageError
from flexmoe.openai.fields import RowError
from flexmoe.openai.json_line import InvalidLine, show
from flexmoe.structured.asked import StructuredOutputsParams


def read_structure(body: Mapping[str, Any], errors: list[RowError]) -> tuple[str, StructuredOutputsParams | None]:
    """Reads what the text has to look like; `errors` gets why the row cannot run.

    Returns:
        The field that says so, "" for none, and what it says.

    Raises:
        InvalidLine: a field has the wrong type.
    """
    given = {name: body[name] for name in ("response_format", "structured_outputs") if body.get(name)}
    for name, value in given.items():
        if not isinstance(value, dict):
            raise InvalidLine(f"{name} is {show(value)}; give an object", param=name)
    if given.get("response_format", {}).get("type") == "text":
        del given["response_format"]
    if len(given) > 1:
        errors.append(RowError.invalid("structured_outputs", f"{' and '.join(given)} exclude each other; give one"))
    if not given:
        return "", None
    name, value = next(iter(given.items()))
    try:
        return name, StructuredOutputsParams.of(value if name == "structured_outputs" else _response_format(value))
    except UsageError as error:
        errors.append(RowError.invalid(name, str(error)))
        return name, None


def _response_format(value: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's object in vLLM's words.

    Raises:
        UsageError: it is none that is known.
    """
    kind = value.get("type")
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise UsageError(f"response_format.type is {show(kind)}; give text, json_object or json_schema")
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise UsageError("response_format.json_schema has no schema; give it as an object")
    return {"json": schema}
