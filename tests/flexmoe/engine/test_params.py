"""Sampling parameters: what is taken, what is refused, and with which words."""

import math

import pytest

from flexmoe.errors import UsageError
from flexmoe.params import SamplingParams

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
COUNTS = ("n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs")


def test_defaults_are_greedy_and_ask_for_nothing():
    params = SamplingParams()
    assert params.greedy and not params.penalized and params.scores_prompt is None
    assert (params.n, params.max_tokens, params.stop, params.logprobs) == (1, None, (), None)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3, 10**400, "1", None, True, [1], 1j], ids=repr)
def test_number_that_is_none_or_out_of_bounds_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=f"^{name} is .*; give a"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(
    "value",
    [1.0, math.nan, "1", True, [1], 10**5000, -(10**30)],
    ids=lambda v: repr(v)[:9] if v != 10**5000 else "huge",
)
def test_count_that_is_none_or_out_of_bounds_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=f"^{name} is .*; give a whole number"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": 129},
        {"n": 10**9},
        {"n": None},
        {"top_k": -2},
        {"top_k": 2**31},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": 1.5},
        {"max_tokens": -1},
        {"max_tokens": 2**31},
        {"seed": 2**63},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": 10**9},
        {"prompt_logprobs": 21},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0},
        {"min_tokens": -1},
        {"min_tokens": None},
        {"ignore_eos": 1},
        {"skip_special_tokens": 0},
        {"detokenize": None},
        {"include_stop_str_in_output": "yes"},
        {"echo": None},
        {"stop": 5},
        {"stop": [""]},
        {"stop": ""},
        {"stop": ["a", 1]},
        {"stop": ["x" * 1025]},
        {"stop": ["a"] * 65},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": (1.5,)},
        {"stop_token_ids": 3},
        {"stop_token_ids": (True,)},
        {"stop_token_ids": (1,) * 1025},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: 101}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {"1": 1}},
        {"logit_bias": {True: 1}},
        {"logit_bias": [(1, 1), (1, 2)]},
        {"logit_bias": [1, 2]},
        {"logit_bias": 7},
        {"logit_bias": dict.fromkeys(range(1025), 0)},
    ],
    ids=lambda wrong: repr(wrong)[:40],
)
def test_hostile_value_is_refused_in_a_sentence_that_names_it(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=f"^{name} is ") as error:
        SamplingParams(**wrong)
    assert "; give " in str(error.value) and len(str(error.value)) < 300


def test_nothing_to_generate_is_refused_unless_the_prompt_is_wanted():
    with pytest.raises(UsageError, match="nothing would be generated"):
        SamplingParams(max_tokens=0)
    assert SamplingParams(max_tokens=0, echo=True).scores_prompt is None
    assert SamplingParams(max_tokens=0, echo=True, logprobs=3).scores_prompt == 3
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).scores_prompt == 0


def test_parameters_that_contradict_each_other_are_refused():
    with pytest.raises(UsageError, match="^min_tokens is 9; give at most max_tokens, which is 8$"):
        SamplingParams(min_tokens=9, max_tokens=8)
    assert SamplingParams(min_tokens=8, max_tokens=8).min_tokens == 8
    with pytest.raises(UsageError, match="stop needs the text"):
        SamplingParams(stop="x", detokenize=False)


def test_none_is_no_list_as_in_vllm():
    params = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None)
    assert params == SamplingParams()


def test_prompt_is_scored_when_it_is_echoed_with_logprobs_or_asked_for():
    assert SamplingParams(logprobs=3).scores_prompt is None
    assert SamplingParams(logprobs=3, echo=True).scores_prompt == 3
    assert SamplingParams(logprobs=3, echo=True, prompt_logprobs=1).scores_prompt == 1


def test_values_are_kept_in_one_form():
    params = SamplingParams(stop="end", stop_token_ids=[4, 5], logit_bias={9: 1, 3: -100}, temperature=1)
    assert params.stop == ("end",) and params.stop_token_ids == (4, 5)
    assert params.logit_bias == ((3, -100.0), (9, 1.0)) and isinstance(params.temperature, float)
    assert params == SamplingParams(
        stop=("end",), stop_token_ids=(4, 5), logit_bias=((9, 1), (3, -100)), temperature=1.0
    )


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 9e-6}, {"temperature": 1, "top_k": 1}])
def test_no_temperature_or_one_candidate_is_greedy(params):
    assert SamplingParams(**params).greedy


@pytest.mark.parametrize("top_k", [-1, 0, 2])
def test_a_temperature_draws(top_k):
    assert not SamplingParams(temperature=0.7, top_k=top_k).greedy
