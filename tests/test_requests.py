import json

import pytest

from flexmoe.errors import DataError, InputMissingError, UsageError
from flexmoe.params import SamplingParams
from flexmoe.request_file import RequestFile
from flexmoe.requests import parse_line

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def parse(row, line_number=1):
    return parse_line(row if isinstance(row, bytes) else json.dumps(row).encode(), line_number)


def batch(body, url="/v1/completions", **other):
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | other


def write(tmp_path, *rows):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def test_plain_row_with_a_prompt_is_a_completion():
    request = parse({"prompt": "hello", "custom_id": "x", "max_tokens": 7})
    assert (request.custom_id, request.kind, request.prompts) == ("x", "completion", ("hello",))
    assert request.params == SamplingParams(max_tokens=7) and request.error is None and request.messages is None


def test_plain_row_with_messages_is_a_chat():
    request = parse(CHAT)
    assert request.kind == "chat" and request.messages == ({"role": "user", "content": "hi"},) and request.prompts == ()


def test_batch_lines_carry_kind_model_and_parameters():
    request = parse(batch({"model": "m", "prompt": "p", "max_completion_tokens": 3, "ignore_eos": True}))
    assert (request.kind, request.model, request.params) == (
        "completion", "m", SamplingParams(max_tokens=3, ignore_eos=True),
    )  # fmt: skip
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


def test_absent_max_tokens_is_left_to_the_engine():
    assert parse({"prompt": "p"}).params.max_tokens is None
    assert parse({"prompt": "p", "max_tokens": None}).params.max_tokens is None


def test_equal_limits_by_both_names_are_one_limit():
    assert parse({"prompt": "p", "max_tokens": 4, "max_completion_tokens": 4}).params.max_tokens == 4


def test_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "a\nb"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"{nope", "not valid JSON"),
        (b'"text"', "one JSON object"),
        (b"[1]", "one JSON object"),
        (b'{"prompt": "p", "temperature": NaN}', "NaN"),
        (b'{"prompt": "p", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "p", "temperature": 1e999}', "out of range"),
        (b'{"prompt": "p", "prompt": "q"}', "twice"),
        (b'{"prompt": "p", "metadata": {"a": 1, "a": 2}}', "twice"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"prompt": [' + b"9" * 5000 + b"]}", ""),
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
        ({"prompt": None}, "prompt is null"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": ["a", 1]}, "prompt is"),
        ({"prompt": [[1], "a"]}, "prompt is"),
        ({"prompt": [1, -1]}, "-1"),
        ({"prompt": [True]}, "true"),
        ({"prompt": [1.0]}, "1.0"),
        ({"prompt": [[1, None]]}, "null"),
        ({"prompt": [2**31]}, "2147483648"),
        ({"prompt": "p", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "p", "max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": "p", "max_tokens": True}, "max_tokens is true"),
        ({"prompt": "p", "max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"prompt": "p", "max_tokens": "9"}, "max_tokens"),
        ({"prompt": "p", "max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"prompt": "p", "max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"prompt": "p", "custom_id": 5}, "custom_id is 5"),
        ({"prompt": "p", "custom_id": ""}, "custom_id"),
        ({"prompt": "p", "model": 5}, "model is 5"),
        ({"prompt": "p", "ignore_eos": 1}, "ignore_eos is 1"),
        ({"prompt": "p", "return_token_ids": "yes"}, "return_token_ids"),
        ({"prompt": "p", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "p", "stop_token_ids": 2}, "stop_token_ids"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "without text"),
    ],
)
def test_malformed_line_is_refused_with_its_number(row, words):
    with pytest.raises(DataError) as caught:
        parse(row, 41)
    assert str(caught.value).startswith("line 41: ") and words in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.7), ("temperature", 1), ("temperature", False), ("temperature", "0"), ("top_p", 0.9),
        ("n", 2), ("best_of", 2), ("stream", True), ("tools", [{"type": "function"}]), ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}), ("logprobs", True), ("logprobs", 0), ("top_logprobs", 5),
        ("stop", "\n"), ("stop", ["a"]), ("presence_penalty", 0.1), ("frequency_penalty", -1),
        ("repetition_penalty", 1.1), ("logit_bias", {"5": 1}), ("echo", True), ("suffix", "s"), ("temprature", 0),
    ],
)  # fmt: skip
def test_unsupported_field_fails_only_its_row_and_is_named(field, value):
    assert field in parse({"prompt": "p", field: value}).error
    assert field in parse(batch({"prompt": "p", field: value})).error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0), ("temperature", 0.0), ("temperature", None), ("top_p", 1.0), ("n", 1), ("stream", False),
        ("tools", []), ("response_format", {"type": "text"}), ("stop", None), ("presence_penalty", 0), ("seed", 3),
        ("user", "u"), ("logprobs", None), ("metadata", {"a": "b"}),
    ],
)  # fmt: skip
def test_field_that_asks_for_nothing_is_accepted(field, value):
    assert parse({"prompt": "p", field: value}).error is None


def test_all_unsupported_fields_of_a_row_are_named():
    error = parse({"prompt": "p", "temperature": 1, "stop": ["x"], "colour": 1}).error
    assert "temperature" in error and "stop" in error and "colour" in error


def test_unknown_key_beside_body_fails_its_row():
    assert "priority" in parse(batch({"prompt": "p"}, priority=1)).error


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "x", "name": "bob"}, "messages[0].name"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "image_url"),
    ],
)
def test_unsupported_message_fails_only_its_row(message, name):
    assert name in parse({"messages": [message]}).error


def test_bom_crlf_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n\n{"prompt": "b"}\r\n{"prompt": "c"}')
    with RequestFile.open(path) as requests:
        assert [(r.custom_id, r.prompts) for r in requests] == [
            ("row-1", ("a",)), ("row-5", ("b",)), ("row-6", ("c",)),
        ]  # fmt: skip


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    row = json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False).encode()
    with RequestFile.open(write(tmp_path, row)) as requests:
        assert requests[0].prompts == ("a\u2028b\u0085c",)


def test_rows_are_read_again_in_any_order(tmp_path):
    with RequestFile.open(write(tmp_path, *({"prompt": f"p{i}"} for i in range(9)))) as requests:
        assert len(requests) == 9
        assert [requests[i].prompts[0] for i in (8, 0, 4)] == ["p8", "p0", "p4"]


def test_custom_id_used_twice_names_both_lines(tmp_path):
    path = write(tmp_path, {"prompt": "p", "custom_id": "x"}, {"prompt": "p"}, {"prompt": "q", "custom_id": "x"})
    with pytest.raises(DataError, match='line 3: custom_id "x" is already the id of line 1'):
        RequestFile.open(path)


def test_given_custom_id_may_not_take_the_name_of_a_line(tmp_path):
    with pytest.raises(DataError, match="row-2"):
        RequestFile.open(write(tmp_path, {"prompt": "p", "custom_id": "row-2"}, {"prompt": "q"}))


def test_malformed_line_names_file_and_line(tmp_path):
    path = write(tmp_path, {"prompt": "p"}, b"", b"oops")
    with pytest.raises(DataError, match=r"in\.jsonl: line 3: "):
        RequestFile.open(path)


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
def test_file_without_requests_is_refused(tmp_path, content):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no requests"):
        RequestFile.open(path)


def test_line_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("flexmoe.requests.MAX_LINE_BYTES", 100)
    monkeypatch.setattr("flexmoe.request_file.MAX_LINE_BYTES", 100)
    with pytest.raises(DataError, match="line 2: the line is longer"):
        RequestFile.open(write(tmp_path, {"prompt": "p"}, {"prompt": "p" * 200}))


def test_missing_input_is_told_apart_from_bad_input(tmp_path):
    with pytest.raises(InputMissingError, match="does not exist"):
        RequestFile.open(tmp_path / "none.jsonl")
    with pytest.raises(InputMissingError, match="no regular file"):
        RequestFile.open(tmp_path)


def test_file_changed_after_it_was_opened_is_noticed(tmp_path):
    path = write(tmp_path, {"prompt": "p"}, {"prompt": "q"})
    with RequestFile.open(path) as requests:
        with path.open("ab") as file:
            file.write(b'{"prompt": "r"}\n')
        with pytest.raises(DataError, match="changed"):
            requests[0]


def test_content_hash_follows_the_content(tmp_path):
    with RequestFile.open(write(tmp_path, {"prompt": "p"})) as requests:
        first = requests.content_hash
    with RequestFile.open(write(tmp_path, {"prompt": "q"})) as requests:
        assert requests.content_hash != first and len(first) == 64


@pytest.mark.parametrize(
    "values",
    [{"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": 2.0}, {"ignore_eos": 1}, {"stop_token_ids": (-1,)}],
)
def test_sampling_params_refuse_bad_values(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        SamplingParams(**values)


def test_sampling_params_take_a_list_of_stop_ids():
    assert SamplingParams(stop_token_ids=[3, 0]).stop_token_ids == (3, 0)
