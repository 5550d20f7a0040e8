"""The id of a line that is no valid JSON."""

import json
import random
import time

import pytest

from flexmoe.openai.batch_line import parse_line
from flexmoe.openai.json_line import MAX_LINE_BYTES, InvalidLine
from flexmoe.openai.shown_id import shown_id

#: What makes a row no JSON, or JSON that is refused; each is a field of the row.
FAULTS = {
    "NaN": b'"temperature": NaN',
    "out of range": b'"temperature": 1e999',
    "twice": b'"x": 1, "x": 2',
    "surrogate": b'"x": "cut \\ud83d here"',
    "too many digits": b'"seed": ' + b"9" * 5000,
    "nested": b'"x": ' + b"[" * 200 + b"]" * 200,
    "not UTF-8": b'"x": "\xff"',
    "not valid JSON": b'"x": nope',
}


def test_id_is_read_whatever_the_fault_and_wherever_it_stands():
    for words, fault in FAULTS.items():
        for row in (b'{"custom_id": "a\\u00e4", "prompt": "p", %b}', b'{%b, "prompt": "p", "custom_id":"a\\u00e4"}'):
            with pytest.raises(InvalidLine, match=words) as caught:
                parse_line(row % fault, 1)
            assert caught.value.custom_id == "aä"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b'{"custom_id": "a", "custom_id": "b"}', "b"),
        (b'{"custom_id": "a", "prompt": "never ends', "a"),
        (b'{"custom_id": "a", "prompt": "x"}}', "a"),
        (b' {"body": {"custom_id": "inner"}, "custom_id" : "a", "x": [{"custom_id": "deep"}]', "a"),
        (b'{"prompt": "\\"custom_id\\": \\"no\\"", "custom_id": "a\\"b\\\\"', 'a"b\\'),
        (b'{"prompt": "}{\\\\", "custom_id": "a"', "a"),
        (b'{"x": "custom_id", "y": "custom_id": 5', 5),
        (b'{"custom_id": 7', 7),
        (b'{"custom_id": 7.5', None),
        (b'{"custom_id": NaN}', None),
        (b'{"custom_id": "half \\ud83d"', None),
        (b'{"custom_id": "\xff"', None),
        (b'{"custom_id": "bad \\x"', None),
        (b'{"custom_id": "never ends', None),
        (b'{"custom_id": {"a": 1}', None),
        (b'{"custom_id"', None),
        (b'["custom_id": "a"', None),
        (b'{"x": ["custom_id": "a"', None),
        (b'{"prompt": "\\", \\"custom_id\\": \\"a"', None),
        (b"", None),
    ],
)
def test_what_counts_is_the_last_text_or_number_of_the_outermost_object(line, shown):
    assert shown_id(line) == shown


def test_id_that_no_row_may_have_is_none():
    for custom_id in ("", "x" * 513, "x" * 10**6, 5):
        with pytest.raises(InvalidLine, match="NaN") as caught:
            parse_line(json.dumps({"custom_id": custom_id, "x": float("nan")}).encode(), 1)
        assert caught.value.custom_id is None


def value(rng, depth=0):
    """A random JSON value that looks as much like an id as it can."""
    texts = ['"custom_id": "no"', "custom_id", '{"', "\\", '\\"', "}", "[[", "ä", ""]
    kind = rng.randrange(2 if depth > 2 else 4)
    if kind < 2:
        return "".join(rng.choices(texts, k=rng.randint(0, 4))) if kind else rng.choice([1, -1.5, True, None])
    items = [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return items if kind == 2 else dict(zip(("custom_id", "a", "b"), items))


@pytest.mark.parametrize("seed", range(50))
def test_id_of_a_damaged_row_is_that_of_the_sound_one(seed):
    rng = random.Random(seed)
    for _ in range(20):
        items = [(f"k{i}", value(rng)) for i in range(rng.randint(0, 4))]
        custom_id = rng.choice(["a", 'q"\\', "ä🙂", "{[", '"custom_id": "no"'])
        items.insert(rng.randint(0, len(items)), ("custom_id", custom_id))
        line = json.dumps(dict(items), ensure_ascii=rng.random() < 0.5).encode()
        assert shown_id(line) == custom_id
        fault = rng.choice(list(FAULTS.values()))
        damaged = b"{" + fault + b", " + line[1:] if rng.random() < 0.5 else line[:-1] + b", " + fault + b"}"
        with pytest.raises(InvalidLine) as caught:
            parse_line(damaged, 1)
        assert caught.value.custom_id == custom_id


@pytest.mark.parametrize(
    "unit",
    [
        b'"',
        b'\\"',
        b"{",
        b"[]",
        b'"custom_id":',
        b'"custom_id": "a",',
        b'"custom_id": "a"}{',
        b'\\"custom_id\\": ',
        b'"x"custom_id": "',
        b'"custom_id" ' + b" " * 100,
    ],
)
def test_time_grows_with_the_length_of_a_hostile_line_alone(unit):
    line = (b'{"custom_id": "a", ' + unit * (MAX_LINE_BYTES // len(unit)))[: MAX_LINE_BYTES // 16]
    start = time.process_time()
    shown_id(line)
    assert time.process_time() - start < 3, "a third of a second; minutes if it grew with the square"
