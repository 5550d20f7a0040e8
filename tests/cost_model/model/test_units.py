"""How experts are grouped into units, and that all who count units mean the same ones."""

import json
from dataclasses import replace
from functools import cache
from itertools import combinations, product

import pytest

from cost_model.hardware.hardware import Hardware
from cost_model.hardware.link_curves import efficient_bytes
from cost_model.memory.allocation import allocate, slot_bytes
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import (
    FEWEST_UNITS,
    UNIT_BYTES,
    efficient_group,
    expert_groups,
    expert_units,
    experts_per_unit,
    group_on,
    unit_slack_bytes,
    units_of,
)
from cost_model.planner.solve import solve
from cost_model.simulation.simulate import simulate
from cost_model.timing.evaluate import evaluate
from flexmoe import LLM, SamplingParams
from flexmoe.models.loader import load_model
from flexmoe.models.registry import family
from policies import Policy, Workload
from policies.common.memory_units import MIB
from policies.policy import PolicyFile
from tests.support.drawn import drawn
from tests.support.tiny import GEN_LEN, assert_greedy, make, offload
from tests.support.tiny_families import RECIPES

QWEN = ModelArch.from_name("qwen3-30b-a3b")
WORKLOAD = Workload(prompt_len=128, gen_len=32, num_requests=64)


@pytest.mark.parametrize(
    "name, group",
    [("mixtral-8x7b", 1), ("mixtral-8x22b", 1), ("phi-3.5-moe", 1), ("qwen3-30b-a3b", 8), ("qwen3-235b-a22b", 2)],
)
def test_experts_are_grouped_to_an_efficient_size_where_they_are_small(name, group):
    arch = ModelArch.from_name(name)
    assert experts_per_unit(arch) == group
    assert group == 1 or arch.expert_bytes * group >= UNIT_BYTES > arch.expert_bytes * (group - 1)


@pytest.mark.parametrize("experts", [4, 8, 15, 16, 25, 128])
def test_a_layer_keeps_enough_units_for_fine_shares(experts):
    arch = replace(QWEN, num_experts=experts, top_k=2, ffn=8)
    assert expert_units(arch) >= min(experts, FEWEST_UNITS)
    groups = expert_groups(arch, 0)
    assert [e for group in groups for e in group] == list(range(experts))
    assert len({len(group) for group in groups[:-1]}) <= 1


@pytest.mark.parametrize("group", [1, 3, 8, 128, 500])
def test_grouping_moves_the_same_bytes_and_names_every_expert_once(group):
    arch = QWEN.grouped(group)
    assert sum(unit.stored_bytes for unit in units_of(arch)) == sum(unit.stored_bytes for unit in units_of(QWEN))
    own = [unit for unit in units_of(arch) if unit.kind == "expert" and unit.layer == 5]
    assert [e for unit in own for e in unit.id.experts] == list(range(128))
    assert len(own) == expert_units(arch)


def test_a_dense_layer_is_one_unit_however_experts_are_grouped():
    arch = replace(QWEN, dense_layers=(1,), dense_ffn=6144)
    assert [str(unit.id) for unit in units_of(arch) if unit.layer == 1] == ["layers.1.attention", "layers.1.expert.0"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group", [1, 5, 8])
def test_the_parts_of_a_group_are_its_bytes_in_both_layouts(packed, group):
    arch = QWEN.grouped(group)
    parts = family(arch).parts(("model.layers.0.mlp.experts.gate_up_proj",) if packed else ())
    for unit in units_of(arch):
        size = 0
        for part in parts[unit.id]:
            elements = 1
            for edge in part.shape:
                elements *= edge
            size += elements * arch.dtype_bytes
        assert size == unit.stored_bytes


def test_slots_and_placement_speak_of_groups():
    policy = Policy.from_percent(
        (20, 40, 100, 0, 100, 0), gpu_batch_size=8, num_gpu_batches=4, prompt_len=128, gen_len=32
    )
    for group in (1, 8):
        allocation = allocate(QWEN.grouped(group), policy, WORKLOAD, device="cuda")
        # The head's table is no larger than the larger of a group and an attention unit.
        assert slot_bytes(QWEN.grouped(group), allocation.placement) >= group * QWEN.expert_bytes
        assert allocation.placement.count_of("gpu") + allocation.placement.count_of(
            "cpu"
        ) + allocation.placement.count_of("disk") == len(units_of(QWEN.grouped(group)))


def test_where_dispatch_is_slow_groups_save_time():
    t4 = Hardware.preset("t4").with_budgets(cpu_mem=200)
    machine = replace(t4, gpus=(replace(t4.gpu, op_s=2e-3),))
    policy = Policy.from_percent(
        (0, 100, 0, 100, 100, 0), gpu_batch_size=16, num_gpu_batches=4, prompt_len=128, gen_len=32
    )
    single, grouped = (replace(policy, experts_per_unit=group) for group in (1, 8))
    assert simulate(QWEN, machine, WORKLOAD, grouped).job_s < simulate(QWEN, machine, WORKLOAD, single).job_s
    rates = [evaluate(QWEN, machine, WORKLOAD, each).tokens_per_s for each in (single, grouped)]
    assert rates[0] < rates[1]


def test_the_planner_groups_by_the_measured_link():
    t4 = Hardware.preset("t4")
    slow = replace(t4, gpus=(replace(t4.gpu, op_s=1e-3),))
    quick = replace(t4, gpus=(replace(t4.gpu, op_s=0.0),))
    fewer = group_on(quick, QWEN)
    assert group_on(slow, QWEN) == 16 and fewer == efficient_group(QWEN.expert_bytes, 128, 16 << 20) == 2
    assert group_on(slow, ModelArch.from_name("mixtral-8x7b")) is None
    plan = solve(QWEN, quick.with_budgets(cpu_mem=200), WORKLOAD, effort=0.01)
    assert plan.policy.experts_per_unit == fewer
    again = evaluate(QWEN, quick.with_budgets(cpu_mem=200), WORKLOAD, plan.policy)
    assert again.tokens_per_s == plan.prediction.tokens_per_s


def test_the_smallest_efficient_transfer_is_read_off_a_curve():
    assert efficient_bytes(((MIB, 5.0),)) == MIB
    assert efficient_bytes(((MIB, 96.0), (4 * MIB, 100.0))) == MIB
    assert efficient_bytes(((MIB, 90.0), (4 * MIB, 100.0))) == pytest.approx(2 * MIB)
    # Beyond the best size a link may become slower again; what counts is where it is first fast enough.
    assert efficient_bytes(((MIB, 50.0), (4 * MIB, 95.0), (16 * MIB, 100.0), (64 * MIB, 60.0))) == pytest.approx(
        4 * MIB
    )


def with_curves(machine, *, h2d=(), disk=(), op_s=0.0):
    return replace(machine, disk_read_curve=disk, gpus=(replace(machine.gpu, h2d_curve=h2d, op_s=op_s),))


def test_the_group_is_the_smallest_that_moves_efficiently_over_the_fastest_link():
    t4, expert = Hardware.preset("t4"), QWEN.expert_bytes
    assert t4.gpu.h2d_bytes_per_s > t4.disk_read_bytes_per_s
    quick = ((MIB, 1e9), (4 * expert, 10e9), (256 * MIB, 10e9))
    slow = ((MIB, 1e9), (16 * expert, 9.6e9), (64 * expert, 10e9))
    assert group_on(with_curves(t4, h2d=quick, disk=slow), QWEN) == 4
    # Between two measured sizes the rate is interpolated; no layer has fewer than 8 units.
    assert 8 < group_on(with_curves(t4, h2d=slow), QWEN) <= 16
    assert group_on(with_curves(t4, h2d=((64 * expert, 9e9), (128 * expert, 10e9))), QWEN) == 16
    # A slow link's curve does not matter, and where the fastest was not measured all is as without curves.
    assert group_on(with_curves(t4, disk=slow), QWEN) == group_on(with_curves(t4), QWEN)
    # Dispatch is counted beside what was measured.
    assert group_on(with_curves(t4, h2d=quick, op_s=1e-3), QWEN) == 16


def test_on_a_machine_that_reads_faster_than_it_copies_the_disk_decides():
    t4 = Hardware.preset("t4")
    fast = replace(t4, disk_read_bytes_per_s=2 * t4.gpu.h2d_bytes_per_s)
    curve = ((MIB, 1e9), (4 * QWEN.expert_bytes, 10e9))
    assert group_on(with_curves(fast, disk=curve, h2d=((256 * MIB, 1e9),)), QWEN) == 4


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """`short(name)`: a variant with short prompts, made once."""
    return cache(lambda name: make(RECIPES[name], tmp_path_factory.mktemp(name), (1, 5, 40, 17, 9, 20, 3, 30)))


@pytest.mark.parametrize(
    "name, group, percent",
    drawn(
        list(product(("qwen3", "qwen3-packed"), (1, 3, 32), ((100, 0, 100, 0, 100, 0), (0, 60, 100, 0, 100, 0)))),
        pairs=combinations(range(3), 2),
    ),
    ids=str,
)
def test_the_policy_decides_how_many_experts_move_as_one(name, group, percent, short, tmp_path):
    variant = short(name)
    policy = Policy.from_percent(
        percent, gpu_batch_size=4, num_gpu_batches=2, prompt_len=60, gen_len=GEN_LEN, experts_per_unit=group
    )
    llm = LLM(variant.directory, policy=policy, workload=Workload(prompt_len=60, gen_len=GEN_LEN), **offload(tmp_path))
    try:
        assert experts_per_unit(llm.engine.model.arch) == min(group, llm.engine.model.arch.num_experts)
        outputs = llm.generate(variant.prompts, SamplingParams(max_tokens=GEN_LEN, ignore_eos=True))
        for row, output in enumerate(outputs):
            assert_greedy(variant, row, list(output.outputs[0].token_ids), variant.expected(row))
    finally:
        llm.close()


def test_a_policy_file_carries_the_group(tmp_path):
    policy = Policy.from_percent(
        (20, 40, 100, 0, 100, 0), gpu_batch_size=8, num_gpu_batches=4, prompt_len=8, gen_len=8, experts_per_unit=4
    )
    PolicyFile(policy).save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["policy"]["experts_per_unit"] == 4
    assert PolicyFile.load(tmp_path / "p.json").policy == policy


@pytest.mark.parametrize("name", RECIPES)
def test_units_of_every_family_stay_within_the_planned_slack(name, tmp_path):
    make(RECIPES[name], tmp_path / "checkpoint", (1, 5))
    model = load_model(str(tmp_path / "checkpoint"))
    for group in (None, 8):
        grouped = model.grouped(group)
        source, slack = grouped.source(tmp_path), unit_slack_bytes(grouped.arch)
        for unit in units_of(grouped.arch):
            layout = source.layout(unit.id)
            assert layout.stored_bytes == unit.stored_bytes
            assert unit.stored_bytes <= min(layout.device_bytes, layout.host_bytes)
            assert max(layout.device_bytes, layout.host_bytes) <= unit.stored_bytes + slack
