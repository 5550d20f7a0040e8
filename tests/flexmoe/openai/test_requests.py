"""One line to one request: what is understood, and what fails the job because it is not."""

import json

import pytest

from flexmoe.errors import DataError
from flexmoe.openai.batch_line import parse_line
from flexmoe.openai.json_line import MAX_DEPTH, MAX_LINE_BYTES, InvalidLine

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def parse(row, line_number=1):
    return parse_line(row if isinstance(row, bytes) else json.dumps(row).encode(), line_number)


def batch(body, url="/v1/completions", **other):
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | other


def test_plain_row_with_a_prompt_is_a_completion():
    request = parse({"prompt": "hello", "custom_id": "x", "max_tokens": 7})
    assert (request.custom_id, request.kind, request.prompts) == ("x", "completion", ("hello",))
    assert request.sampling == {"max_tokens": 7} and request.error is None and request.messages is None


def test_plain_row_with_messages_is_a_chat():
    request = parse(CHAT)
    assert request.kind == "chat" and request.messages == ({"role": "user", "content": "hi"},) and request.prompts == ()


def test_batch_lines_carry_kind_model_and_parameters():
    request = parse(batch({"model": "m", "prompt": "p", "max_completion_tokens": 3, "ignore_eos": True}))
    assert (request.kind, request.model) == ("completion", "m")
    assert request.sampling == {"max_tokens": 3, "ignore_eos": True}
    assert parse(batch(CHAT, "/v1/chat/completions")).kind == "chat"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ("one",)),
        (["one", "two"], ("one", "two")),
        ([5, 0, 7], ((5, 0, 7),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompt_has_four_forms(prompt, prompts):
    assert parse({"prompt": prompt}).prompts == prompts


def test_row_without_custom_id_is_named_after_its_line():
    assert parse({"prompt": "p"}, 12).custom_id == "row-12"
    assert parse({"prompt": "p", "custom_id": None}, 3).custom_id == "row-3"


def test_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "a\nb"


def test_developer_is_the_system():
    chat = {"messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "x", "name": None}]}
    request = parse(chat)
    assert request.error is None and request.messages[0] == {"role": "system", "content": "be brief"}


def test_name_of_a_message_is_kept_for_the_template():
    chat = [{"role": "user", "content": "x", "name": "bob"}, {"role": "user", "content": "y"}]
    assert parse({"messages": chat}).messages == tuple(chat)


def test_chat_may_go_on_with_its_last_message():
    request = parse(CHAT | {"add_generation_prompt": False, "continue_final_message": True})
    assert request.error is None
    assert not request.rendering.add_generation_prompt and request.rendering.continue_final_message
    for both in ({}, {"add_generation_prompt": True}):
        error = parse(CHAT | both | {"continue_final_message": True}).error
        assert (error.code, error.param) == ("invalid_value", "continue_final_message")
        assert "exclude each other" in error.message


@pytest.mark.parametrize(
    ("last", "opened", "prefix"),
    [("assistant", True, "Once"), ("assistant", False, "Once"), ("user", True, ""), ("user", False, "Once")],
)
def test_echo_of_a_chat_is_its_last_message_where_the_answer_has_its_role(last, opened, prefix):
    chat = {"messages": [*CHAT["messages"], {"role": last, "content": "Once"}], "add_generation_prompt": opened}
    assert parse(chat | {"echo": True}).without_prompt().prefix == prefix
    assert parse(chat).prefix == "" and "echo" not in parse(chat | {"echo": True}).sampling


def test_row_in_flight_holds_a_prompt_only_where_it_is_echoed():
    assert parse({"prompt": "p"}).without_prompt().prompts == ()
    assert parse({"prompt": "p", "echo": True}).without_prompt().prompts == ("p",)
    assert parse(CHAT).without_prompt().messages is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"{nope", "not valid JSON"),
        (b'"text"', "one JSON object"),
        (b"[1]", "one JSON object"),
        (b'{"prompt": "p\x00"}', "not valid JSON"),
        (b'{"prompt": "p", "temperature": NaN}', "NaN"),
        (b'{"prompt": "p", "logit_bias": {"5": NaN}}', "NaN"),
        (b'{"prompt": "p", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "p", "temperature": 1e999}', "out of range"),
        (b'{"prompt": "p", "prompt": "q"}', "twice"),
        (b'{"prompt": "p", "metadata": {"a": 1, "a": 2}}', "twice"),
        (b'{"prompt": "\xff"}', "byte 13 is not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "p", "\\uDFFF": 1}', "surrogate"),
        ({}, "neither prompt nor messages"),
        ({"prompt": "p"} | CHAT, "both prompt and messages"),
        (batch({"prompt": "p"}, method="GET"), "method"),
        ({"url": "/v1/completions", "body": {"prompt": "p"}}, "method"),
        (batch({"prompt": "p"}, "/v1/embeddings"), "/v1/chat/completions"),
        (batch({"prompt": "p"}, ["/v1/completions"]), "url"),
        (batch("p"), "body"),
        (batch({}), "no prompt"),
        (batch(CHAT), "no prompt"),
        (batch({"prompt": "p"} | CHAT), "messages"),
        (batch({"prompt": "p"}, "/v1/chat/completions"), "no messages"),
        (batch({"prompt": "p"} | CHAT, "/v1/chat/completions"), "prompt"),
        ({"prompt": None}, "neither prompt nor messages"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": ["a", 1]}, "prompt is"),
        ({"prompt": [[1], "a"]}, "prompt is"),
        ({"prompt": [1, -1]}, "-1"),
        ({"prompt": [True]}, "true"),
        ({"prompt": [8.5]}, "8.5"),
        ({"prompt": [[1, None]]}, "null"),
        ({"prompt": [2**31]}, "2147483648"),
        ({"prompt": "p", "custom_id": 5}, "custom_id is 5"),
        ({"prompt": "p", "custom_id": ""}, "custom_id"),
        ({"prompt": "p", "custom_id": "x" * 513}, "custom_id"),
        ({"prompt": "p", "model": 5}, "model is 5"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name is 5"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "without text"),
    ],
)
def test_line_that_cannot_be_understood_is_a_structural_fault(row, words):
    with pytest.raises(DataError) as caught:
        parse(row, 41)
    assert words in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        (b'{"prompt": [', b"]}", "nested"),
        (b'{"prompt": "p", "metadata": [', b"]}", "nested"),
        (b"[", b"", "nested"),
        (b'{"prompt": 9', b"}", "too many digits"),
        (b'{"prompt": "', b'"}', "longer than"),
    ],
)
def test_endless_line_is_a_structural_fault(begin, end, words):
    many = {"nested": b"[" * 10_000 + b"]" * 10_000 * bool(end), "longer than": b"x" * MAX_LINE_BYTES}
    with pytest.raises(InvalidLine, match=words) as caught:
        parse(begin + many.get(words, b"9" * 5000) + end)
    assert len(str(caught.value)) < 400


def test_fault_carries_the_id_of_its_line_where_that_could_be_read():
    with pytest.raises(InvalidLine) as caught:
        parse({"prompt": 3, "custom_id": "x"})
    assert (caught.value.custom_id, caught.value.param) == ("x", "prompt")
    with pytest.raises(InvalidLine) as caught:
        parse(b"{nope")
    assert caught.value.custom_id is None


def test_nesting_counts_brackets_outside_strings_only():
    brackets = '[{"\\"' * 5000 + "\\\\"
    assert parse({"prompt": brackets}).prompts == (brackets,)
    deep = json.loads("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    assert parse({"prompt": "p", "metadata": deep}).error is None
    with pytest.raises(InvalidLine, match="nested"):
        parse({"prompt": "p", "metadata": [deep]})


def test_whole_surrogate_pairs_and_escaped_nul_are_text():
    assert parse(b'{"prompt": "\\ud83d\\ude42\\u0000"}').prompts == ("🙂\0",)


def test_unknown_key_beside_body_fails_its_row():
    error = parse(batch({"prompt": "p"}, priority=1)).error
    assert "priority" in error.message and error.param == "priority"


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "x", "audio": {}}, "messages[0].audio"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content"),
    ],
)
def test_unsupported_message_fails_only_its_row(message, name):
    error = parse({"messages": [message]}).error
    assert (error.code, error.param) == ("unsupported_field", name) and name in error.message
