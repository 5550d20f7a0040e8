"""Planned bytes are those that the runtime takes, tier by tier and item by item."""

import json
import os
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import PAGE_TOKENS, allocate, kv_pages_per_tier, kv_tokens_wanted
from cost_model.memory.memory_plan import HOST_BUFFERS, MemoryPlan, plan_memory
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import unit_slack_bytes, units_of
from cost_model.timing.evaluate import evaluate
from flexmoe.checkpoint.unit_layout import UnitLayout
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.models.loader import load_model
from flexmoe.models.registry import family
from flexmoe.system.device import Device
from policies.common.errors import InfeasibleError
from policies.common.memory_units import GIB, MIB
from policies.common.memory_units import SYSTEM_PAGE_BYTES as PAGE_BYTES
from policies.placement import TIERS
from policies.policy import Policy, Workload

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 401,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
WORKLOAD = Workload(prompt_len=40, gen_len=20)
#: Weights, cache and activations (GPU, CPU; the rest is disk), and further fields of the policy.
POLICIES = {
    "everything resident": ((100, 0, 100, 0, 100, 0), {}),
    "everything on the host": ((0, 100, 0, 100, 0, 100), {}),
    "everything on disk": ((0, 0, 0, 0, 0, 0), {}),
    "mixed": ((30, 30, 30, 40, 34, 33), {}),
    "CPU attention": ((10, 20, 0, 100, 100, 0), {"cpu_attention_percent": 100.0}),
    "half CPU attention, serial": ((10, 20, 50, 50, 0, 100), {"cpu_attention_percent": 50.0, "overlap": False}),
    "static": ((50, 0, 0, 60, 100, 0), {"schedule": "static"}),
    "compressed cache": ((30, 30, 30, 40, 34, 33), {"compress_cache": True}),
}


def policy_of(percent, **rest):
    return Policy.from_percent(
        percent, gpu_batch_size=4, num_gpu_batches=3, prompt_len=WORKLOAD.prompt_len, gen_len=WORKLOAD.gen_len, **rest
    )


@pytest.fixture(scope="module")
def arch():
    return ModelArch.from_config(CONFIG, name="tiny")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, arch):
    directory = tmp_path_factory.mktemp("checkpoint")
    shapes = family(arch).expected_tensors(())
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def pages(nbytes):
    return max(PAGE_BYTES, -(-nbytes // PAGE_BYTES) * PAGE_BYTES)


@pytest.fixture
def host_buffers(monkeypatch):
    """Bytes of all host buffers made, whole pages, by what they are."""
    taken, real = Counter(), Device.host_buffer
    taken.made, taken.loading = [], []
    by_function = {"_begin_cpu": "cpu weights", "__init__": "cpu embedding rows"}

    def host_buffer(self, nbytes, *, pinned=True, shared=False):
        code = sys._getframe(1).f_code
        on_device = code.co_name == "device_buffer"
        code = sys._getframe(2).f_code if on_device else code
        path = Path(code.co_filename)
        module = f"{path.parent.name}.{path.stem}"
        name = {
            "weights.store": "gpu weights" if on_device else by_function.get(code.co_name, "cpu load buffers"),
            "weights.stream": "gpu slots" if on_device else "cpu staging slots",
            "kv.transfers": "cpu kv buffers",
            "kv.disk": "cpu kv buffers",
            "engine.hidden_states": "cpu activations",
            "kv.cache": "kv pools",
        }[module]
        taken[name] += pages(nbytes)
        taken.made.append(name)
        made = real(self, nbytes, pinned=pinned, shared=shared)
        if name == "cpu load buffers":
            taken.loading.append(weakref.ref(made))
        elif name not in ("cpu weights", "gpu weights"):
            assert not any(buffer() is not None for buffer in taken.loading), (
                f"{name}: buffers of loading are still there"
            )
        return made

    monkeypatch.setattr(Device, "host_buffer", host_buffer)
    return taken


def allocated(engine, host_buffers):
    """Bytes that an engine has taken at its start, ``{tier: {item: bytes}}`` as in a `MemoryPlan`."""
    result = {tier: {} for tier in TIERS}
    for name, size in host_buffers.items():
        if name != "kv pools":
            tier, item = name.split(" ", 1)
            result[tier][item] = size
    cache = engine.cache
    result["gpu"]["kv"], result["cpu"]["kv"] = pages(cache.gpu.nbytes), pages(cache.cpu.nbytes)
    result["cpu"]["kv tails"] = pages(cache.tail.nbytes)
    result["gpu"]["kv staging"] = sum(t.nbytes for t in engine.kv._staging)
    executor = engine.executor
    result["gpu"]["workspace"] = sum(t.nbytes for t in (executor._x_TD, executor._y_TD, executor._router_TE))
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_runtime_takes_what_was_planned(checkpoint, tmp_path, host_buffers, name, dtype):
    percent, rest = POLICIES[name]
    config = EngineConfig(
        policy=policy_of(percent, **rest),
        workload=WORKLOAD,
        device="cpu",
        dtype=dtype,
        offload_dir=tmp_path,
        process_bytes=0,  # what is allocated is compared
    )
    engine = Engine(load_model(str(checkpoint)), config)
    try:
        taken, planned = allocated(engine, host_buffers), engine.plan.memory
        units = len(engine.plan.allocation.placement.tier_of)
        slack_bytes = unit_slack_bytes(engine.model.arch)
        slack = {"weights": units * slack_bytes, "slots": engine.plan.allocation.slots * slack_bytes}
        # Gone before the rest is there; the plan has what they take beyond that.
        loading, taken["cpu"]["load buffers"] = taken["cpu"].pop("load buffers", 0), 0
        assert taken["cpu"].get("weights", 0) + loading <= planned.total("cpu") + 12 * PAGE_BYTES
        for tier in ("gpu", "cpu"):
            for item, size in taken[tier].items():
                asked = planned.parts[tier].get(item, 0)
                assert size <= asked + 12 * PAGE_BYTES, f"{tier} {item} takes more than planned"
                if item not in ("workspace", "load buffers"):  # what a sweep needs on top is not allocated at the start
                    assert size >= asked - slack.get(item, 0) - PAGE_BYTES, f"{tier} {item} takes less than planned"
            forgotten = (
                set(planned.parts[tier])
                - set(taken[tier])
                - {"cast", "workspace", "activations", "page rounding", "load buffers"}
            )
            assert not forgotten, f"{tier}: planned, but nothing was allocated for {forgotten}"
            assert sum(taken[tier].values()) <= planned.total(tier), f"{tier} takes more than planned in all"
        assert len(host_buffers.made) <= HOST_BUFFERS + len(engine.plan.allocation.activation_tiers)
    finally:
        engine.close()


def test_unit_layouts_stay_within_the_planned_slack(checkpoint):
    model = load_model(str(checkpoint))
    source = model.source(Path("."))
    for unit in units_of(model.arch):
        layout: UnitLayout = source.layout(unit.id)
        assert layout.stored_bytes == unit.stored_bytes
        assert unit.stored_bytes <= layout.device_bytes <= unit.stored_bytes + unit_slack_bytes(model.arch)
        assert unit.stored_bytes <= layout.host_bytes <= unit.stored_bytes + unit_slack_bytes(model.arch)


@pytest.mark.parametrize("compressed", [False, True])
def test_disk_tier_is_counted_as_written(compressed, checkpoint, tmp_path, arch):
    policy = policy_of((0, 0, 0, 0, 0, 0), compress_cache=compressed)
    allocation = allocate(arch, policy, WORKLOAD, device="cpu")
    plan = plan_memory(arch, policy, allocation, device="cpu", compute_bytes=4)
    assert plan.parts["disk"]["weights"] == sum(u.stored_bytes for u in units_of(arch))
    page = pages(PAGE_TOKENS * arch.kv_bytes_per_token_layer(4, compressed=compressed))
    assert plan.parts["disk"]["kv"] == allocation.kv_pages["disk"] * arch.num_layers * page


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", POLICIES)
def test_achieved_shares_are_near_the_asked_ones(arch, name, device):
    percent, rest = POLICIES[name]
    policy = policy_of(percent, **rest)
    allocation = allocate(arch, policy, WORKLOAD, device=device, kv_tokens=40 * PAGE_TOKENS)
    largest = 100 * max(u.stored_bytes for u in units_of(arch)) / sum(u.stored_bytes for u in units_of(arch))
    weights, cache, act = percent[0:2], percent[2:4], percent[4:6]
    for asked, achieved in zip(weights, allocation.placement.achieved_percent):
        assert abs(asked - achieved) <= largest
    blocks = allocation.kv_pages
    assert sum(blocks.values()) == 40
    for asked, tier in zip(cache, TIERS):
        assert abs(asked / 100 * 40 - blocks[tier]) < 1
    for asked, tier in zip(act, TIERS):
        assert abs(asked / 100 * 3 - allocation.activation_tiers.count(tier)) < 1
    assert (allocation.tails > 0) == (blocks["disk"] > 0)
    assert (allocation.staging_slots == 0) == ("disk" not in allocation.placement.tier_of.values())


def test_kv_capacity_follows_the_ages_of_the_rows():
    rolling = policy_of((100, 0, 100, 0, 100, 0))
    assert kv_tokens_wanted(rolling, WORKLOAD) == 12 * (40 + (20 + 16) // 2)
    assert kv_tokens_wanted(replace(rolling, schedule="static"), WORKLOAD) == 12 * 4 * PAGE_TOKENS
    mean_row = WORKLOAD.prompt_len + WORKLOAD.gen_len / 2
    assert 12 * mean_row <= kv_tokens_wanted(rolling, WORKLOAD) <= 12 * (mean_row + PAGE_TOKENS)


@pytest.mark.parametrize("gpu, cpu", [(0, 0), (1, 1), (34, 33), (50, 50), (0, 100), (99, 1)])
@pytest.mark.parametrize("kv_tokens", [1, 16, 17, 1000])
@pytest.mark.parametrize("longest", [1, 16, 17, 500])
def test_longest_row_always_fits_the_largest_tier(gpu, cpu, kv_tokens, longest):
    policy = policy_of((100, 0, gpu, cpu, 100, 0))
    blocks = kv_pages_per_tier(policy, kv_tokens / PAGE_TOKENS, -(-longest // PAGE_TOKENS))
    assert max(blocks.values()) * PAGE_TOKENS >= longest
    assert sum(blocks.values()) * PAGE_TOKENS >= kv_tokens
    for share, tier in zip((gpu, cpu, 100 - gpu - cpu), TIERS):
        assert (share == 0) <= (blocks[tier] == 0)


@pytest.mark.parametrize("gpu, cpu", [(0, 0), (1, 1), (34, 33), (50, 50), (0, 100), (99, 1)])
@pytest.mark.parametrize("rows", [1, 7, 12])
def test_every_tier_holds_whole_rows_of_a_static_block(arch, gpu, cpu, rows):
    policy = replace(policy_of((100, 0, gpu, cpu, 100, 0)), schedule="static", gpu_batch_size=rows, num_gpu_batches=1)
    allocation = allocate(arch, policy, WORKLOAD, device="cpu", longest_row=60)
    assert sum(allocation.kv_pages.values()) == rows * 4
    assert all(blocks % 4 == 0 for blocks in allocation.kv_pages.values())


def test_longest_row_is_the_workloads_where_none_is_given(arch):
    policy = policy_of((100, 0, 100, 0, 100, 0))
    blocks = allocate(arch, policy, WORKLOAD, device="cpu", kv_tokens=1).kv_pages
    assert blocks["gpu"] * PAGE_TOKENS >= 60
    assert allocate(arch, policy, WORKLOAD, device="cpu", kv_tokens=1, longest_row=500).kv_pages["gpu"] == 32


def test_no_buffer_is_planned_for_what_never_moves(arch):
    policy = policy_of((100, 0, 100, 0, 100, 0))
    allocation = allocate(arch, policy, WORKLOAD, device="cpu")
    assert (
        allocation.slots,
        allocation.staging_slots,
        allocation.tails,
        allocation.fetch_pages,
        allocation.write_pages,
    ) == (
        0,
        0,
        0,
        0,
        0,
    )
    all_on_cpu = policy_of((100, 0, 0, 100, 100, 0), cpu_attention_percent=100.0)
    assert allocate(arch, all_on_cpu, WORKLOAD, device="cpu").fetch_pages == 0


def plan_of(**gpu):
    return MemoryPlan(parts={"gpu": gpu, "cpu": {"kv": 10}, "disk": {}})


def test_plan_within_its_budgets_passes():
    plan_of(weights=100).check({"gpu": 100, "cpu": None, "gpu+cpu": 110}, {})


def test_budget_that_is_too_small_names_the_missing_bytes_and_the_largest_item():
    plan = plan_of(weights=3 << 30, slots=5)
    with pytest.raises(InfeasibleError) as error:
        plan.check({"cpu": 10, "gpu": 1 << 30}, {"gpu": "raise --gpu-mem"})
    assert str(error.value) == (
        "the gpu memory needs 3.000 GiB but has 1.000 GiB: 2.000 GiB are missing; "
        "the largest item is gpu weights with 3.000 GiB; raise --gpu-mem"
    )
    assert error.value.exit_code == 4


def test_shared_budget_counts_both_tiers():
    with pytest.raises(InfeasibleError, match=r"the gpu\+cpu memory needs .*: 1 bytes are missing"):
        plan_of(weights=100).check({"gpu": 100, "gpu+cpu": 109}, {"gpu+cpu": "lower both"})


def test_the_process_is_in_the_plan_of_planner_and_runtime(checkpoint, tmp_path):
    hardware = replace(Hardware.preset("cpu"), process_bytes=300 * MIB, host_memory_bytes=GIB)
    policy = policy_of((100, 0, 100, 0, 100, 0))
    arch = ModelArch.from_dir(checkpoint)
    without = evaluate(arch, replace(hardware, process_bytes=0), WORKLOAD, policy).memory
    memory = evaluate(arch, hardware, WORKLOAD, policy).memory
    assert memory.total("cpu") == without.total("cpu") + 300 * MIB and memory.total("gpu") == without.total("gpu")
    config = EngineConfig(
        policy=policy, workload=WORKLOAD, device="cpu", offload_dir=tmp_path, process_bytes=300 * MIB, memory_limit=1
    )
    plan = EnginePlan.of(load_model(str(checkpoint)), config)
    assert plan.memory.parts["cpu"]["process"] == 300 * MIB and plan.budgets["gpu+cpu"] == GIB
    assert "process 0.293" in " ".join(plan.memory_lines())


def test_a_policy_beyond_the_limit_of_the_process_is_refused_with_what_is_missing(checkpoint, tmp_path):
    policy = policy_of((100, 0, 100, 0, 100, 0))
    limits = {"memory_limit": 0.3, "process_bytes": 300 * MIB}
    config = EngineConfig(policy=policy, workload=WORKLOAD, device="cpu", offload_dir=tmp_path, **limits)
    with pytest.raises(
        InfeasibleError, match=r"gpu\+cpu memory needs .*\(0.293 GiB of it are the process itself\) but has 0.300"
    ):
        EnginePlan.of(load_model(str(checkpoint)), replace(config, memory_limit=0.3, kv_tokens=1 << 16))
    hardware = replace(Hardware.preset("cpu").with_budgets(memory_limit=0.25), process_bytes=300 * MIB)
    with pytest.raises(InfeasibleError, match="are missing.*raise memory_limit"):
        evaluate(ModelArch.from_dir(checkpoint), hardware, WORKLOAD, policy)


def test_too_small_a_budget_is_refused_before_anything_is_written(checkpoint, tmp_path, host_buffers):
    config = EngineConfig(
        policy=policy_of((0, 0, 0, 0, 0, 0)),
        workload=WORKLOAD,
        device="cpu",
        cpu_mem=1e-6,
        offload_dir=tmp_path / "off",
    )
    with pytest.raises(InfeasibleError, match="the cpu memory needs .* are missing.*raise cpu_mem"):
        Engine(load_model(str(checkpoint)), config)
    assert not host_buffers and not os.path.exists(tmp_path / "off")


def test_buffers_of_loading_count_only_beyond_what_comes_after_them(arch):
    percent, rest = next((percent, rest) for percent, rest in POLICIES.values() if percent[0])
    policy = policy_of(percent, **rest)
    loading = 4 * (max(u.stored_bytes for u in units_of(arch)) + unit_slack_bytes(arch))
    for kv_tokens in (40 * PAGE_TOKENS, 40_000 * PAGE_TOKENS):
        allocation = allocate(arch, policy, WORKLOAD, device="cuda", kv_tokens=kv_tokens)
        host = plan_memory(arch, policy, allocation, device="cuda", compute_bytes=4).parts["cpu"]
        later = sum(size for item, size in host.items() if item not in ("weights", "load buffers"))
        assert host.get("load buffers", 0) == max(0, loading - later)
