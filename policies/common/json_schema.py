"""The JSON Schema of a file, from the rules of its dataclasses and from their docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from inspect import cleandoc
from typing import Any

from policies.common.fields import Json, required, rules
from policies.common.json_files import listed

DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: An entry of a docstring's section Args: names, then what they are.
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): ")


def file_head(title: str, description: str) -> dict[str, Json]:
    """How the schema of a file begins."""
    return {"$schema": DIALECT, "title": title, "description": description}


def header_schema(kind: str, schema_version: int) -> dict[str, Json]:
    """The two fields that every file begins with, as `policies.common.json_files.check_header` reads them."""
    return {"kind": {"const": kind}, "schema_version": {"const": schema_version}}


def object_schema(kind: type, *, complete: bool = True) -> dict[str, Json]:
    """Schema of a JSON object with exactly the fields of a dataclass.

    Args:
        complete: fields without a default must be there.
    """
    said = descriptions(kind)
    properties = {}
    for each in fields(kind):
        rule = rules(kind)[each.name]
        entry = {"description": said[each.name]} if each.name in said else {}
        entry |= {"$ref": f"#/$defs/{rule.name}"} if rule.name else rule.schema
        if each.default is not MISSING:
            entry["default"] = listed(each.default)
        elif each.default_factory is not MISSING:
            entry["default"] = listed(each.default_factory())
        properties[each.name] = entry
    head: dict[str, Json] = {"type": "object"}
    if complete:
        head["required"] = required(kind)
    return head | {"additionalProperties": False, "properties": properties}


def definitions(kinds: Iterable[type]) -> dict[str, Json]:
    """Schemas of the named rules that the fields of dataclasses have."""
    return {rule.name: dict(rule.schema) for kind in kinds for rule in rules(kind).values() if rule.name}


def descriptions(kind: type) -> Mapping[str, str]:
    """What the docstring of a class says of each field in its section Args, in the words of JSON."""
    lines = cleandoc(kind.__doc__ or "").splitlines()
    start = lines.index("Args:") + 1 if "Args:" in lines else len(lines)
    said: dict[str, str] = {}
    names: list[str] = []
    for line in lines[start:]:
        entry = _ENTRY.match(line)
        if entry:
            names = entry[1].split(", ")
            said |= dict.fromkeys(names, line[entry.end() :])
        elif line.startswith(" " * 8):
            said |= {name: f"{said[name]} {line.strip()}" for name in names}
        else:
            break
    return {name: re.sub(r"\bNone\b", "null", text[:1].upper() + text[1:]) for name, text in said.items()}


def with_properties(schema: Mapping[str, Json], properties: Mapping[str, Any]) -> dict[str, Json]:
    """The schema of an object with more properties, all required, before its own."""
    names = [*properties, *schema.get("required", ())]
    return {**schema, "required": names, "properties": {**properties, **schema["properties"]}}
