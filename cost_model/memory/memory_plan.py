"""Exact peak bytes per tier, item by item: planner and executor ask the same function.

Bytes follow the runtime's buffers one by one; a change there is a change here, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_model.memory.allocation import PAGE_TOKENS, Allocation, entry_bytes, slot_bytes
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import head_chunks, unit_slack_bytes
from policies.common.errors import InfeasibleError
from policies.common.memory_units import GIB, MIB, SYSTEM_PAGE_BYTES, align_up, in_units
from policies.common.option_names import option
from policies.placement import TIERS
from policies.policy import Policy
from policies.schedule import in_first_half

#: Host buffers that the runtime makes beside those of hidden states; each takes whole pages, an empty one too.
HOST_BUFFERS = 24
#: Tokens of one expert that are computed at once where the policy does not say: bounds the workspace, and keeps it in cache on
#: the CPU.
EXPERT_CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}
LOADS_IN_FLIGHT = 4
#: Masks of attention that are made at a time, on CUDA where it has no flash attention.
MASK_BYTES = 32 * MIB
#: Of a GPU's memory, what the allocator cannot give in one piece and libraries take later: this share, and at least so much.
_ALLOCATOR_SHARE, _ALLOCATOR_BYTES = 0.02, 256 * MIB
#: The item of host memory that no tensor of the plan takes: Python, libraries with what they keep, threads.
PROCESS = "process"
#: Bytes per vocabulary entry that the choice of one token takes at most: `flexmoe.sampling.sampler` takes 48, rounded up.
SAMPLED_ROW_BYTES = 64
#: The same of a scored position: its logits, in float32 too, and what `flexmoe.sampling.logprobs.PromptScores` makes of them.
SCORED_LOGIT_BYTES = 24


def expert_chunk(policy: Policy, device: str) -> int:
    """Tokens of an expert that are computed at once under a policy, on a device type."""
    return policy.expert_chunk or EXPERT_CHUNK_TOKENS[device]


def remedies() -> dict[str, str]:
    """What to change where a budget is too small, by budget."""
    rows, prompts = option("gpu_batch_size"), option("prefill_tokens")
    return {
        "gpu": f"raise {option('gpu_mem')}, or lower the GPU percents, {rows} or {prompts}",
        "cpu": f"raise {option('cpu_mem')} or {option('memory_limit')}, or lower the CPU percents or the block size",
        "gpu+cpu": f"on device cpu both tiers are RAM: raise {option('memory_limit')}, or lower the GPU and CPU percents, or "
        "the block size",
        "disk": f"raise {option('nvme_mem')}, or lower the disk shares",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes per tier, item by item. ``parts[tier][item]``."""

    parts: Mapping[str, Mapping[str, int]]

    def total(self, tier: str) -> int:
        """Bytes of a tier."""
        return sum(self.parts[tier].values())

    def check(self, budgets: Mapping[str, int | None], remedy: Mapping[str, str] | None = None) -> None:
        """Refuse a plan that is larger than a budget.

        Args:
            budgets: bytes per tier; None is no limit. ``gpu`` and ``cpu`` may share memory under the key ``gpu+cpu``.
            remedy: per budget, the option and what to lower; None: `remedies`.

        Raises:
            InfeasibleError: names the tier, the missing bytes and the largest item.
        """
        for name, budget in budgets.items():
            if budget is None:
                continue
            tiers = name.split("+")
            need = sum(self.total(t) for t in tiers)
            if need > budget:
                items = {f"{t} {item}": size for t in tiers for item, size in self.parts[t].items() if item != PROCESS}
                process = self.parts[tiers[-1]].get(PROCESS, 0)
                own = f" ({process / GIB:.3f} GiB of it are the process itself)" if process else ""
                largest = max(items, key=items.__getitem__)
                raise InfeasibleError(
                    f"the {name} memory needs {need / GIB:.3f} GiB{own} but has {budget / GIB:.3f} GiB: "
                    f"{in_units(need - budget)} are missing; the largest item is {largest} with "
                    f"{items[largest] / GIB:.3f} GiB; {(remedy or remedies())[name]}"
                )


def plan_memory(
    arch: ModelArch,
    policy: Policy,
    allocation: Allocation,
    *,
    device: str,
    compute_bytes: int,
    process_bytes: int = 0,
) -> MemoryPlan:
    """Bytes that each tier holds at its peak.

    Args:
        allocation: from `allocate`.
        device: ``cpu`` or ``cuda``.
        compute_bytes: bytes of one number in the compute dtype.
        process_bytes: host memory of the process beside all of this (`Hardware.process_bytes`).
    """
    arch = arch.grouped(policy.experts_per_unit)
    weights = _weight_bytes(arch, allocation, device, compute_bytes, policy)
    kv = _kv_bytes(arch, allocation, device, compute_bytes, compressed=policy.compress_cache)
    act = _activation_bytes(arch, policy, allocation, device, compute_bytes)
    parts = {tier: {**weights[tier], **kv[tier], **act[tier]} for tier in TIERS}
    parts["cpu"]["load buffers"] = _beside_later(parts["cpu"])
    parts["cpu"][PROCESS] = process_bytes
    return MemoryPlan(parts={t: {k: v for k, v in items.items() if v} for t, items in parts.items()})


def _beside_later(host: Mapping[str, int]) -> int:
    """What the buffers that resident weights are loaded through take of host memory beyond all that comes after them: they are
    given back before anything but weights is allocated."""
    later = sum(size for item, size in host.items() if item not in ("weights", "load buffers"))
    return max(0, host["load buffers"] - later)


def _weight_bytes(
    arch: ModelArch, allocation: Allocation, device: str, b: int, policy: Policy
) -> dict[str, dict[str, int]]:
    at = allocation.placement
    slot, slack = slot_bytes(arch, at), unit_slack_bytes(arch)
    gpu = arch.computed_bytes(at.bytes_of("gpu"), b) + at.count_of("gpu") * slack
    cast = arch.computed_bytes(slot, b) if slot and b != arch.dtype_bytes else 0
    if allocation.held_slots and at.count_of("cpu", "attention") + at.count_of("disk", "attention"):
        cast *= 3  # the attention of two layers is cast at once, beside an expert
    cpu = at.bytes_of("cpu") + at.count_of("cpu") * slack
    staging = allocation.staging_slots * slot if device == "cuda" else 0
    largest = max(at.residency.largest_streamed_bytes(0), arch.embed_params * arch.dtype_bytes)
    loading = min(LOADS_IN_FLIGHT, at.count_of("gpu")) * (largest + slack)
    rows = allocation.max_tokens * arch.hidden * arch.dtype_bytes if not at.count_of("gpu", "embed") else 0
    return {
        "gpu": {
            "weights": gpu,
            "slots": allocation.slots * slot,
            "cast": cast,
            "unpacked": _unpacked_bytes(arch, b),
            "expert cache": allocation.cache_experts * entry_bytes(arch) if allocation.cache_experts else 0,
        },
        "cpu": {"weights": cpu, "staging slots": staging, "load buffers": loading, "embedding rows": rows},
        "disk": {"weights": allocation.placement.bytes_per_tier["disk"]},
    }


def _unpacked_bytes(arch: ModelArch, b: int) -> int:
    """The buffer that packed matrices are unpacked into: the largest of them."""
    heads = arch.num_heads * arch.head_dim
    sizes = {
        "attention": arch.hidden * heads,
        "expert": arch.hidden * arch.ffn * (1 + arch.gate_up_alternate),
        "dense": arch.hidden * max(arch.dense_ffn, arch.shared_ffn),
    }
    return max((size * b for kind, size in sizes.items() if arch.is_packed(kind)), default=0)


def _layer_page_bytes(arch: ModelArch, b: int, *, compressed: bool) -> int:
    """Bytes of a KV page of one layer."""
    return arch.kv_bytes_per_token_layer(b, compressed=compressed) * PAGE_TOKENS


def kv_disk_page_bytes(arch: ModelArch, b: int, *, compressed: bool) -> int:
    """A KV page of one layer in the disk tier's file, where each page begins at a boundary that direct reads and writes can have."""
    return align_up(_layer_page_bytes(arch, b, compressed=compressed))


def _kv_bytes(
    arch: ModelArch, allocation: Allocation, device: str, b: int, *, compressed: bool
) -> dict[str, dict[str, int]]:
    page = _layer_page_bytes(arch, b, compressed=compressed)
    layers = len(arch.kv_groups[0].layers)  # of a page
    disk_page = kv_disk_page_bytes(arch, b, compressed=compressed)
    staging = 2 * allocation.fetch_pages * page
    on_disk = allocation.kv_pages["disk"] > 0
    down = landing = 0
    if device == "cuda":
        query = arch.num_heads * arch.head_dim * b
        down = 2 * allocation.batch_tokens * (page // PAGE_TOKENS + 2 * query)
        landing = allocation.fetch_pages * page // 2  # K, then V
    return {
        "gpu": {
            "kv": allocation.kv_pages["gpu"] * page * layers,
            "kv staging": staging + landing,
            "kv gathered": allocation.gather_pages * _gathered_page_bytes(arch, b, compressed=compressed),
            "masks": _masks(arch, allocation, b),
        },
        "cpu": {
            "kv": allocation.kv_pages["cpu"] * page * layers,
            "kv tails": allocation.tails * page * arch.num_layers,
            "kv buffers": staging
            + (2 * (allocation.fetch_pages + allocation.write_pages) * disk_page if on_disk else 0)
            + down,
        },
        "disk": {"kv": allocation.kv_pages["disk"] * disk_page * layers},
    }


def _gathered_page_bytes(arch: ModelArch, b: int, *, compressed: bool) -> int:
    """Of a page that is copied for attention: K and V as they are attended; compressed ones, first K and then V, also as they
    are stored, and their scales in float32."""
    attended = _layer_page_bytes(arch, b, compressed=False)
    if not compressed:
        return attended
    return attended + _layer_page_bytes(arch, b, compressed=True) // 2 + PAGE_TOKENS * arch.num_kv_heads * 4


def _masks(arch: ModelArch, allocation: Allocation, b: int) -> int:
    """Of a piece of a GPU batch: `MASK_BYTES`, no more than all queries need, and no less than one needs."""
    sinks = arch.num_heads if arch.sinks else 0
    one = allocation.gather_pages * PAGE_TOKENS * mask_bytes(arch.num_heads // arch.num_kv_heads, b, sinks)
    return min(max(MASK_BYTES, one), allocation.batch_tokens * one)


def mask_bytes(shared: int, b: int, sink_heads: int = 0) -> int:
    """Bytes of the masks of one query of a row and one key, where ``shared`` query heads share a KV head: of the row, of
    its heads, and the latter as numbers of ``b`` bytes. Where heads have sinks there are their scores, too, twice."""
    return 8 + shared * (2 + b) + sink_heads * (4 + b)


def allocator_bytes(memory_bytes: int) -> int:
    """What is kept free of so much GPU memory for the allocator and for what libraries take in a run."""
    return max(_ALLOCATOR_BYTES, int(_ALLOCATOR_SHARE * memory_bytes))


def sampling_bytes(arch: ModelArch, policy: Policy) -> int:
    """Memory beside a sweep's logits in which tokens are chosen, a few rows at a time: 4 bytes per logit, and no less than one
    row takes."""
    return arch.vocab_size * max(4 * policy.block_size, SAMPLED_ROW_BYTES)


def scored_at_once(arch: ModelArch, policy: Policy, allocation: Allocation, *, device: str, compute_bytes: int) -> int:
    """Positions of prompts whose log-probabilities over a chunk of the head are computed at a time, at least 1.

    They take what the largest workspace of a sweep has beside the logits of its rows: attention and experts are done by then.

    Args:
        arch: the shape, with the units of the run.
        allocation: from `allocate`.
        device: ``cpu`` or ``cuda``.
        compute_bytes: bytes of one number in the compute dtype.
    """
    spaces = _workspaces(arch, policy, allocation, device, compute_bytes)
    room = max(spaces.values()) - policy.block_size * _logit_row_bytes(arch, compute_bytes)
    return max(1, room // (SCORED_LOGIT_BYTES * -(-arch.vocab_size // head_chunks(arch))))


def _logit_row_bytes(arch: ModelArch, b: int) -> int:
    return (arch.vocab_size + 2 * arch.hidden) * b


def _workspaces(arch: ModelArch, policy: Policy, allocation: Allocation, device: str, b: int) -> dict[str, int]:
    """Bytes that attention, the experts and the head take beside the block, one after the other."""
    batch, hidden = allocation.batch_tokens, arch.hidden
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    # While the experts of one half compute, two GPU batches of the other one wait: queries, keys and values, and what the CPU attended.
    waiting = 2 * batch * (2 * heads + 2 * kv_heads) * b if policy.halves > 1 else 0
    if policy.halves > 1 and allocation.head_in_halves:  # in the last layer, the logits of the first half
        waiting = max(waiting, in_first_half(policy.num_gpu_batches) * policy.gpu_batch_size * arch.vocab_size * b)
    chunk, step = (min(n, allocation.max_tokens) for n in (expert_chunk(policy, device), EXPERT_CHUNK_TOKENS[device]))
    width = max(arch.ffn, arch.dense_ffn)
    # Widened, or padded (`flexmoe.kernels.linear`).
    wide = 4 if device == "cpu" else 0
    copied = chunk * max(width, hidden) * wide
    shared = 2 * batch * hidden * b + step * (2 * (arch.shared_ffn + hidden) * b + max(arch.shared_ffn, hidden) * wide)
    return {
        "attention": 2 * batch * (4 * heads + 6 * kv_heads + 2 * hidden) * b + 3 * batch * hidden * 4,
        "experts": chunk * (2 * width + 2 * hidden) * b + copied + waiting,
        "shared": shared if arch.shared_ffn else 0,
        "logits": policy.block_size * _logit_row_bytes(arch, b) + sampling_bytes(arch, policy),
    }


def _activation_bytes(
    arch: ModelArch, policy: Policy, allocation: Allocation, device: str, b: int
) -> dict[str, dict[str, int]]:
    tokens, batch, hidden = allocation.max_tokens, allocation.batch_tokens, arch.hidden
    tiers = allocation.activation_tiers
    home = batch * hidden * b
    away = len(tiers) - tiers.count("gpu")
    block = tokens * (2 * hidden * b + arch.num_experts * (4 if arch.router_float32 else b)) + tokens * arch.top_k * 32
    resident = min(tokens * hidden * b, tiers.count("gpu") * home) + min(2, away) * home
    return {
        "gpu": {
            "activations": resident,
            "workspace": block + max(_workspaces(arch, policy, allocation, device, b).values()),
        },
        "cpu": {
            "activations": tiers.count("cpu") * home + (2 * home if "disk" in tiers else 0),
            "page rounding": (HOST_BUFFERS + len(tiers)) * SYSTEM_PAGE_BYTES,
        },
        "disk": {"activations": tiers.count("disk") * (home + SYSTEM_PAGE_BYTES)},
    }
