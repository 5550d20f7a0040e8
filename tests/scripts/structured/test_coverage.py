"""What counts as right, refused, stricter and wrong of JSON Schema's test suite."""

import json

import numpy as np
import pytest

from scripts.structured.coverage import byte_tokenizer, cover, texts
from scripts.structured.libraries import Llguidance

SUITE = [
    {
        "description": "names",
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"const": 1.0}}, "required": ["a"]},
        "tests": [
            {"description": "one", "data": {"a": 1}, "valid": True},
            {"description": "another order", "data": {"b": 1.0, "a": 1}, "valid": True},
            {"description": "a text", "data": {"a": "x"}, "valid": False},
        ],
    },
    {
        "description": "formats are annotations",
        "schema": {"type": "string", "format": "date"},
        "tests": [{"description": "no date", "data": "x", "valid": True}],
    },
    {
        "description": "not",
        "schema": {"not": {}},
        "tests": [{"description": "anything", "data": 1, "valid": False}],
    },
]


class Anything:
    """A library that lets everything pass."""

    name = "anything"

    def __init__(self, tokenizer):
        self._size = len(tokenizer)

    def matcher(self, schema):
        return self

    def take(self, token):
        return True

    def may_end(self):
        return True

    def mask(self):
        return np.full(-(-self._size // 32), -1, np.int32)


@pytest.fixture
def found(tmp_path):
    (tmp_path / "keyword.json").write_text(json.dumps(SUITE))
    tokenizer = byte_tokenizer()
    return lambda kind: cover(kind(tokenizer), tokenizer, tmp_path)["keyword"]


def test_ours_is_right_stricter_or_refused_and_never_wrong(found):
    counts = found(Llguidance)
    assert counts.tests == {"right": 3, "stricter": 1, "refused": 1} and not counts.wrong
    assert counts.walks["invalid"] == 0 and counts.walks["valid"] > 40
    assert list(counts.reasons) == ['Unimplemented keys: ["not"]']


def test_one_that_lets_everything_pass_is_wrong_by_its_instances_and_by_what_it_writes(found):
    counts = found(Anything)
    assert counts.tests == {"right": 3, "wrong": 2} and counts.walks["invalid"] > 40
    assert any("a text" in each for each in counts.wrong) and any("at random" in each for each in counts.wrong)


def test_a_value_has_texts_of_every_order_and_with_characters_escaped():
    found = set(texts({"a": "é", "b": 1.0}))
    assert {'{"a":"é","b":1.0}', '{"b":1,"a":"\\u00e9"}', '{"\\u0061":"é","\\u0062":1.0}'} <= found
    assert all(json.loads(each) == {"a": "é", "b": 1.0} for each in found)
