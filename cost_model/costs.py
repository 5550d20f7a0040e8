"""Exact bytes: what every tier must hold to run a policy. The planner and the executor ask the same function.

Sizes follow the runtime's buffers one by one; a change there is a change here, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from cost_model.arch import ModelArch
from policies.errors import InfeasibleError
from policies.placement import TIERS, Placement, place_batches, place_blocks, place_weights
from policies.policy import Policy, Workload

#: Page-aligned supersets of a unit's file extents, and 256-byte boundaries on the device, cost at most this much.
UNIT_SLACK_BYTES = 64 << 10
BLOCK_TOKENS = 16
PAGE_BYTES = 4096
#: Host buffers that the runtime makes beside those of hidden states; each takes whole pages, an empty one too.
HOST_BUFFERS = 24
#: Tokens of one expert that are computed at once: bounds the workspace, and keeps it in cache on the CPU.
EXPERT_CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}
LOADS_IN_FLIGHT = 4
LOOK_AHEAD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Counts that follow from model, policy and workload; the runtime allocates by them.

    Attributes:
        placement: tier of every weight unit.
        activation_tiers: tier of each GPU batch's hidden states.
        kv_blocks: KV blocks per tier (each of all layers).
        tails: rows that the disk tier holds at once.
        max_tokens: most tokens of a sweep.
        batch_tokens: most tokens of a GPU batch in a sweep.
        slots: weight slots on the compute device.
        staging_slots: host slots that disk units pass through on CUDA.
        fetch_blocks: blocks of one layer that a GPU batch may bring to the device (0: none ever are).
        write_blocks: disk-tier blocks that the runs of a GPU batch may touch.
    """

    placement: Placement
    activation_tiers: tuple[str, ...]
    kv_blocks: dict[str, int]
    tails: int
    max_tokens: int
    batch_tokens: int
    slots: int
    staging_slots: int
    fetch_blocks: int
    write_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes per tier, item by item. ``parts[tier][item]``."""

    parts: Mapping[str, Mapping[str, int]]

    def total(self, tier: str) -> int:
        """Bytes of a tier."""
        return sum(self.parts[tier].values())

    def check(self, budgets: Mapping[str, int | None], remedy: Mapping[str, str]) -> None:
        """Refuse a plan that is larger than a budget.

        Args:
            budgets: bytes per tier; None is no limit. ``gpu`` and ``cpu`` may share memory under the key ``gpu+cpu``.
            remedy: per budget, the flag and what to lower.

        Raises:
            InfeasibleError: names the tier, the missing bytes and the largest item.
        """
        for name, budget in budgets.items():
            if budget is None:
                continue
            tiers = name.split("+")
            need = sum(self.total(t) for t in tiers)
            if need > budget:
                items = {f"{t} {item}": size for t in tiers for item, size in self.parts[t].items()}
                largest = max(items, key=items.__getitem__)
                raise InfeasibleError(
                    f"the {name} memory needs {need / 2**30:.3f} GiB but has {budget / 2**30:.3f} GiB: "
                    f"{need - budget} bytes are missing; the largest item is {largest} with "
                    f"{items[largest] / 2**30:.3f} GiB; {remedy[name]}"
                )


def kv_tokens_wanted(policy: Policy, workload: Workload) -> int:
    """KV capacity in tokens that keeps ``block_size`` rows of the workload in flight.

    Rolling rows are of all ages, so their mean context is s + n/2; a static block marches to s + n together.
    """
    s, n = workload.prompt_len, workload.gen_len
    if policy.schedule == "static":
        return policy.block_size * ceil((s + n) / BLOCK_TOKENS) * BLOCK_TOKENS
    return policy.block_size * (s + ceil((n + BLOCK_TOKENS) / 2))


def kv_blocks_per_tier(policy: Policy, kv_tokens: int, longest_row: int) -> dict[str, int]:
    """KV blocks per tier, the policy's shares rounded once; a row of ``longest_row`` tokens fits the largest tier."""
    total = max(1, ceil(kv_tokens / BLOCK_TOKENS))
    shares = policy.cache_gpu_percent, policy.cache_cpu_percent
    needed = ceil(longest_row / BLOCK_TOKENS)
    blocks = place_blocks(total, *shares)
    while max(blocks.values()) < needed:
        total += needed - max(blocks.values())
        blocks = place_blocks(total, *shares)
    return blocks


def sizes(
    arch: ModelArch,
    policy: Policy,
    workload: Workload,
    *,
    device: str,
    kv_tokens: int | None = None,
    longest_row: int = 0,
) -> Sizes:
    """Counts for running ``policy`` on a device type (``cpu`` or ``cuda``).

    Args:
        kv_tokens: KV capacity over all tiers; default `kv_tokens_wanted`.
        longest_row: tokens of the longest row, prompt and completion; default that of the workload.
    """
    placement = place_weights(arch.units(), policy.w_gpu_percent, policy.w_cpu_percent)
    longest = longest_row or workload.prompt_len + workload.gen_len
    blocks = kv_blocks_per_tier(policy, kv_tokens or kv_tokens_wanted(policy, workload), longest)
    batch_tokens = policy.prefill_tokens + policy.gpu_batch_size
    fetches = blocks["disk"] > 0 or (blocks["cpu"] > 0 and policy.cpu_attention_percent < 100)
    reachable = min(policy.gpu_batch_size * max(blocks.values()), blocks["cpu"] + blocks["disk"])
    disk_share = 1 - (policy.cache_gpu_percent + policy.cache_cpu_percent) / 100
    tails = min(policy.block_size, max(1, ceil(policy.block_size * disk_share))) if blocks["disk"] else 0
    slot = slot_bytes(arch, placement)
    streamed = sum(1 for t in placement.tier_of.values() if t != "gpu")
    ahead = min(streamed, max(4, min(arch.num_experts + 2, LOOK_AHEAD_BYTES // max(1, slot))))
    on_disk = sum(1 for t in placement.tier_of.values() if t == "disk")
    return Sizes(
        placement=placement,
        activation_tiers=place_batches(policy.num_gpu_batches, policy.act_gpu_percent, policy.act_cpu_percent),
        kv_blocks=blocks,
        tails=tails,
        max_tokens=policy.prefill_tokens + policy.block_size,
        batch_tokens=batch_tokens,
        slots=min(4, ahead) if device == "cuda" else ahead,
        staging_slots=min(on_disk, ahead) if policy.pin_weight else ahead,
        # A run's own tokens may open one block more than its past fills.
        fetch_blocks=reachable + policy.gpu_batch_size if fetches else 0,
        write_blocks=ceil(batch_tokens / BLOCK_TOKENS) + 2 * policy.gpu_batch_size if blocks["disk"] else 0,
    )


def slot_bytes(arch: ModelArch, placement: Placement) -> int:
    """Bytes of a weight slot: the largest unit that is streamed."""
    streamed = [u.stored_bytes for u in arch.units() if u.kind != "embed" and placement.tier_of[u.name] != "gpu"]
    return max(streamed) + UNIT_SLACK_BYTES if streamed else 0


def plan_memory(arch: ModelArch, policy: Policy, counts: Sizes, *, device: str, compute_bytes: int) -> MemoryPlan:
    """Bytes that each tier holds at its peak.

    Args:
        counts: from `sizes`.
        device: ``cpu`` or ``cuda``.
        compute_bytes: bytes of one number in the compute dtype.
    """
    weights = _weight_bytes(arch, counts, device, compute_bytes, policy)
    kv = _kv_bytes(arch, counts, device, compute_bytes, policy)
    act = _activation_bytes(arch, policy, counts, device, compute_bytes)
    parts = {tier: {**weights[tier], **kv[tier], **act[tier]} for tier in TIERS}
    return MemoryPlan(parts={t: {k: v for k, v in items.items() if v} for t, items in parts.items()})


def _weight_bytes(arch: ModelArch, counts: Sizes, device: str, b: int, policy: Policy) -> dict[str, dict[str, int]]:
    units = arch.units()
    tier_of = counts.placement.tier_of
    slot = slot_bytes(arch, counts.placement)
    resident = [u.stored_bytes for u in units if tier_of[u.name] == "gpu"]
    largest = max(u.stored_bytes for u in units)
    gpu = sum(size // arch.dtype_bytes * b + UNIT_SLACK_BYTES for size in resident)
    cast = slot // arch.dtype_bytes * b if slot and b != arch.dtype_bytes else 0
    cpu = sum(u.stored_bytes + UNIT_SLACK_BYTES for u in units if tier_of[u.name] == "cpu")
    staging = counts.staging_slots * slot if device == "cuda" else 0
    loading = min(LOADS_IN_FLIGHT, len(resident)) * (largest + UNIT_SLACK_BYTES)
    rows = counts.max_tokens * arch.hidden * arch.dtype_bytes if tier_of["embed"] != "gpu" else 0
    return {
        "gpu": {"weights": gpu, "slots": counts.slots * slot, "cast": cast},
        "cpu": {"weights": cpu, "staging slots": staging, "load buffers": loading, "embedding rows": rows},
        "disk": {"weights": counts.placement.bytes_per_tier["disk"]},
    }


def _kv_bytes(arch: ModelArch, counts: Sizes, device: str, b: int, policy: Policy) -> dict[str, dict[str, int]]:
    block = arch.kv_bytes_per_token_layer(b) * BLOCK_TOKENS
    staging = 2 * counts.fetch_blocks * block
    on_disk = counts.kv_blocks["disk"] > 0
    down = landing = gathered = 0
    if device == "cuda":
        query = arch.num_heads * arch.head_dim * b
        down = 2 * counts.batch_tokens * (arch.kv_bytes_per_token_layer(b) + 2 * query)
        landing = counts.fetch_blocks * block // 2  # K, then V
        gathered = _gathered_blocks(policy, counts) * block
    return {
        "gpu": {
            "kv": counts.kv_blocks["gpu"] * block * arch.num_layers,
            "kv staging": staging + landing,
            "kv gathered": gathered,
        },
        "cpu": {
            "kv": counts.kv_blocks["cpu"] * block * arch.num_layers,
            "kv tails": counts.tails * block * arch.num_layers,
            "kv buffers": staging + (2 * (counts.fetch_blocks + counts.write_blocks) * block if on_disk else 0) + down,
        },
        "disk": {"kv": counts.kv_blocks["disk"] * block * arch.num_layers},
    }


def _gathered_blocks(policy: Policy, counts: Sizes) -> int:
    """Blocks of one layer that attention on the GPU pads to rows of like length (`flexmoe.attention`) and holds at once."""
    rows = policy.gpu_batch_size
    attended = max(counts.fetch_blocks, counts.kv_blocks["gpu"])
    return ceil(1.25 * attended) + 3 * rows if attended else 0


def _activation_bytes(arch: ModelArch, policy: Policy, counts: Sizes, device: str, b: int) -> dict[str, dict[str, int]]:
    tokens, batch, hidden = counts.max_tokens, counts.batch_tokens, arch.hidden
    tiers = counts.activation_tiers
    home = batch * hidden * b
    away = len(tiers) - tiers.count("gpu")
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    attention = 2 * batch * (4 * heads + 6 * kv_heads + 2 * hidden) * b + 3 * batch * hidden * 4
    chunk = min(EXPERT_CHUNK_TOKENS[device], tokens)
    expert = chunk * (2 * arch.ffn + 2 * hidden) * b
    block = tokens * (2 * hidden + arch.num_experts) * b + tokens * arch.top_k * 32
    logits = policy.block_size * (arch.vocab_size * (b + 4) + 2 * hidden * b)
    resident = min(tokens * hidden * b, tiers.count("gpu") * home) + min(2, away) * home
    return {
        "gpu": {"activations": resident, "workspace": block + max(attention, expert, logits)},
        "cpu": {
            "activations": tiers.count("cpu") * home + (2 * home if "disk" in tiers else 0),
            "page rounding": (HOST_BUFFERS + len(tiers)) * PAGE_BYTES,
        },
        "disk": {"activations": tiers.count("disk") * (home + PAGE_BYTES)},
    }
