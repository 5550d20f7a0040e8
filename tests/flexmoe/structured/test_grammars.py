"""What is compiled, what is refused, and in whose words."""

import importlib
import json

import pytest

from flexmoe.errors import UsageError
from flexmoe.structured import grammars as module
from flexmoe.structured.asked import StructuredOutputsParams
from flexmoe.structured.grammars import Grammars
from tests.support.tokenizers import build_sentencepiece, build_tokenizer

OBJECT = {"type": "object"}
CLOSED = {"type": "object", "properties": {"a/b": {"type": "integer"}}, "additionalProperties": False}


@pytest.fixture(scope="module", params=[build_tokenizer, build_sentencepiece], ids=["bytes", "sentencepiece"])
def backend(request, tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    request.param(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def grammars(backend):
    return Grammars(backend)


def asked(**given):
    return StructuredOutputsParams(**given)


def accepts(grammars, backend, text, **given):
    """Whether a text is one that was asked for, whole."""
    matcher = grammars.matcher(asked(**given))
    ids = backend.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    if ids[0] == backend.unk_token_id:
        ids = backend(text, add_special_tokens=False)["input_ids"]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    "given, good, bad",
    [
        ({"json_object": True}, '{"he": [1, null]}', "[1]"),
        ({"json": {"enum": ["he", None]}}, "null", "nul"),
        ({"json": True}, "[1]", "[1"),
        ({"json": json.dumps({"const": 5})}, "5", "6"),
        ({"regex": "[hw]ello?"}, "well", "hull"),
        ({"choice": ["hello", "world"]}, "world", "worl"),
        ({"grammar": 'root ::= "he" [0-9]+'}, "he12", "he"),
        ({"grammar": 'start: "he" /[0-9]+/'}, "he12", "he"),
    ],
    ids=str,
)
def test_texts_of_each_kind(grammars, backend, given, good, bad):
    assert accepts(grammars, backend, good, **given) and not accepts(grammars, backend, bad, **given)


def test_between_tokens_of_json_there_is_one_space_or_an_indented_line_or_what_is_asked_for(grammars, backend):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for text in ('{"a":1}', '{"a": 1}', '{\n    "a": 1\n}'):
        assert accepts(grammars, backend, text, json=schema)
    assert not accepts(grammars, backend, '{"a":  1}', json=schema)
    assert not accepts(grammars, backend, '{"a": 1}', json=schema, disable_any_whitespace=True)
    assert accepts(grammars, backend, '{"a":1}', json=schema, disable_any_whitespace=True)
    assert accepts(grammars, backend, '{"a":   1}', json=schema, whitespace_pattern=" {0,3}")


def test_a_property_has_no_second_spelling(grammars, backend):
    schema = {"type": "object", "properties": {"a/b": {"type": "integer"}}}
    assert accepts(grammars, backend, '{"a/b":1}', json=schema)
    for name in ("\\u0061/b", "a\\/b"):
        assert not accepts(grammars, backend, f'{{"{name}":"x"}}', json=schema)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"json": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
        ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"json": {"$ref": "https://example.com/schema"}}, "does not fetch resources"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum (5) is greater than maximum (3)"),
        ({"json": OBJECT | {"minProperties": 2}}, "minProperties = 2 counts a name that is written twice"),
        ({"json": {"properties": {"x": OBJECT | {"minProperties": 2, "patternProperties": {"a": {}}}}}}, "minProp"),
        ({"json": False}, "nothing is valid against the schema false"),
        ({"json": {"const": "a\x00b"}}, "control character"),
        ({"json": {"properties": {"a\x7f": {}}}}, "control character"),
        ({"json": {"$ref": "#"}}, "no text in the model's vocabulary"),
        ({"regex": "[a-"}, "unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "root ::= rivers"}, "rivers"),
        ({"grammar": "start: rivers"}, "rivers"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_in_the_words_of_the_library(grammars, given, said):
    problem = grammars.problem(asked(**given))
    assert problem.startswith("structured output cannot be made so: ") and said in problem and "\n" not in problem


def test_a_least_number_of_properties_is_followed_where_all_but_one_are_required(grammars, backend):
    schema = OBJECT | {"minProperties": 2, "properties": {"a": {}}, "required": ["a"]}
    assert accepts(grammars, backend, '{"a":1,"b":1}', json=schema)
    for text in ('{"a":1}', '{"a":1,"a":1}'):
        assert not accepts(grammars, backend, text, json=schema)


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "gives nothing; give exactly one of json, regex"),
        ({"json": {}, "regex": "a"}, "gives json and regex"),
        ({"jsn": {}}, "did you mean 'json'?"),
        ({"structural_tag": "x"}, "structural_tag='x': give json, regex, choice or grammar"),
        ({"json": "{"}, "json is no JSON Schema"),
        ({"json": "5"}, "which is an object"),
        ({"choice": []}, "choice is []"),
        ({"choice": "a"}, "choice is 'a'"),
        ({"regex": ""}, "regex is ''"),
        ({"json_object": 1}, "json_object is 1"),
    ],
    ids=str,
)
def test_what_is_no_structure_is_refused_in_a_sentence(given, said):
    with pytest.raises(UsageError) as caught:
        StructuredOutputsParams.of(given)
    assert said in str(caught.value)


def test_without_the_library_it_is_said_what_to_install(backend, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(module.importlib, "import_module", without)
    with pytest.raises(UsageError, match=r"pip install 'flexmoe\[structured\]'"):
        Grammars(backend)


def test_a_tokenizer_without_a_description_is_refused():
    class Slow:
        all_special_ids, eos_token_id = [2], 2

    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        Grammars(Slow())
