"""What a run would allocate, checked against what may be taken, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from cost_model.memory.allocation import Sizes, sizes
from cost_model.memory.memory_plan import MemoryPlan, plan_memory
from cost_model.model.arch import ModelArch
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.routing.on_demand import OnDemand, entry_bytes
from flexmoe.engine.router_counter import coactivation_bytes
from flexmoe.errors import InfeasibleError, UsageError
from flexmoe.models.loader import Model, compute_dtype
from flexmoe.system.device import Device
from flexmoe.system.machine import available_host_bytes, free_disk_bytes
from flexmoe.weights.eviction import EXPERT_CACHES
from policies.common.checks import check_count
from policies.placement import describe
from policies.policy import Policy, Workload

GIB = 1 << 30
RESERVES = ("max", "p95")
#: Part of a GPU, and of the host's memory, that the cache leaves alone: the allocator cuts the one into pieces, and others
#: use the other.
_SPARED_SHARE = 0.05
_REMEDY = {
    "gpu": "raise --gpu-mem, or lower the GPU percents, --gpu-batch-size or --prefill-tokens",
    "cpu": "raise --cpu-mem, or lower the CPU percents or the block size",
    "gpu+cpu": "on device cpu both tiers are RAM: lower the GPU and CPU percents, or the block size",
    "disk": "raise --nvme-mem, or lower the disk shares",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run a model.

    Attributes:
        policy: placement, batch sizes and schedule.
        workload: mean prompt and completion lengths, from which the KV capacity follows.
        kv_tokens: KV capacity over all tiers, in tokens; None: from policy and workload.
        longest_row: tokens of the longest row; None: that of the workload.
        device: ``auto``, ``cuda`` or ``cpu``.
        dtype: compute dtype; ``auto`` is the checkpoint's.
        gpu_mem, cpu_mem, nvme_mem: budgets in GiB; None: what the machine has.
        offload_dir: where the disk tier's files go.
        gen_len: ``max_tokens`` of requests without one.
        keep_spans: record spans for a trace.
        eos_ids: ids that end a row.
        seed: of the random draws of requests that have none of their own.
        expert_cache: which of the cached experts are evicted in on-demand mode (`flexmoe.weights.eviction`): ``lfu``, ``lru``,
            ``static``, or ``off``, which streams all experts in every sweep.
        expert_usage: how often each expert was chosen in another run, or the path of that file.
        reserve: KV that a row is expected to need: ``max``, up to its ``max_tokens``, or ``p95``, what the job's rows
            have needed so far (`flexmoe.engine.length_estimate`).
        router_stats: count which experts are chosen together too, not only how often each is (`flexmoe.engine.router_counter`).
    """

    policy: Policy
    workload: Workload
    kv_tokens: int | None = None
    longest_row: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    gpu_mem: float | None = None
    cpu_mem: float | None = None
    nvme_mem: float | None = None
    offload_dir: Path = field(default_factory=lambda: Path.home() / "flexmoe_offload_dir")
    gen_len: int = 32
    keep_spans: bool = False
    eos_ids: tuple[int, ...] = ()
    seed: int = 0
    expert_cache: str = "lfu"
    expert_usage: ExpertUsage | str | Path | None = None
    reserve: str = "p95"
    router_stats: bool = False

    def __post_init__(self):
        object.__setattr__(self, "offload_dir", Path(self.offload_dir).expanduser())
        for name in ("gpu_mem", "cpu_mem", "nvme_mem"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} is {value}; give GiB of at least 0")
        for name in ("kv_tokens", "longest_row", "gen_len"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed!r}; give a whole number of 64 bits")
        if self.reserve not in RESERVES:
            raise UsageError(f"reserve is {self.reserve!r}; choose one of {', '.join(RESERVES)}")
        if isinstance(self.expert_usage, (str, Path)):
            object.__setattr__(self, "expert_usage", ExpertUsage.load(self.expert_usage))
        if self.expert_cache not in EXPERT_CACHES:
            raise UsageError(f"expert_cache is {self.expert_cache!r}; choose one of {', '.join(EXPERT_CACHES)}")
        if self.expert_cache == "static" and self.expert_usage is None:
            raise UsageError("a static expert cache keeps what another run used most; give its expert usage too")
        if not isinstance(self.policy, Policy):
            raise UsageError(f"the policy is {self.policy!r}; give a Policy or the path of a policy file")
        for name in ("compress_weight", "compress_cache"):
            if getattr(self.policy, name):
                raise UsageError(f"the policy asks for {name}, which this runtime does not have; set it to false")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """Device, dtype, counts and bytes of a run; ``budgets`` are bytes per tier, None without a limit."""

    device: Device
    dtype: torch.dtype
    sizes: Sizes
    memory: MemoryPlan
    budgets: Mapping[str, int | None]
    written_bytes: int
    policy: Policy

    @classmethod
    def of(cls, model: Model, config: EngineConfig) -> EnginePlan:
        """Plan a run and check that it fits.

        Raises:
            InfeasibleError: a tier has too few bytes; the sentence says how many are missing.
            UsageError: no such device or dtype.
        """
        device, arch = Device(config.device), model.arch.grouped(config.policy.experts_per_unit)
        dtype = compute_dtype(config.dtype, model, device.torch)
        kind = device.torch.type
        counts = sizes(
            arch,
            config.policy,
            config.workload,
            device=kind,
            kv_tokens=config.kv_tokens,
            longest_row=config.longest_row or 0,
        )
        if config.expert_usage is not None:
            config.expert_usage.check_model(arch)
        memory = _memory(arch, counts, config, kind, dtype)
        stored = ("weights",) if model.checkpoint is not None else ()  # a checkpoint's weights are on disk already
        written = sum(size for item, size in memory.parts["disk"].items() if item not in stored)
        budgets = _budgets(config, device)
        memory.check(budgets, _REMEDY)
        _check_disk(config.offload_dir, written)
        if config.expert_cache != "off":
            counts = replace(counts, cache_experts=_cache_experts(arch, counts, memory, budgets, config))
            memory = _memory(arch, counts, config, kind, dtype)
        return cls(
            device=device,
            dtype=dtype,
            sizes=counts,
            memory=memory,
            budgets=budgets,
            written_bytes=written,
            policy=config.policy,
        )

    def describe_weights(self) -> str:
        """Asked and achieved shares of the weights."""
        p = self.policy
        asked = (p.w_gpu_percent, p.w_cpu_percent, 100 - p.w_gpu_percent - p.w_cpu_percent)
        return describe(asked, self.sizes.placement.achieved_percent)

    def describe_cache(self) -> str:
        """Asked and achieved shares of the KV cache."""
        p, blocks = self.policy, self.sizes.kv_blocks
        asked = (p.cache_gpu_percent, p.cache_cpu_percent, 100 - p.cache_gpu_percent - p.cache_cpu_percent)
        total = sum(blocks.values())
        return describe(asked, tuple(100 * blocks[t] / total for t in ("gpu", "cpu", "disk")), "KV cache")

    def memory_lines(self) -> list[str]:
        """Bytes per tier beside the budget, largest items first."""
        lines = []
        for tier, items in self.memory.parts.items():
            budget = self.budgets.get(tier)
            limit = f" of {budget / GIB:.3f} GiB allowed" if budget is not None else ""
            largest = sorted(items.items(), key=lambda item: -item[1])
            detail = ", ".join(f"{name} {size / GIB:.3f}" for name, size in largest if size >= GIB / 2000)
            lines.append(f"memory {tier:>4}: {self.memory.total(tier) / GIB:.3f} GiB{limit} ({detail})")
        return lines


def _budgets(config: EngineConfig, device: Device) -> dict[str, int | None]:
    asked = {"gpu": config.gpu_mem, "cpu": config.cpu_mem, "disk": config.nvme_mem}
    budgets = {tier: None if gib is None else int(gib * GIB) for tier, gib in asked.items()}
    host = available_host_bytes()
    if not device.is_cuda:
        return {**budgets, "gpu+cpu": host}
    if budgets["gpu"] is not None:
        budgets["gpu"] = device.room(budgets["gpu"])
    free = torch.cuda.mem_get_info(device.torch)[0]
    for tier, has in (("gpu", free), ("cpu", host)):
        budgets[tier] = has if budgets[tier] is None else min(has, budgets[tier])
    return budgets


def _memory(arch: ModelArch, counts: Sizes, config: EngineConfig, device: str, dtype: torch.dtype) -> MemoryPlan:
    memory = plan_memory(arch, config.policy, counts, device=device, compute_bytes=dtype.itemsize)
    if not config.router_stats:
        return memory
    return MemoryPlan(
        parts={**memory.parts, "gpu": {**memory.parts["gpu"], "router statistics": coactivation_bytes(arch)}}
    )


def _cache_experts(
    arch: ModelArch, counts: Sizes, memory: MemoryPlan, budgets: Mapping[str, int | None], config: EngineConfig
) -> int:
    """Experts that fit the device memory which the plan leaves; on device cpu, what it leaves of a given budget."""
    if budgets["gpu"] is None:
        return 0
    left = budgets["gpu"] - memory.total("gpu")
    if "gpu+cpu" in budgets:  # a budget in RAM is met to the byte, and what the machine has is not
        both = int((1 - _SPARED_SHARE) * budgets["gpu+cpu"]) - memory.total("gpu") - memory.total("cpu")
        left = min(left, both)
    else:
        left -= int(_SPARED_SHARE * budgets["gpu"])
    streamed = np.count_nonzero(OnDemand.of(arch, counts.placement.tier_of, 0).streamed)
    return max(0, min(left // entry_bytes(arch), int(streamed)))


def _check_disk(directory: Path, written_bytes: int) -> None:
    free = free_disk_bytes(directory)
    if written_bytes > free:
        raise InfeasibleError(
            f"the disk tier writes {written_bytes / GIB:.3f} GiB to {directory}, which has {free / GIB:.3f} GiB free: "
            f"{written_bytes - free} bytes are missing; choose another --offload-dir or lower the disk shares"
        )
