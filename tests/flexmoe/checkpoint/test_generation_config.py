"""How a model's generation config decides what rows leave open."""

import json

import pytest

from flexmoe.checkpoint.generation_config import SamplingDefaults, generation_config
from flexmoe.errors import DataError, InputMissingError
from flexmoe.params import SamplingParams


def params(config, max_tokens=9, **given):
    return SamplingDefaults.of(config).params(given, max_tokens)


def test_nothing_said_is_greedy():
    for config in ({}, {"eos_token_id": 2}, {"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}):
        assert params(config).temperature == 0
    assert SamplingDefaults().params({}, 9) == SamplingParams(max_tokens=9)


def test_config_that_samples_gives_its_values():
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
    }
    given = {name: value for name, value in config.items() if name != "do_sample"}
    assert params(config) == SamplingParams(max_tokens=9, **given)


def test_config_that_samples_at_no_temperature_samples_at_one():
    assert params({"do_sample": True, "top_k": None}) == SamplingParams(max_tokens=9, temperature=1.0)


def test_row_comes_before_the_config():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    assert params(config, temperature=0, max_tokens=3) == SamplingParams(temperature=0, top_p=0.95, max_tokens=3)
    assert params({"top_p": 0.95}, temperature=0.8) == SamplingParams(temperature=0.8, top_p=0.95, max_tokens=9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_sample", "yes"),
        ("do_sample", 1),
        ("temperature", "hot"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", [1]),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)
def test_value_that_cannot_be_used_names_file_and_field(field, value):
    with pytest.raises(DataError, match=rf"model/generation_config\.json: {field} is"):
        SamplingDefaults.of({field: value}, "model/generation_config.json")


def test_config_is_the_models_none_or_another(tmp_path):
    own = {"eos_token_id": 2}
    assert generation_config("auto", own) == own and generation_config("none", own) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 5}))
    assert generation_config(str(tmp_path), own) == {"top_k": 5}
    assert generation_config(str(tmp_path / "generation_config.json"), own) == {"top_k": 5}


def test_config_that_is_missing_or_damaged_is_told(tmp_path):
    with pytest.raises(InputMissingError, match="generation_config"):
        generation_config(str(tmp_path), {})
    for content in ("{", '{"top_k": NaN}', "[]", '{"a": 1, "a": 2}'):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(DataError, match="generation_config.json"):
            generation_config(str(tmp_path), {})
