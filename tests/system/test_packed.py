"""Packed checkpoints give the ids of transformers with the values that their numbers stand for, wherever they live."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmoe.errors import DataError
from flexmoe.models.loader import load_model
from tests.support.exactness import Case, check
from tests.support.packed import CONFIGS, FAMILIES, MORE_FAMILIES, packed, plain

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")
#: Weights GPU/CPU, KV GPU/CPU, activations GPU/CPU; the rest is on disk.
PLACEMENTS = [(100, 0, 100, 0, 100, 0), (0, 100, 100, 0, 100, 0), (0, 0, 50, 0, 100, 0), (30, 30, 30, 30, 30, 30)]
PAIRS = [(family, form) for family in FAMILIES for form in CONFIGS]


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Packed models by family and format, made when they are asked for."""
    root, known = tmp_path_factory.mktemp("packed"), {}

    def variant(family, form):
        if family not in known:
            known[family] = plain(family, root / family)
        if (family, form) not in known:
            known[family, form] = packed(known[family], form, root / f"{family}-{form}")
        return known[family, form]

    return variant


@pytest.mark.parametrize(
    "family, form, placement, staged",
    [
        pytest.param(
            family, form, placement, staged, marks=[] if (number + 2 * at + 5 * staged) % 16 == 0 else pytest.mark.slow
        )
        for number, (family, form) in enumerate(PAIRS)
        for at, placement in enumerate(PLACEMENTS)
        for staged in (False, True)
    ],
)
def test_ids_are_those_of_the_values(family, form, placement, staged, variants, tmp_path, monkeypatch):
    case = Case(placement=placement, batches=(2, 2), staged=staged, eos=False)
    check(variants(family, form), case, "cpu", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "family, form, placement",
    [
        pytest.param(family, form, placement, marks=[] if at == 3 and form == "fp8" else pytest.mark.slow)
        for family in MORE_FAMILIES
        for form in ("fp8", "fp8-channel", "int4")
        for at, placement in enumerate(PLACEMENTS)
    ],
)
def test_ids_of_further_families_are_those_of_the_values(family, form, placement, variants, tmp_path, monkeypatch):
    case = Case(placement=placement, batches=(2, 2), eos=False)
    check(variants(family, form), case, "cpu", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "form", [form if at % 4 == 2 else pytest.param(form, marks=pytest.mark.slow) for at, form in enumerate(CONFIGS)]
)
def test_few_rows_get_their_packed_experts_on_demand(form, variants, tmp_path, monkeypatch):
    case = Case(placement=(0, 50, 100, 0, 100, 0), batches=(1, 1), eos=False)
    metrics = check(variants("qwen3_moe", form), case, "cpu", tmp_path, monkeypatch)
    assert metrics["expert_cache"]["loads"] > 0


def damaged(variant, edit, tmp_path, config=None):
    tensors = load_file(variant.directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    values = json.loads((variant.directory / "config.json").read_text())
    values["quantization_config"] |= config or {}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(DataError) as refused:
        load_model(str(tmp_path))
    return str(refused.value)


SCALE = "model.layers.1.block_sparse_moe.experts.2.w3.weight_scale"


def test_missing_scales_are_named(variants, tmp_path):
    sentence = damaged(variants("mixtral", "int4"), lambda tensors: tensors.pop(SCALE), tmp_path)
    assert SCALE in sentence and "missing" in sentence


def test_scales_of_another_shape_are_named(variants, tmp_path):
    sentence = damaged(
        variants("mixtral", "int4"), lambda tensors: tensors.update({SCALE: tensors[SCALE][:, :1].clone()}), tmp_path
    )
    assert SCALE in sentence and "[96, 1]" in sentence and "[96, 2]" in sentence


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_named(value, variants, tmp_path):
    def edit(tensors):
        tensors[SCALE][5, 1] = value

    sentence = damaged(variants("mixtral", "int4"), edit, tmp_path)
    assert SCALE in sentence and "not finite" in sentence


def test_numbers_of_another_dtype_are_named(variants, tmp_path):
    name = SCALE.replace("_scale", "_packed")
    sentence = damaged(
        variants("mixtral", "int4"), lambda tensors: tensors.update({name: tensors[name].long()}), tmp_path
    )
    assert name in sentence and "int64" in sentence and "int32" in sentence


def test_inputs_in_another_order_are_refused(variants, tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.0.w1.g_idx"
    sentence = damaged(
        variants("mixtral", "gptq"), lambda tensors: tensors.update({name: tensors[name].flip(0)}), tmp_path
    )
    assert name in sentence and "another order" in sentence


def test_words_of_other_groups_are_refused(variants, tmp_path):
    config = {
        "config_groups": {
            "g": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True},
            }
        }
    }
    sentence = damaged(variants("mixtral", "int4"), lambda tensors: None, tmp_path, config)
    assert "weight_scale" in sentence and "shape" in sentence
