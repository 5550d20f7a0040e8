from dataclasses import dataclass, field, replace
from typing import Annotated

import pytest

from policies.common.errors import DataError, UsageError
from policies.common.fields import Cost, Count, Percent, Rate, Size, Switch, Text, check_fields, one_of, optional, whole
from policies.common.json_files import build
from policies.common.json_schema import definitions, object_schema

jsonschema = pytest.importorskip("jsonschema")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pump:
    """A pump.

    Args:
        name: for people.
        valves, spares: how many there are, None being none,
            and how many lie in the store.

    Raises:
        UsageError: a value is out of range.
    """

    name: Text
    valves: Count
    spares: Size
    litres_per_s: Rate
    pause_s: Cost = 0.0
    open_percent: Percent = 100.0
    runs: Switch = True
    make: Annotated[str, one_of("old", "new")] = "new"
    limit: Annotated[int | None, optional(whole(2))] = None
    tags: Annotated[int, whole(3)] = field(default_factory=lambda: 3)

    def __post_init__(self) -> None:
        check_fields(self, "of the pump")


GOOD = {"name": "p", "valves": 2, "spares": 0, "litres_per_s": 1}
CHANGES = [
    {"name": ""},
    {"name": 3},
    {"valves": 0},
    {"valves": True},
    {"valves": 1.5},
    {"spares": -1},
    {"litres_per_s": 0},
    {"litres_per_s": "1"},
    {"pause_s": -1},
    {"open_percent": 101},
    {"runs": 1},
    {"make": "blue"},
    {"limit": 1},
    {"tags": 2},
    {"tags": None},
    {"colour": "red"},
]


def schema():
    return object_schema(Pump) | {"$defs": definitions([Pump])}


def test_values_are_held_in_their_own_type():
    pump = build(Pump, "the file", GOOD)
    assert type(pump.litres_per_s) is float and pump.limit is None and replace(pump, limit=2).limit == 2
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator(schema()).validate(GOOD | {"limit": None, "open_percent": 0})


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_class_file_and_schema_refuse_the_same_values(change):
    assert not jsonschema.Draft202012Validator(schema()).is_valid(GOOD | change)
    with pytest.raises(DataError, match=next(iter(change))):
        build(Pump, "the file", GOOD | change)
    if "colour" not in change:
        with pytest.raises(UsageError, match=f"{next(iter(change))} of the pump is"):
            Pump(**GOOD | change)


@pytest.mark.parametrize("name", GOOD)
def test_what_has_no_default_is_required(name):
    values = {key: value for key, value in GOOD.items() if key != name}
    assert not jsonschema.Draft202012Validator(schema()).is_valid(values)
    with pytest.raises(DataError, match=f"the file lacks {name}"):
        build(Pump, "the file", values)


def test_the_schema_says_what_the_docstring_says():
    properties = schema()["properties"]
    assert properties["name"]["description"] == "For people."
    told = "How many there are, null being none, and how many lie in the store."
    assert properties["valves"]["description"] == properties["spares"]["description"] == told
    assert "description" not in properties["litres_per_s"]
    assert (properties["open_percent"]["default"], properties["tags"]["default"]) == (100.0, 3)


def test_a_field_without_a_rule_is_a_mistake_of_the_class():
    @dataclass
    class Bare:
        size: int

        def __post_init__(self) -> None:
            check_fields(self)

    with pytest.raises(TypeError, match="Bare.size must be annotated with one rule"):
        Bare(size=1)
