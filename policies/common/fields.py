"""What the fields of a dataclass that comes from a file may hold: one rule each, given in the field's annotation.

    class Machine:
        cores: Count
        disk_read_bytes_per_s: Rate

From its rules follow how the class checks its values (`check_fields`), how it is made of a JSON object (`build` of
`policies.common.json_files`), and the JSON Schema that ships for other programs (`policies.common.json_schema`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache, partial
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from policies.common.checks import check_count, check_number, check_percent
from policies.common.errors import UsageError

#: A JSON value; the schemas are such values too.
Json = Any
#: Of a value by name: the same as the field holds it, or a UsageError whose sentence has the name.
Check = Callable[[str, Any], Any]
#: Of a JSON value by the place where it stands: the value to check, or a DataError that names the place.
Read = Callable[[str, Json], Any]


def _as_it_is(where: str, value: Json) -> Any:
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a field may hold.

    Args:
        check: the value as the field holds it.
        schema: the same of the JSON value, as a JSON Schema.
        name: under which the schema is defined once for all fields of a file; "" describes each field anew.
        read: makes the value of what a file has, where the two differ.
    """

    check: Check
    schema: Mapping[str, Json]
    name: str = ""
    read: Read = _as_it_is


def whole(minimum: int, name: str = "") -> Rule:
    """A whole number of at least ``minimum``."""
    return Rule(check=partial(check_count, minimum=minimum), schema={"type": "integer", "minimum": minimum}, name=name)


def number(*, zero: bool, name: str = "") -> Rule:
    """A finite number above 0; with ``zero`` of at least 0."""
    bound = "minimum" if zero else "exclusiveMinimum"
    return Rule(check=partial(check_number, zero=zero), schema={"type": "number", bound: 0}, name=name)


def one_of(*values: str) -> Rule:
    """One of a few words."""

    def check(name: str, value: Any) -> str:
        if value not in values:
            raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(values)}.")
        return str(value)

    return Rule(check=check, schema={"enum": list(values)})


def optional(rule: Rule) -> Rule:
    """What a rule allows, or nothing: None, and null in a file."""

    def check(name: str, value: Any) -> Any:
        return None if value is None else rule.check(name, value)

    return Rule(check=check, schema=dict(rule.schema) | {"type": [rule.schema["type"], "null"]})


def _check_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be true or false.")
    return value


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name} is {value!r}; it must be a text.")
    return value


Count = Annotated[int, whole(1, "count")]
Size = Annotated[int, whole(0, "size")]
Rate = Annotated[float, number(zero=False, name="rate")]
Cost = Annotated[float, number(zero=True, name="cost")]
Percent = Annotated[
    float, Rule(check=check_percent, schema={"type": "number", "minimum": 0, "maximum": 100}, name="percent")
]
Switch = Annotated[bool, Rule(check=_check_switch, schema={"type": "boolean"})]
Text = Annotated[str, Rule(check=_check_text, schema={"type": "string", "minLength": 1}, name="text")]


def rules(kind: type) -> Mapping[str, Rule]:
    """The rule of each field of a dataclass, in order.

    Raises:
        TypeError: a field has none.
    """
    return _rules(kind)


@cache
def _rules(kind: type) -> Mapping[str, Rule]:
    hints = get_type_hints(kind, vars(sys.modules[kind.__module__]), include_extras=True)
    found = {}
    for each in fields(kind):
        own = [part for part in get_args(hints[each.name])[1:] if isinstance(part, Rule)]
        if get_origin(hints[each.name]) is not Annotated or len(own) != 1:
            raise TypeError(f"{kind.__name__}.{each.name} must be annotated with one rule.")
        found[each.name] = own[0]
    return found


def required(kind: type) -> list[str]:
    """Names of the fields without a default, in order."""
    return [each.name for each in fields(kind) if not has_default(each)]


def has_default(field: Field[Any]) -> bool:
    """Whether a field may be left out."""
    return field.default is not MISSING or field.default_factory is not MISSING


@cache
def _checks(kind: type) -> tuple[tuple[str, Check], ...]:
    return tuple((name, rule.check) for name, rule in rules(kind).items())


def check_fields(values: Any, of_what: str = "") -> None:
    """Check every field of a dataclass that is being made, and give it the value in its own type.

    Args:
        values: the dataclass, frozen or not, in its ``__post_init__``.
        of_what: said behind the name of a field, like "of the GPU".

    Raises:
        UsageError: a value is of the wrong type or out of range; the sentence names the field.
    """
    kind: type = type(values)
    for name, check in _checks(kind):
        value = getattr(values, name)
        checked = check(f"{name} {of_what}" if of_what else name, value)
        if checked is not value:
            object.__setattr__(values, name, checked)
