"""`response_format` and `structured_outputs` of a row."""

import json

import pytest

from flexmoe.openai.batch_line import parse_line
from flexmoe.openai.json_line import InvalidLine

SCHEMA = {"type": ["object", "null"], "properties": {"a": {"enum": [None, 1], "default": None}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}


def parsed(**fields):
    return parse_line(json.dumps({"prompt": "x"} | fields).encode(), 1)


@pytest.mark.parametrize("row", [{}, {"response_format": {"type": "text"}}, {"response_format": None}], ids=str)
def test_a_row_without_structure_is_free(row):
    request = parsed(**row)
    assert request.error is None and "structured_outputs" not in request.sampling and not request.structure_field


@pytest.mark.parametrize("row", [{"response_format": FORMAT}, {"structured_outputs": {"json": SCHEMA}}], ids=str)
def test_a_schema_is_kept_as_it_is_with_its_nulls_and_the_order_of_its_properties(row):
    request = parsed(**row)
    assert request.error is None and request.structure_field == next(iter(row))
    assert request.sampling["structured_outputs"].schema == json.dumps(SCHEMA)


def test_other_kinds():
    assert parsed(response_format={"type": "json_object"}).sampling["structured_outputs"].kind == "json_object"
    for kind, value in {"regex": "a+", "choice": ["a", "b"], "grammar": 'root ::= "a"'}.items():
        assert parsed(structured_outputs={kind: value}).sampling["structured_outputs"].kind == kind


@pytest.mark.parametrize(
    "row, param, said",
    [
        ({"response_format": {"type": "structural_tag"}}, "response_format", "give text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema has no schema"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs", "regex is 5"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs", "exclude each other"),
    ],
    ids=str,
)
def test_what_is_no_structure_fails_its_row(row, param, said):
    error = parsed(**row).error
    assert error.param == param and said in error.message


@pytest.mark.parametrize("name", ["response_format", "structured_outputs"])
def test_a_structure_of_the_wrong_type_is_a_structural_fault(name):
    with pytest.raises(InvalidLine, match=name):
        parsed(**{name: "json"})
