"""A packed checkpoint that is damaged, or another one than its config says, is refused by name before a weight is read."""

import copy
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from cost_model.model.arch import ModelArch
from cost_model.model.known_shapes import known_config
from flexmoe.errors import DataError
from flexmoe.formats.packed_matrix import CODECS
from flexmoe.models.loader import load_model
from tests.support.packed import CONFIGS, plain, write_packed

MODULE = "model.layers.1.block_sparse_moe.experts.2.w3"
OTHERS = {torch.int32: torch.int64, torch.uint8: torch.int8, torch.float8_e4m3fn: torch.float8_e5m2}


def fields_of(form):
    """Suffixes of the tensors of a matrix of 96 outputs and 64 inputs, by field."""
    packed = ModelArch.from_config(known_config("mixtral-8x7b") | {"quantization_config": CONFIGS[form]}).packed
    return {field.name: field.suffix for field in CODECS[packed.codec].fields(packed, 96, 64)}


FIELDS = [(form, field, f"{MODULE}.{suffix}") for form in CONFIGS for field, suffix in fields_of(form).items()]
EACH_FIELD = pytest.mark.parametrize("form, field, name", FIELDS, ids=[f"{form}-{field}" for form, field, _ in FIELDS])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directories by format, made when they are asked for; None: not packed."""
    root = tmp_path_factory.mktemp("whole")
    model, known = plain("mixtral", root / "plain"), {}

    def directory(form):
        if form is None:
            return model.directory
        if form not in known:
            known[form] = root / form
            write_packed(model, form, known[form])
        return known[form]

    return directory


def refusal(source, out, edit=lambda tensors: None, config=None):
    """What is said of a copy with other tensors, or with another `quantization_config`; None takes that away."""
    tensors = {name: t for file in sorted(source.glob("*.safetensors")) for name, t in load_file(file).items()}
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    values = json.loads((source / "config.json").read_text())
    if config is not None:
        values["quantization_config"] = config
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(DataError) as refused:
        load_model(str(out))
    return str(refused.value)


@pytest.mark.parametrize("form", CONFIGS)
def test_what_is_whole_is_read(form, checkpoints):
    assert load_model(str(checkpoints(form))).arch.packed is not None


@EACH_FIELD
def test_a_tensor_that_is_missing_is_named(form, field, name, checkpoints, tmp_path):
    sentence = refusal(checkpoints(form), tmp_path, lambda tensors: tensors.pop(name))
    assert f"1 ({name!r}) missing" in sentence


@EACH_FIELD
def test_a_tensor_of_another_shape_is_named_with_both_shapes(form, field, name, checkpoints, tmp_path):
    shapes = []

    def edit(tensors):
        shapes.append(list(tensors[name].shape))
        tensors[name] = tensors[name][:-1].clone()
        shapes.append(list(tensors[name].shape))

    sentence = refusal(checkpoints(form), tmp_path, edit)
    assert repr(name) in sentence and all(str(shape) in sentence for shape in shapes)


@EACH_FIELD
def test_a_tensor_of_another_dtype_is_named_with_both_dtypes(form, field, name, checkpoints, tmp_path):
    dtypes = []

    def edit(tensors):
        dtypes.append(tensors[name].dtype)
        tensors[name] = tensors[name].to(OTHERS.get(tensors[name].dtype, torch.float64))
        dtypes.append(tensors[name].dtype)

    sentence = refusal(checkpoints(form), tmp_path, edit)
    assert repr(name) in sentence and all(str(dtype).removeprefix("torch.") in sentence for dtype in dtypes)


SCALES = [(form, name) for form, field, name in FIELDS if field == "scale"]


@pytest.mark.parametrize("form, name", SCALES, ids=CONFIGS)
def test_a_scale_that_is_no_number_is_named(form, name, checkpoints, tmp_path):
    for value in (torch.nan, torch.inf, -torch.inf):

        def edit(tensors):
            scale = tensors[name]
            scale.view(-1)[-1] = value if scale.is_floating_point() else 255

        sentence = refusal(checkpoints(form), tmp_path, edit)
        assert repr(name) in sentence and "not finite" in sentence


@pytest.mark.parametrize("form", CONFIGS)
def test_a_file_that_was_cut_short_is_named(form, checkpoints, tmp_path):
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).write_bytes((checkpoints(form) / file).read_bytes())
    size = (tmp_path / "model.safetensors").stat().st_size
    for left in (size - 1, size // 2, 100, 0):
        os.truncate(tmp_path / "model.safetensors", left)
        with pytest.raises(DataError, match=r"model\.safetensors"):
            load_model(str(tmp_path))


@pytest.mark.parametrize("name", [f"{MODULE}.g_idx", "model.layers.0.self_attn.q_proj.g_idx"])
def test_inputs_in_another_order_are_refused(name, checkpoints, tmp_path):
    sentence = refusal(
        checkpoints("gptq"), tmp_path, lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()})
    )
    assert repr(name) in sentence and "another order" in sentence


def changed(form, **weights):
    config = copy.deepcopy(CONFIGS[form])
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


#: A checkpoint, the config that it has instead of its own, and words of what is said.
LIES = {
    "not packed at all": ("int4", {}, "quantization_config"),
    "packed, and is not": (None, CONFIGS["int4"], r"weight_packed'.* missing"),
    "fp8, and is not": (None, CONFIGS["fp8"], "weight_scale_inv"),
    "wider numbers": ("int4", changed("int4", num_bits=8), "weight_packed.*shape"),
    "narrower numbers": ("int8", changed("int8", num_bits=4), "weight_packed.*shape"),
    "smaller groups": ("int4", changed("int4", group_size=16), "weight_scale.*shape"),
    "groups of all inputs": ("int4", changed("int4", strategy="channel"), "weight_scale.*shape"),
    "zero points": ("int4", changed("int4", symmetric=False), "weight_zero_point.*missing"),
    "no zero points": ("int4-zeros", CONFIGS["int4"], "weight_zero_point.*unexpected"),
    "integers": ("mxfp4", CONFIGS["int4"], "weight_packed.*uint8.*int32"),
    "mxfp4": ("int4", CONFIGS["mxfp4"], "weight_packed.*int32.*uint8"),
    "other blocks": ("fp8", CONFIGS["fp8"] | {"weight_block_size": [16, 16]}, "weight_scale_inv.*shape"),
    "blocks for channels": ("fp8-channel", CONFIGS["fp8"], "weight_scale_inv.*missing"),
    "channels for blocks": ("fp8", CONFIGS["fp8-channel"], "weight_scale'.*missing"),
    "gptq": ("awq", CONFIGS["gptq"], "qweight.*shape"),
    "awq": ("gptq", CONFIGS["awq"], "qweight.*shape"),
    "gptq of compressed-tensors": ("gptq", CONFIGS["int4"], "weight_packed.*missing"),
    "attention that is left": (
        "int4",
        CONFIGS["int4"] | {"ignore": ["lm_head", "re:.*gate$", "re:.*self_attn.*"]},
        r"q_proj\.weight'.*missing",
    ),
    "one module that is left": (
        "int4",
        CONFIGS["int4"] | {"ignore": ["lm_head", "re:.*gate$", "model.layers.0.self_attn.q_proj"]},
        "names some modules",
    ),
    "experts that are left": (
        "fp8",
        CONFIGS["fp8"] | {"modules_to_not_convert": ["lm_head", "gate", "block_sparse_moe"]},
        r"w1\.weight'.*quantization_config|w1\.weight_scale_inv'.*unexpected",
    ),
}


@pytest.mark.parametrize("form, config, words", LIES.values(), ids=LIES)
def test_a_config_that_describes_other_tensors_is_refused(form, config, words, checkpoints, tmp_path):
    sentence = refusal(checkpoints(form), tmp_path, config=config)
    assert re.search(words, sentence), sentence
