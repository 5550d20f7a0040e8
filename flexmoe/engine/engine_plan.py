"""The plan of an engine: what it would allocate, checked against what may be taken, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cost_model.memory.allocation import PAGE_TOKENS, Allocation, allocate, entry_bytes
from cost_model.memory.memory_plan import MemoryPlan, allocator_bytes, plan_memory
from cost_model.model.arch import ModelArch
from cost_model.model.packing import packed_as
from cost_model.routing.on_demand import OnDemand
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.router_counter import coactivation_bytes
from flexmoe.errors import InfeasibleError
from flexmoe.models.loader import Model, compute_dtype
from flexmoe.system.device import Device
from flexmoe.system.machine import free_disk_bytes
from flexmoe.system.memory import process_bytes, process_limit_bytes
from policies.common.memory_units import GIB, in_units
from policies.common.option_names import option
from policies.placement import TIERS, describe
from policies.policy import Policy

#: Part of a GPU, and of the host's memory, that the cache leaves alone: the allocator cuts the one into pieces, and others
#: use the other.
_SPARED_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """What an engine allocates.

    Attributes:
        device: the compute device.
        dtype: compute dtype.
        allocation: numbers of all that is allocated: units, pages, slots, buffers.
        memory: bytes per tier, item by item.
        budgets: bytes that may be taken per tier; None without a limit.
        limit_bytes: of host memory, what the whole process may hold.
        written_bytes: bytes that are written to the offload directory.
        policy: of the engine.
        largest_row_tokens: tokens of the longest prompt and completion that the KV cache and its buffers hold.
    """

    device: Device
    dtype: torch.dtype
    allocation: Allocation
    memory: MemoryPlan
    budgets: Mapping[str, int | None]
    limit_bytes: int
    written_bytes: int
    policy: Policy
    largest_row_tokens: int

    @classmethod
    def of(cls, model: Model, config: EngineConfig) -> EnginePlan:
        """Plan an engine and check that it fits.

        Weights count as the policy has them packed, also where the model's are still to be packed.

        Raises:
            InfeasibleError: a tier has too few bytes; the sentence says how many are missing. Or the model is packed in another
                format than the policy's.
            UsageError: no such device or dtype.
        """
        device, policy = Device(config.device), config.policy
        arch = packed_as(model.arch, policy.compress_weight).grouped(policy.experts_per_unit)
        dtype = compute_dtype(config.dtype, model, device.torch)
        allocation = allocate(
            arch,
            config.policy,
            config.workload,
            device=device.kind,
            kv_tokens=config.kv_tokens,
            longest_row=config.longest_row or 0,
        )
        if config.known_usage is not None:
            config.known_usage.check_model(arch)
        if config.process_bytes is None:
            config = replace(config, process_bytes=process_bytes())
        memory = _memory(arch, allocation, config, device.kind, dtype)
        stored = ("weights",) if model.checkpoint is not None else ()  # a checkpoint's weights are on disk already
        written = sum(size for item, size in memory.parts["disk"].items() if item not in stored)
        budgets = budgets_of(config, device)
        memory.check(budgets)
        _check_disk(config.offload_dir, written)
        if config.expert_cache != "off":
            allocation = replace(allocation, cache_experts=_cache_experts(arch, allocation, memory, budgets, config))
            memory = _memory(arch, allocation, config, device.kind, dtype)
        return cls(
            device=device,
            dtype=dtype,
            allocation=allocation,
            memory=memory,
            budgets=budgets,
            limit_bytes=process_limit_bytes(config.memory_limit),
            written_bytes=written,
            policy=config.policy,
            largest_row_tokens=_largest_row_tokens(allocation, config),
        )

    @property
    def asked_weight_percent(self) -> tuple[float, float, float]:
        """(GPU, CPU, disk) of the weights as the policy says."""
        return _three(self.policy.w_gpu_percent, self.policy.w_cpu_percent)

    @property
    def asked_cache_percent(self) -> tuple[float, float, float]:
        """The same of the KV cache."""
        return _three(self.policy.cache_gpu_percent, self.policy.cache_cpu_percent)

    @property
    def achieved_cache_percent(self) -> tuple[float, float, float]:
        """The KV cache in whole pages."""
        pages = self.allocation.kv_pages
        gpu, cpu, disk = (100 * pages[tier] / sum(pages.values()) for tier in TIERS)
        return gpu, cpu, disk

    def describe_weights(self) -> str:
        """Asked and achieved shares of the weights."""
        return describe(self.asked_weight_percent, self.allocation.placement.achieved_percent)

    def describe_cache(self) -> str:
        """Asked and achieved shares of the KV cache."""
        return describe(self.asked_cache_percent, self.achieved_cache_percent, "KV cache")

    def memory_lines(self) -> list[str]:
        """Bytes per tier beside the budget, largest items first."""
        lines = []
        for tier, items in self.memory.parts.items():
            budget = self.budgets.get(tier)
            limit = f" of {budget / GIB:.3f} GiB allowed" if budget is not None else ""
            largest = sorted(items.items(), key=lambda item: -item[1])
            detail = ", ".join(f"{name} {size / GIB:.3f}" for name, size in largest if size >= GIB / 2000)
            detail = f" ({detail})" if detail else ""
            lines.append(f"memory {tier:>4}: {self.memory.total(tier) / GIB:.3f} GiB{limit}{detail}")
        return lines


def _three(gpu: float, cpu: float) -> tuple[float, float, float]:
    """With the rest, which is on disk; no less than nothing, though floats may say so."""
    return gpu, cpu, max(0.0, 100 - gpu - cpu)


def _largest_row_tokens(allocation: Allocation, config: EngineConfig) -> int:
    pages, longest_row = max(allocation.kv_pages.values()), config.longest_row
    held = allocation.kv_layout.longest_row(pages, config.policy.prefill_tokens)
    if allocation.fetch_pages and longest_row:  # the buffers of fetched KV are made for rows of this length
        return min(held, -(-longest_row // PAGE_TOKENS) * PAGE_TOKENS)
    return held


def budgets_of(config: EngineConfig, device: Device) -> dict[str, int | None]:
    """Bytes that may be taken per tier: what was asked for, and no more than the process may hold. None is no limit.

    The process itself is an item of the cpu tier. On device cpu it has no part in the budget of that tier; the tiers
    ``gpu`` and ``cpu`` have a common one too, ``gpu+cpu``, which is that of the whole process.
    """
    asked = {"gpu": config.gpu_mem, "cpu": config.cpu_mem, "disk": config.nvme_mem}
    budgets = {tier: None if gib is None else int(gib * GIB) for tier, gib in asked.items()}
    host = process_limit_bytes(config.memory_limit)
    if not device.is_cuda:
        cpu = None if budgets["cpu"] is None else budgets["cpu"] + (config.process_bytes or 0)
        return {**budgets, "cpu": cpu, "gpu+cpu": host}
    if (gpu := budgets["gpu"]) is not None:
        budgets["gpu"] = device.room(gpu)
    free = torch.cuda.mem_get_info(device.torch)[0]
    for tier, has in (("gpu", free - allocator_bytes(free)), ("cpu", host)):
        asked_bytes = budgets[tier]
        budgets[tier] = has if asked_bytes is None else min(has, asked_bytes)
    return budgets


def _memory(
    arch: ModelArch, allocation: Allocation, config: EngineConfig, device: str, dtype: torch.dtype
) -> MemoryPlan:
    memory = plan_memory(
        arch,
        config.policy,
        allocation,
        device=device,
        compute_bytes=dtype.itemsize,
        process_bytes=config.process_bytes or 0,
    )
    if not config.router_stats:
        return memory
    return MemoryPlan(
        parts={**memory.parts, "gpu": {**memory.parts["gpu"], "router statistics": coactivation_bytes(arch)}}
    )


def _cache_experts(
    arch: ModelArch, allocation: Allocation, memory: MemoryPlan, budgets: Mapping[str, int | None], config: EngineConfig
) -> int:
    """Experts that fit the device memory which the plan leaves; on device cpu, what it leaves of a given budget."""
    budget, host = budgets["gpu"], budgets.get("gpu+cpu")
    if budget is None:
        return 0
    left = budget - memory.total("gpu")
    if host is not None:  # a budget in RAM is met to the byte, and what the machine has is not
        left = min(left, int((1 - _SPARED_SHARE) * host) - memory.total("gpu") - memory.total("cpu"))
    else:
        left -= int(_SPARED_SHARE * budget)
    streamed = np.count_nonzero(OnDemand.of(arch, allocation.placement.tier_of, 0).streamed)
    return max(0, min(left // entry_bytes(arch), int(streamed)))


def _check_disk(directory: Path, written_bytes: int) -> None:
    free = free_disk_bytes(directory)
    if written_bytes > free:
        raise InfeasibleError(
            f"the disk tier writes {written_bytes / GIB:.3f} GiB to {directory}, which has {free / GIB:.3f} GiB free: "
            f"{in_units(written_bytes - free)} are missing; choose another {option('offload_dir')} or lower the disk shares"
        )
