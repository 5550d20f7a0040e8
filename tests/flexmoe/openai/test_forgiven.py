"""What means nothing in a row: null for a field, and the point in 8.0."""

import json
import random

import pytest

from flexmoe.calls.prompts import read_conversations
from flexmoe.openai.batch_line import BATCH_KEYS, parse_line
from flexmoe.openai.fields import HARMLESS, INTEGERS, KNOWN, LIMITS, NEUTRAL
from flexmoe.openai.json_line import InvalidLine

NAMES = sorted({*KNOWN, *NEUTRAL, *HARMLESS, *BATCH_KEYS})
PARTS = [{"type": "text", "text": "hi"}]
CHAT = {
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": PARTS, "name": "bob"}],
    "chat_template_kwargs": {"thinking": False},
    "metadata": {"a": "b"},
    "response_format": {"type": "text"},
    "stream_options": {},
    "logprobs": True,
    "top_logprobs": 2,
}
COMPLETION = {"prompt": [[1, 2], [3]], "logit_bias": {"5": 1.5}, "max_tokens": 3, "stop": ["a"], "n": 2, "seed": 0}


def batch(body, url):
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


ROWS = [
    COMPLETION,
    CHAT,
    batch(COMPLETION, "/v1/completions"),
    batch(CHAT, "/v1/chat/completions"),
    {"prompt": "p", "custom_id": "a"},
]


def parsed(row):
    """The request, or the fault's sentence and field."""
    try:
        return parse_line(json.dumps(row).encode(), 3)
    except InvalidLine as error:
        return str(error), error.param, error.custom_id


def objects(value):
    """All objects within a JSON value."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(item)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", [*NAMES, "colour", "tool_calls", "content", "refusal"])
def test_field_that_is_null_is_absent(row, name):
    """In every object of a row: where the field was given a value, it is as if that had been left out."""
    for place in range(len(list(objects(row)))):
        null, absent = json.loads(json.dumps(row)), json.loads(json.dumps(row))
        list(objects(null))[place][name] = None
        list(objects(absent))[place].pop(name, None)
        assert parsed(null) == parsed(absent)


@pytest.mark.parametrize("seed", range(30))
def test_any_number_of_nulls_means_nothing(seed):
    rng = random.Random(seed)
    for row in ROWS:
        sound = parsed(row)
        assert sound.error is None
        nulls = json.loads(json.dumps(row))
        for each in list(objects(nulls)):
            for name in rng.sample([*NAMES, "x"], rng.randint(0, 5)):
                each.setdefault(name, None)
        assert parsed(nulls) == sound


def test_items_of_a_list_are_no_fields():
    for row in ({"prompt": [1, None]}, {"prompt": "p", "stop": ["a", None]}, {"prompt": "p", "stop_token_ids": [None]}):
        assert "null" in parsed(row)[0]


def test_conversations_from_python_may_hold_none():
    message = {"role": "user", "content": "x", "name": None, "tool_calls": None}
    assert read_conversations([message]) == [({"role": "user", "content": "x"},)]


def as_floats(value):
    """The same JSON value with a float for every whole number, also in the keys of objects."""
    if isinstance(value, dict):
        return {f"{k}.0" if k.lstrip("-").isdigit() else k: as_floats(v) for k, v in value.items()}
    if isinstance(value, list):
        return [as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def whole_numbers(request):
    """Everything of a request that must be an int."""
    for name in (*INTEGERS, "max_tokens", "logprobs"):
        yield from [request.sampling[name]] if name in request.sampling else []
    yield from request.sampling.get("stop_token_ids", ())
    yield from request.sampling.get("logit_bias", {})
    for prompt in request.prompts:
        yield from prompt if isinstance(prompt, tuple) else ()


VALUES = [0, 1, -1, 2, 5, 20, 21, 10**6, 2**31, [3, 0], [[1], [2, 3]], [-1], {"5": 1, "0": -2}, {"-5": 1}, {"5": 101}]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"metadata", "chat_template_kwargs"}))
def test_whole_number_may_be_written_as_a_float(name):
    for frame in ({"prompt": "p"}, {"messages": [{"role": "user", "content": "x"}]}, {"logprobs": 3, "prompt": "p"}):
        for value in VALUES:
            whole, point = parsed(frame | {name: value}), parsed(frame | {name: as_floats(value)})
            if isinstance(whole, tuple):
                assert whole[1:] == point[1:]  # the sentence quotes what was written
            elif whole.error is not None:
                assert (whole.error.code, whole.error.param) == (point.error.code, point.error.param)
            else:
                assert whole == point and all(type(number) is int for number in whole_numbers(point))


@pytest.mark.parametrize("literal", ["8.0", "8e0", "80e-1", "0.8e1", "8.000"])
def test_every_way_to_write_eight_is_eight(literal):
    names = (*INTEGERS, *LIMITS)
    fields = "".join(f'"{name}": {literal}, ' for name in names)
    line = f'{{"prompt": [{literal}], {fields}"stop_token_ids": [{literal}], "logit_bias": {{"{literal}": 1}}}}'
    request = parse_line(line.encode(), 1)
    assert request.error is None and request.prompts == ((8,),)
    assert set(whole_numbers(request)) == {8} and all(type(number) is int for number in whole_numbers(request))


def test_minus_zero_is_zero():
    request = parse_line(b'{"prompt": [-0.0], "seed": -0.0, "top_k": -0, "logit_bias": {"-0.0": 1}}', 1)
    assert request.error is None and [str(number) for number in whole_numbers(request)] == ["0"] * 4


@pytest.mark.parametrize("literal", ["8.5", "1e400", "NaN", "true", '"8"', "1e-3", "-Infinity"])
def test_what_is_no_whole_number_is_refused_as_before(literal):
    for name in (*INTEGERS, *LIMITS, "logprobs", "best_of", "stop_token_ids", "prompt"):
        value = f"[{literal}]" if name in ("stop_token_ids", "prompt") else literal
        frame = "" if name == "prompt" else '"prompt": "p", '
        if (name, literal) == ("prompt", '"8"'):
            continue  # a text
        with pytest.raises(InvalidLine, match=r"give a whole number|no token id|out of range|is not JSON"):
            parse_line(f'{{{frame}"{name}": {value}}}'.encode(), 1)


@pytest.mark.parametrize("key", ["8.5", "1e400", "NaN", "true", "", " 8", "8.", "+8", "0x8", "1e-3"])
def test_key_of_logit_bias_that_is_no_whole_number_is_refused(key):
    with pytest.raises(InvalidLine, match="its keys are token ids"):
        parse_line(json.dumps({"prompt": "p", "logit_bias": {key: 1}}).encode(), 1)


def test_one_token_in_two_spellings_fails_its_row():
    assert "names the token 8 twice" in parsed({"prompt": "p", "logit_bias": {"8": 1, "8.0": 2}}).error.message
