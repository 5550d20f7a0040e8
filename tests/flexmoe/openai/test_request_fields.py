"""The fields of a request: each lands in the sampling parameters, fails its row, or fails the job."""

import json
import random
from collections import Counter

import pytest

from flexmoe.openai.batch_line import parse_line
from flexmoe.openai.fields import HARMLESS, KNOWN, NEUTRAL
from flexmoe.openai.json_line import InvalidLine
from flexmoe.params import MAX_STOPS, SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**fields):
    return parse_line(json.dumps({"prompt": "p"} | fields).encode(), 1)


def chat(**fields):
    return parse_line(json.dumps({"messages": MESSAGES} | fields).encode(), 1)


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_p": 0.9, "top_k": 40, "min_p": 0.05}, {"top_p": 0.9, "top_k": 40, "min_p": 0.05}),
        ({"top_k": -1}, {"top_k": -1}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 4, "max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop_token_ids": [3, 0]}, {"stop_token_ids": (3, 0)}),
        ({"n": 3, "best_of": 3}, {"n": 3}),
        ({"seed": 7}, {"seed": 7}),
        ({"presence_penalty": 0.1, "frequency_penalty": -1}, {"presence_penalty": 0.1, "frequency_penalty": -1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"logit_bias": {"5": 1, "0": -100}}, {"logit_bias": {5: 1, 0: -100}}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"ignore_eos": False}, {}),
        ({"min_tokens": 3, "max_tokens": 3}, {"min_tokens": 3, "max_tokens": 3}),
        (
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
        ),
        ({"skip_special_tokens": True, "include_stop_str_in_output": False}, {}),
        ({"temperature": None, "stop": None, "n": None, "logit_bias": None, "max_tokens": None}, {}),
    ],
)
def test_field_of_both_endpoints_becomes_a_sampling_parameter(given, sampling):
    for request in (completion(**given), chat(**given)):
        assert request.error is None and dict(request.sampling) == sampling
        SamplingParams(**request.sampling)


def test_logprobs_are_a_number_for_completions_and_a_flag_for_chats():
    assert completion(logprobs=3).sampling == {"logprobs": 3}
    assert completion(logprobs=0).sampling == {"logprobs": 0}
    assert completion(logprobs=False).sampling == {}
    assert chat(logprobs=True, top_logprobs=5).sampling == {"logprobs": 5}
    assert chat(logprobs=True).sampling == {"logprobs": 0}
    assert chat(logprobs=False, top_logprobs=0).sampling == {}


def test_scoring_is_echo_without_generation():
    request = completion(echo=True, max_tokens=0, logprobs=1)
    assert request.error is None and request.echo
    assert SamplingParams(**request.sampling).scores_prompt == 1


def test_chat_template_kwargs_are_kept():
    assert chat(chat_template_kwargs={"enable_thinking": False}).rendering.template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**9),
        ("n", 0),
        ("n", -1),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**10),
        ("max_completion_tokens", 10**30),
        ("temperature", -0.1),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("seed", 2**64),
        ("min_tokens", -1),
        ("presence_penalty", 3),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"5": 1, "05": 1}),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["x"] * (MAX_STOPS + 1)),
        ("stop", "x" * 10_000),
    ],
)
def test_value_out_of_range_fails_only_its_row_and_is_named(field, value):
    for request in (completion(**{field: value}), chat(**{field: value})):
        assert (request.error.code, request.error.param) == ("invalid_value", field)
        assert field in request.error.message and len(request.error.message) < 400


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"stop": ""}, 'stop is ""; give strings, none of them empty'),
        ({"logit_bias": {"-1": 5}}, 'logit_bias is {"-1": 5}; give token ids'),
        ({"max_tokens": -1}, "max_tokens is -1; give a whole number from 0 to 2147483647, or null"),
        ({"max_completion_tokens": 10**30}, f"max_completion_tokens is {10**30}; give a whole number"),
        ({"seed": 10**4000}, "seed is 1000000000"),
        ({"max_tokens": 0}, "max_tokens is 0: nothing would be generated"),
    ],
)
def test_what_is_wrong_with_a_value_is_told_in_json(row, sentence):
    message = completion(**row).error.message
    assert message.startswith(sentence) and "None" not in message and len(message) < 300


def test_a_number_of_more_digits_than_can_be_read_is_told_without_python():
    with pytest.raises(InvalidLine, match="^a number has too many digits; write a shorter one$"):
        parse_line(b'{"prompt": "p", "seed": ' + b"9" * 5000 + b"}", 1)


@pytest.mark.parametrize("value", [10**9, -1, 21])
def test_too_many_logprobs_fail_only_their_row(value):
    assert completion(logprobs=value).error.param == "logprobs"
    error = chat(logprobs=True, top_logprobs=value).error
    assert error.param == "top_logprobs" and str(value) in error.message


def test_contradictions_fail_only_their_row():
    assert "differ" in completion(max_tokens=1, max_completion_tokens=2).error.message
    error = completion(min_tokens=3, max_completion_tokens=2).error
    assert error.param == "min_tokens" and error.message == "min_tokens is 3; give at most max_tokens, which is 2"
    assert "logprobs to be true" in chat(top_logprobs=2).error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0"),
        ("temperature", True),
        ("top_p", [1]),
        ("n", 1.5),
        ("n", "2"),
        ("n", True),
        ("seed", 1.5),
        ("max_tokens", 1.5),
        ("max_tokens", "9"),
        ("max_tokens", True),
        ("max_completion_tokens", {}),
        ("top_k", 1.5),
        ("stop", 5),
        ("stop", ["a", 1]),
        ("stop_token_ids", 2),
        ("stop_token_ids", [-1]),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1.5": 1}),
        ("logit_bias", {"5": "1"}),
        ("ignore_eos", 1),
        ("echo", "yes"),
        ("return_token_ids", "yes"),
        ("chat_template_kwargs", []),
        ("best_of", "2"),
    ],
)
def test_field_of_the_wrong_type_fails_the_job_and_is_named(field, value):
    with pytest.raises(InvalidLine, match=field) as caught:
        completion(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("value", [5, "yes"])
def test_logprobs_of_the_wrong_type_fail_the_job(value):
    with pytest.raises(InvalidLine, match="logprobs"):
        chat(logprobs=value)
    with pytest.raises(InvalidLine, match="logprobs"):
        completion(logprobs=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stream", True),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("best_of", 2),
        ("suffix", "s"),
        ("temprature", 0),
        ("guided_json", {}),
        ("chat_template", "x"),
        ("reasoning_effort", "low"),
        ("stream_options", {"include_usage": True}),
        ("modalities", ["audio"]),
    ],
)
def test_unsupported_field_fails_only_its_row_and_is_named(field, value):
    for request in (completion(**{field: value}), chat(**{field: value})):
        assert (request.error.code, request.error.param) == ("unsupported_field", field)
        assert field in request.error.message


def test_field_of_the_other_endpoint_fails_only_its_row():
    assert "add_generation_prompt" in completion(add_generation_prompt=False).error.message
    assert "continue_final_message" in completion(continue_final_message=True).error.message
    assert "top_logprobs" in completion(top_logprobs=2).error.message
    assert "chat_template_kwargs" in completion(chat_template_kwargs={"a": 1}).error.message
    assert "chat_template_kwargs.messages" in chat(chat_template_kwargs={"messages": []}).error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stream", False),
        ("tools", []),
        ("response_format", {"type": "text"}),
        ("stop", []),
        ("user", "u"),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("service_tier", "flex"),
        ("parallel_tool_calls", True),
        ("best_of", 1),
        ("tool_choice", "none"),
        ("modalities", ["text"]),
        ("safety_identifier", "x"),
        ("echo", False),
    ],
)
def test_field_that_asks_for_nothing_is_accepted(field, value):
    assert completion(**{field: value}).error is None


def test_everything_that_is_wrong_with_a_row_is_told():
    error = completion(temperature=-1, stop=["", "x"], colour=1).error
    assert all(word in error.message for word in ("temperature", "stop", "colour"))
    assert error.code == "unsupported_field" and error.param == "colour"


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    10**9,
    10**30,
    1.5,
    -0.0,
    1e308,
    "",
    "x",
    "5",
    "\ud83d\ude42",
    [],
    [1],
    ["a"],
    [None],
    [[]],
    [[1]],
    {},
    {"5": 1},
    {"a": None},
    [{"role": "user", "content": "x"}],
    [{"role": 5}],
    {"type": "text"},
]


def test_any_value_of_any_field_is_taken_refused_for_the_row_or_a_fault():
    names = [*KNOWN, *NEUTRAL, *HARMLESS, "other", "custom_id", "method", "url", "body"]
    outcomes = Counter()
    for name in names:
        for value in VALUES:
            for frame in ({"prompt": "p"}, {"messages": MESSAGES}):
                try:
                    request = parse_line(json.dumps(frame | {name: value}).encode(), 1)
                except InvalidLine as error:
                    assert len(str(error)) < 500
                    outcomes["fault"] += 1
                    continue
                outcomes["row" if request.error else "taken"] += 1
                assert request.error is None or 0 < len(request.error.message) < 500
                if request.error is None:
                    SamplingParams(**request.sampling)
    assert min(outcomes[kind] for kind in ("fault", "row", "taken")) > 100


@pytest.mark.parametrize("seed", range(20))
def test_damaged_line_is_understood_or_a_fault(seed):
    rng = random.Random(seed)
    body = {"model": "m", "messages": MESSAGES, "n": 2, "logit_bias": {"5": 1}, "stop": ["\u00e4"], "temperature": 0.5}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
    for _ in range(200):
        damaged = bytearray(line)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randint(0, 3)] = rng.choice(
                [b"", b"\0", b"\xff", b'"', b"{", b"]", b"9", b"\\u", b"1e9"]
            )
        try:
            request = parse_line(bytes(damaged), 1)
        except InvalidLine:
            continue
        assert request.custom_id and (request.error is None or request.error.message)


@pytest.mark.parametrize("typed, said", [("temprature", 'did you mean "temperature"?'), ("xyzzy", "remove it")])
def test_a_field_that_is_misspelled_is_told_what_was_meant(typed, said):
    request = completion(**{typed: 1})
    assert request.error.code == "unsupported_field" and request.error.message.endswith(said)
