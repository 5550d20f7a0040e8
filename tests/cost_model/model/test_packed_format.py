"""What is packed how, from a config alone: methods, variants, exceptions, bytes."""

import copy
from dataclasses import replace

import pytest

from cost_model.model.arch import ModelArch
from cost_model.model.known_shapes import known_config
from cost_model.model.packed_format import PackedFormat
from cost_model.model.weight_units import units_of
from policies.common.errors import DataError
from policies.units import UnitId

QWEN, MIXTRAL = (known_config(name) for name in ("qwen3-30b-a3b", "mixtral-8x7b"))
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "mlp.gate"]}
W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
        }
    },
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


def arch_of(quantization, config=QWEN):
    return ModelArch.from_config({**config, "quantization_config": quantization})


def weights(**changes):
    found = copy.deepcopy(W4A16)
    found["config_groups"]["group_0"]["weights"] |= changes
    return found


@pytest.mark.parametrize(
    "quantization, expected",
    [
        (FP8, {"codec": "fp8", "bits": 8, "rows": 128, "columns": 128, "scale_bytes": 4}),
        (W4A16, {"codec": "integer", "bits": 4, "rows": 1, "columns": 128, "zeros": False}),
        (weights(symmetric=False), {"codec": "integer", "bits": 4, "columns": 128, "zeros": True}),
        (weights(num_bits=8, strategy="channel"), {"codec": "integer", "bits": 8, "columns": 0}),
        (
            weights(num_bits=8, type="float", strategy="channel") | {"format": "float-quantized"},
            {"codec": "fp8", "rows": 1, "columns": 0, "method": "compressed-tensors"},
        ),
        (weights(type="float") | {"format": "mxfp4-pack-quantized"}, {"codec": "mxfp4", "columns": 32}),
        (GPTQ, {"codec": "gptq", "zeros": True, "zero_shift": 1}),
        (GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1}, {"codec": "gptq", "zero_shift": 0, "columns": 0}),
        (AWQ, {"codec": "awq", "zeros": True, "zero_shift": 0}),
    ],
)
def test_methods_are_told_by_the_config(quantization, expected):
    found = arch_of(quantization).packed
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.kinds == ("attention", "expert")


@pytest.mark.parametrize(
    "quantization, words",
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not read"),
        ({"bits": 4}, "None is not read"),
        (FP8 | {"weight_block_size": None}, "weight_block_size None"),
        (FP8 | {"modules_to_not_convert": []}, "the router is packed"),
        (FP8 | {"modules_to_not_convert": ["mlp.gate"]}, "the head is packed"),
        (GPTQ | {"desc_act": True}, "activation order"),
        (GPTQ | {"bits": 3}, "3 bits"),
        (GPTQ | {"group_size": 0}, "group_size 0"),
        (GPTQ | {"dynamic": {"-:lm_head": {}}}, "dynamic"),
        (AWQ | {"version": "gemv"}, "'gemv'"),
        (AWQ | {"zero_point": False}, "without zero points"),
        (weights(actorder="group"), "actorder 'group'"),
        (weights(strategy="tensor_group"), "'tensor_group'"),
        (W4A16 | {"format": "marlin-24"}, "'marlin-24'"),
        (W4A16 | {"config_groups": {}}, "several config_groups"),
        (W4A16 | {"ignore": ["lm_head", "re:.*mlp.gate$", "re:.*layers.0.self_attn.*"]}, "names some modules"),
    ],
)
def test_what_is_not_read_is_named(quantization, words):
    with pytest.raises(DataError, match="quantization_config that cannot be run") as refused:
        arch_of(quantization)
    assert words in str(refused.value) and "pack-quantized" in str(refused.value)


@pytest.mark.parametrize("value", ["fp8", 3, ["fp8"]])
def test_a_quantization_config_that_is_no_object_is_refused(value):
    with pytest.raises(DataError, match="must be a JSON object"):
        arch_of(value)


@pytest.mark.parametrize(
    "exceptions",
    [["model.layers.*.self_attn"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]],
)
def test_modules_that_are_not_converted_stay(exceptions):
    left = arch_of(FP8 | {"modules_to_not_convert": [*FP8["modules_to_not_convert"], *exceptions]})
    assert left.packed.kinds == ("expert",)
    assert left.attention_bytes_in(0) == ModelArch.from_config(QWEN).attention_bytes_in(0)


def test_bytes_of_units_are_those_of_their_matrices():
    plain, packed = ModelArch.from_config(QWEN), arch_of(W4A16)
    sizes = {unit.id: unit.stored_bytes for unit in units_of(packed.grouped(1))}
    matrix = 768 * 2048 // 2 + 768 * 2048 // 128 * 2
    assert sizes[UnitId("expert", 5, 7)] == 3 * matrix
    beside = (plain.attention_params - plain.projection_params) * 2
    assert sizes[UnitId("attention", 5)] == beside + plain.projection_params // 2 + plain.projection_params // 128 * 2
    assert sum(sizes.values()) == packed.total_bytes < 0.3 * plain.total_bytes
    assert packed.fingerprint()["weight_format"] == "int4 in groups of 128 (attention, expert)"
    assert "weight_format" not in plain.fingerprint()


def test_dense_layers_are_a_kind_of_their_own():
    config = {**QWEN, "mlp_only_layers": [3]}
    both = arch_of(W4A16, config)
    assert both.packed.kinds == ("attention", "expert", "dense") and both.is_packed("dense")
    kept = arch_of(W4A16 | {"ignore": [*W4A16["ignore"], "re:.*mlp.(gate|up|down)_proj"]}, config)
    assert kept.packed.kinds == ("attention", "expert")
    assert kept.expert_bytes_in(3) == 2 * kept.dense_params > both.expert_bytes_in(3)


def test_computing_in_more_bytes_is_bounded():
    arch = replace(ModelArch.from_config(MIXTRAL), packed=PackedFormat(method="fp8", codec="fp8", bits=8))
    assert arch.computed_bytes(100, 2) == 100 and arch.computed_bytes(100, 4) == 200
