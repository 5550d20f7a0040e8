"""What is refused before anything heavy happens."""

import json
import re
import shutil
from math import prod

import pytest
from safetensors.torch import load_file, save_file

from cost_model.model.arch import ModelArch
from cost_model.model.known_shapes import SHAPES
from cost_model.model.weight_units import units_of
from flexmoe.errors import DataError, InputMissingError
from flexmoe.models.loader import load_model

UNKNOWN = "model_type 'gpt2' is not supported; supported families: mixtral, phimoe, qwen3_moe"


def write_config(directory):
    values = json.loads((SHAPES / "mixtral-8x7b.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"model_type": "gpt2"}))


def test_a_checkpoint_of_an_unknown_family_is_refused_from_its_config_alone(tmp_path):
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(DataError, match=UNKNOWN) as refusal:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)


def test_a_dummy_of_an_unknown_family_is_refused(tmp_path):
    write_config(tmp_path)
    with pytest.raises(DataError, match=UNKNOWN):
        load_model(str(tmp_path), "dummy")


@pytest.mark.parametrize("name", ["mixtral-8x22b", "phi-3.5-moe", "qwen3-30b-a3b", "qwen3-235b-a22b"])
def test_a_dummy_of_every_known_family_has_units_of_the_planned_bytes(name):
    model = load_model(name, "dummy")
    parts = model.family.parts(())
    for unit in units_of(model.arch):
        assert unit.stored_bytes == model.arch.dtype_bytes * sum(prod(p.shape) for p in parts[unit.id])


def test_the_hub_is_asked_for_no_weights_of_an_unknown_family(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    fetched = []

    def snapshot_download(name, *, allow_patterns, cache_dir):
        fetched.append(allow_patterns)
        write_config(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(DataError, match=f"some-one/a-model cannot be run: {UNKNOWN}"):
        load_model("some-one/a-model")
    assert fetched == [["config.json"]]


@pytest.mark.parametrize(
    "old, new", [("w1", "w4"), ("q_proj", "q_projection"), ("block_sparse_moe.gate", "mlp.router")]
)
def test_weights_with_other_names_are_refused_with_the_first_of_them_and_the_families(old, new, tiny, tmp_path):
    found = load_file(tiny("tied").directory / "model.safetensors")
    save_file({name.replace(old, new): tensor for name, tensor in found.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny("tied").directory / "config.json").read_bytes())
    with pytest.raises(DataError, match="supported are .*mixtral, olmoe, .* with the names of the hub") as refusal:
        load_model(str(tmp_path))
    first = next(name for name in found if old in name)
    assert first.split(".weight")[0].rsplit(".", 1)[0] in str(refusal.value)
    assert old in str(refusal.value) and new in str(refusal.value)


def test_the_hub_is_asked_for_the_weights_of_a_family_that_runs(tiny, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    directory, fetched = tiny().directory, []

    def snapshot_download(name, *, allow_patterns, cache_dir):
        fetched.append(allow_patterns)
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    model = load_model("some-one/a-model")
    assert "*.safetensors" in fetched[-1] and len(fetched) == 2
    assert model.config == json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c", "../model", "~/model"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(InputMissingError, match=re.escape(f"there is no directory {name!r}")):
        load_model(name)


def test_a_quantized_checkpoint_is_refused_by_the_planner_in_the_words_of_the_run(tiny, tmp_path):
    directory = shutil.copytree(tiny().directory, tmp_path / "quantized")
    config = json.loads((directory / "config.json").read_text())
    said = set()
    for quantization in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None):
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        for read in (ModelArch.from_dir, lambda path: load_model(str(path)).arch):
            if quantization is None:
                assert read(directory).num_layers == 3
                continue
            with pytest.raises(DataError) as refused:
                read(directory)
            said.add(str(refused.value).removeprefix(f"{directory} cannot be run: "))
    (sentence,) = said
    assert "method 'bitsandbytes' is not read" in sentence and "use the original checkpoint" in sentence
