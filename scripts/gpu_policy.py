"""A policy from simple arithmetic, until the planner exists: dense units and as many experts as fit on the GPU, the KV
cache in host memory and attended there, a share of the experts on disk where that leaves room for more rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from cost_model.arch import ModelArch
from cost_model.costs import MemoryPlan, plan_memory
from cost_model.sizes import Sizes, sizes
from flexmoe.errors import InfeasibleError
from policies.policy import Policy, Workload
from scripts.gpu_limit import Limit, Rates, steady_limit

NUM_GPU_BATCHES = 2
#: What the allocator cannot give back in one piece.
GPU_MARGIN_BYTES = 300_000_000
DISK_STEP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that may be taken.

    Args:
        gpu_bytes: for tensors, the CUDA context already taken off.
        host_bytes: for the ``cpu`` tier.
        disk_bytes: for the ``disk`` tier.
    """

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A policy that fits, and the limit of its own bytes."""

    policy: Policy
    sizes: Sizes
    memory: MemoryPlan
    limit: Limit


def choose(arch: ModelArch, workload: Workload, budget: Budget, rates: Rates, *, device: str = "cuda") -> Choice:
    """The fastest policy by its own limit, over the number of experts on disk.

    Raises:
        InfeasibleError: not even one row fits.
    """
    found = [c for c in _choices(arch, workload, budget, rates, device) if c is not None]
    if not found:
        raise InfeasibleError(
            f"no policy fits {budget.gpu_bytes / 1e9:.1f} GB on the GPU, {budget.host_bytes / 1e9:.1f} GB in host memory "
            f"and {budget.disk_bytes / 1e9:.1f} GB on disk"
        )
    return max(found, key=lambda choice: choice.limit.tokens_per_s)


def _choices(arch: ModelArch, workload: Workload, budget: Budget, rates: Rates, device: str) -> Iterator[Choice | None]:
    most = min(budget.disk_bytes // arch.expert_bytes, arch.num_layers * arch.num_experts)
    for on_disk in range(0, most + 1, DISK_STEP):
        yield _fit(arch, workload, budget, rates, on_disk, device)


def _fit(arch: ModelArch, workload: Workload, budget: Budget, rates: Rates, on_disk: int, device: str) -> Choice | None:
    """The most experts on the GPU, then the most rows, with so many experts on disk; None when nothing fits."""
    experts = arch.num_layers * arch.num_experts
    dense = sum(u.stored_bytes for u in arch.units() if u.kind != "expert")
    row_bytes = (workload.prompt_len + workload.gen_len / 2) * arch.kv_bytes_per_token(arch.dtype_bytes)
    on_gpu = int(max(0, min(experts - on_disk, (budget.gpu_bytes - dense) // arch.expert_bytes)))
    rows = _even((budget.host_bytes - (experts - on_gpu - on_disk) * arch.expert_bytes) / row_bytes)
    while rows >= NUM_GPU_BATCHES:
        choice = _plan(arch, workload, rates, on_gpu, on_disk, rows, device)
        gpu_over = choice.memory.total("gpu") + GPU_MARGIN_BYTES - budget.gpu_bytes
        host_over = choice.memory.total("cpu") - budget.host_bytes
        if gpu_over > 0 and on_gpu == 0:
            rows = int(0.9 * rows)  # the workspace of so many tokens is what does not fit
        elif gpu_over > 0:
            fewer = min(on_gpu, ceil(gpu_over / arch.expert_bytes))
            on_gpu, rows = on_gpu - fewer, rows - ceil(fewer * arch.expert_bytes / row_bytes)
        elif host_over > 0:
            rows -= ceil(host_over / row_bytes)
        else:
            return choice if choice.memory.total("disk") <= budget.disk_bytes else None
        rows = _even(rows)
    return None


def _plan(
    arch: ModelArch, workload: Workload, rates: Rates, on_gpu: int, on_disk: int, rows: int, device: str
) -> Choice:
    units = arch.units()
    total = sum(u.stored_bytes for u in units)
    dense = sum(u.stored_bytes for u in units if u.kind != "expert")
    gpu = dense + on_gpu * arch.expert_bytes
    gpu_percent = 100.0 * gpu / total
    policy = Policy.from_percent(
        (gpu_percent, 100.0 * (total - on_disk * arch.expert_bytes) / total - gpu_percent, 0.0, 100.0, 100.0, 0.0),
        gpu_batch_size=rows // NUM_GPU_BATCHES,
        num_gpu_batches=NUM_GPU_BATCHES,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        cpu_attention_percent=100.0,
    )
    counts = sizes(arch, policy, workload, device=device)
    streamed = sum(counts.placement.bytes_per_tier[tier] for tier in ("cpu", "disk"))
    return Choice(
        policy=policy,
        sizes=counts,
        memory=plan_memory(arch, policy, counts, device=device, compute_bytes=arch.dtype_bytes),
        limit=steady_limit(
            arch, workload, rates, rows=rows, w_streamed=streamed, w_on_disk=counts.placement.bytes_per_tier["disk"]
        ),
    )


def _even(rows: float) -> int:
    return int(rows // NUM_GPU_BATCHES) * NUM_GPU_BATCHES
