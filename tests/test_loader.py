"""What is refused before anything heavy happens."""

import json

import pytest

from cost_model.configs import SHAPES
from flexmoe.errors import DataError
from flexmoe.loader import load_model

NOT_RUN = {"phimoe": "phi-3.5-moe", "qwen3_moe": "qwen3-30b-a3b"}
PATTERN = "family '{}', which can be planned for but not run; use a model of a family that runs: mixtral"


def write_config(directory, family):
    (directory / "config.json").write_text((SHAPES / f"{NOT_RUN[family]}.json").read_text())


@pytest.mark.parametrize("family", NOT_RUN)
def test_a_checkpoint_of_a_family_that_does_not_run_is_refused_from_its_config_alone(tmp_path, family):
    write_config(tmp_path, family)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(DataError, match=PATTERN.format(family)) as refusal:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("family", NOT_RUN)
def test_a_dummy_of_a_family_that_does_not_run_is_refused(tmp_path, family):
    write_config(tmp_path, family)
    for model in (NOT_RUN[family], str(tmp_path)):
        with pytest.raises(DataError, match=PATTERN.format(family)):
            load_model(model, "dummy")


@pytest.mark.parametrize("family", NOT_RUN)
def test_the_hub_is_asked_for_no_weights_of_a_family_that_does_not_run(tmp_path, monkeypatch, family):
    hub = pytest.importorskip("huggingface_hub")
    fetched = []

    def snapshot_download(name, *, allow_patterns):
        fetched.append(allow_patterns)
        write_config(tmp_path, family)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(DataError, match=f"some-one/a-model is of the {PATTERN.format(family)}"):
        load_model("some-one/a-model")
    assert fetched == [["config.json"]]


def test_the_hub_is_asked_for_the_weights_of_a_family_that_runs(tiny, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    directory, fetched = tiny().directory, []

    def snapshot_download(name, *, allow_patterns):
        fetched.append(allow_patterns)
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    model = load_model("some-one/a-model")
    assert "*.safetensors" in fetched[-1] and len(fetched) == 2
    assert model.config == json.loads((directory / "config.json").read_text())
