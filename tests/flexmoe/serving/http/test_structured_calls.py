"""Structured output and tools through the `openai` client, whole and in pieces."""

import json
import shutil

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")
openai = pytest.importorskip("openai")

from tests.support.serving import options_of, running  # noqa: E402

ASKED = {"model": "tools", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 120, "temperature": 1.0}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [None, "hello"]}, "b": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = 'Well, <tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>'
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}{# <tool_call> #}"


@pytest.fixture(scope="module")
def client(tiny_server_model, tmp_path_factory):
    model = tmp_path_factory.mktemp("served") / "tools"
    shutil.copytree(tiny_server_model, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with running(options_of([model], tmp_path_factory.mktemp("server"))) as server, server.client() as found:
        yield found


def test_a_chat_is_valid_against_its_schema_whole_and_in_pieces(client):
    asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "seed": 3}
    whole = client.chat.completions.create(**ASKED, **asked)
    value = json.loads(whole.choices[0].message.content)
    assert value["a"] in (None, "hello") and value["b"] in range(10) and whole.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**ASKED, **asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_a_completion_is_one_of_its_choices(client):
    asked = {"model": "tools", "prompt": "hello", "temperature": 1.0, "max_tokens": 20}
    found = client.completions.create(**asked, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert found.choices[0].text in ("yes", "no") and found.choices[0].finish_reason == "stop"


def test_a_schema_that_cannot_be_followed_is_a_400_with_the_sentence_of_the_library(client):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED, response_format=schema)
    assert refused.value.code == "invalid_structure" and refused.value.param == "response_format"
    assert "Unimplemented keys" in str(refused.value)


def test_a_call_is_a_tool_call_whole_and_in_pieces(client):
    asked = {"tools": [TOOL], "extra_body": {"structured_outputs": {"choice": [CALL]}}}
    [choice] = client.chat.completions.create(**ASKED, **asked).choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Well,"
    assert (call.function.name, json.loads(call.function.arguments)) == ("now", {"zone": "UTC"})
    chunks = list(client.chat.completions.create(**ASKED, **asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Well,"
    [streamed] = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
    assert (streamed.index, streamed.function) == (0, type(streamed.function)(**call.function.model_dump()))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_tools_the_same_text_is_content(client):
    [choice] = client.chat.completions.create(
        **ASKED, tools=[TOOL], tool_choice="none", extra_body={"structured_outputs": {"choice": [CALL]}}
    ).choices
    assert choice.message.content == CALL and choice.message.tool_calls is None and choice.finish_reason == "stop"
