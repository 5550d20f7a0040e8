"""What weights are packed in on request, and the shape then."""

from dataclasses import replace

import pytest

from cost_model.model.arch import ModelArch
from cost_model.model.packing import FORMATS, TOGETHER, check_unpacked, packed_as
from cost_model.timing.evaluate import evaluate
from policies.common.errors import InfeasibleError, UsageError
from policies.policy import WEIGHT_FORMATS, Policy
from policies.workload import Workload
from tests.support.sweeps import SMALL

MIXTRAL = ModelArch.from_name("mixtral-8x7b")


def test_a_policy_can_name_every_format():
    assert set(WEIGHT_FORMATS) == set(FORMATS)
    assert all(FORMATS[name].name == name for name in WEIGHT_FORMATS)


@pytest.mark.parametrize("format, part", [("int4", 0.26), ("int8", 0.51), ("fp8", 0.5), ("mxfp4", 0.27)])
def test_packed_weights_take_as_many_bytes_as_the_format_has(format, part):
    packed = packed_as(MIXTRAL, format)
    assert packed.packed.name == format and packed.packed.kinds == ("attention", "expert")
    assert packed.expert_bytes / MIXTRAL.expert_bytes == pytest.approx(part, abs=0.006)
    assert packed_as(packed, format) == packed and packed_as(MIXTRAL, None) == MIXTRAL


@pytest.mark.parametrize("widths, group", [((256, 384), 128), ((576, 1536), 64), ((96, 128), 32)])
def test_groups_are_the_largest_that_every_width_is_a_multiple_of(widths, group):
    hidden, ffn = widths
    arch = replace(MIXTRAL, hidden=hidden, ffn=ffn, num_heads=1, num_kv_heads=1, head_dim=hidden)
    assert packed_as(arch, "int4").packed.columns == packed_as(arch, "int8").packed.columns == group
    assert packed_as(arch, "fp8").packed.columns == 0 and packed_as(arch, "mxfp4").packed.columns == 32


def test_widths_that_no_group_fits_are_refused():
    arch = replace(MIXTRAL, hidden=48)
    for format in ("int4", "int8", "mxfp4"):
        with pytest.raises(UsageError, match="48 inputs"):
            packed_as(arch, format)
    assert packed_as(arch, "fp8").packed is not None


def test_dense_layers_are_packed_where_there_are_some():
    arch = replace(MIXTRAL, dense_layers=(0,), dense_ffn=1024)
    assert packed_as(arch, "int4").packed.kinds == ("attention", "expert", "dense")


def test_shared_experts_are_packed_as_dense_mlps_are():
    assert packed_as(ModelArch.from_name("qwen2-57b-a14b-instruct"), "fp8").packed.kinds == (
        "attention",
        "expert",
        "dense",
    )


@pytest.mark.parametrize("model_type", sorted(TOGETHER))
def test_matrices_that_lie_together_are_not_packed(model_type):
    with pytest.raises(UsageError, match="lie together"):
        packed_as(replace(MIXTRAL, model_type=model_type), "int4")


def test_what_is_packed_in_another_format_cannot_be_had():
    packed = packed_as(MIXTRAL, "fp8")
    with pytest.raises(InfeasibleError, match="weights in int4, and those of mixtral-8x7b are packed in fp8"):
        packed_as(packed, "int4")
    check_unpacked(MIXTRAL, "int4")
    check_unpacked(packed, None)
    with pytest.raises(UsageError, match="compress_weight='fp8' .* packed already, in fp8"):
        check_unpacked(packed, "fp8")


def test_a_policy_is_judged_with_the_weights_that_it_packs(hardware="cpu"):
    from cost_model.hardware.hardware import Hardware

    machine, job = Hardware.preset(hardware), Workload(prompt_len=16, gen_len=4, num_requests=8)
    policy = Policy.from_percent((0, 0, 100, 0, 100, 0), gpu_batch_size=4, num_gpu_batches=1, prompt_len=16, gen_len=4)
    plain = evaluate(SMALL, machine, job, policy)
    packed = evaluate(SMALL, machine, job, replace(policy, compress_weight="int4"))
    by_hand = evaluate(packed_as(SMALL, "int4"), machine, job, policy)
    assert packed.memory.parts == by_hand.memory.parts and packed.tokens_per_s == by_hand.tokens_per_s
    assert packed.memory.parts["disk"]["weights"] < 0.5 * plain.memory.parts["disk"]["weights"]
