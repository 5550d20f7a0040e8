"""What means nothing in a file that a user wrote."""

import math

import pytest

from policies.common.reading import whole, without_bom, without_nulls


def test_a_mark_before_a_text_goes_and_any_other_stays():
    for mark, text in (("\ufeff", "a\ufeffb"), (b"\xef\xbb\xbf", b"a\xef\xbb\xbfb")):
        assert without_bom(mark + text) == without_bom(text) == text


def test_fields_that_are_null_go_at_every_depth_and_items_stay():
    value = {"a": None, "b": {"c": None, "d": [None, {"e": None, "f": 0}, [{"g": None}]]}, "h": ""}
    assert without_nulls(value) == {"b": {"d": [None, {"f": 0}, [{}]]}, "h": ""}
    assert value["a"] is None and "c" in value["b"], "what is given is left alone"


@pytest.mark.parametrize(
    ("value", "number"),
    [(8, 8), (8.0, 8), (-0.0, 0), (-3.0, -3), (1e15, 10**15), (10**30, 10**30), (8.5, None), (math.inf, None)]
    + [(math.nan, None), (True, None), ("8", None), (None, None), ([8], None)],
)
def test_a_float_without_a_fraction_is_a_whole_number(value, number):
    assert whole(value) == number and isinstance(whole(value), int) == (number is not None)
