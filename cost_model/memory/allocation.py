"""Counts that follow from model, policy and workload: units, KV pages, rows and tokens. The runtime allocates by them.

The policy's shares are turned into whole numbers here, once, by `policies.placement`; `cost_model.memory.memory_plan`
and `cost_model.timing.op_costs` turn the numbers into bytes and seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from cost_model.model.arch import LayerGroup, ModelArch
from cost_model.model.weight_units import expert_units, unit_slack_bytes, units_of
from policies.admission.kv_pages import KVPages
from policies.admission.shared_prefix import shared_tokens
from policies.common.errors import InfeasibleError, UsageError
from policies.common.memory_units import GIB, align_up
from policies.placement import Placement, Residency, place_batches, place_pieces
from policies.policy import Policy
from policies.workload import Workload

PAGE_TOKENS = 16
LOOK_AHEAD_BYTES = GIB
#: Transfers of KV pages to or from disk that are under way at once.
KV_TRANSFERS = 8
#: K and V that attention on CUDA copies side by side at a time, a single row's excepted.
GATHER_BYTES = GIB // 4
#: Slots that stream attention, dense layers and the head in on-demand mode.
KEPT_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Counts for one run.

    Attributes:
        placement: tier of every weight unit.
        activation_tiers: tier of each GPU batch's hidden states.
        kv_pages: KV pages per tier (each of the layers of a group).
        kv_layout: pages of a row.
        tails: rows that the disk tier holds at once.
        max_tokens: most tokens of a sweep.
        batch_tokens: most tokens of a GPU batch in a sweep.
        slots: weight slots on the compute device.
        held_slots: those of them that two half-blocks hold at once: a layer's streamed units, until both have used them; 0 where
            the block marches as one.
        staging_slots: host slots that disk units pass through on CUDA.
        fetch_pages: pages of one layer that a GPU batch may bring to the device (0: none ever are).
        gather_pages: pages of one layer that attention on CUDA copies side by side (0: none ever are).
        write_pages: disk-tier pages that the runs of a GPU batch may touch.
        stretch_tokens: tokens of KV that lie side by side on disk on average: a prompt, and each page that it grew by.
        cache_experts: experts that device memory beyond the slots holds (`cost_model.routing.on_demand`).
        recompute_past: length beyond which a row's KV is computed anew; None: never.
    """

    placement: Placement
    activation_tiers: tuple[str, ...]
    kv_pages: dict[str, int]
    kv_layout: KVPages
    tails: int
    max_tokens: int
    batch_tokens: int
    slots: int
    staging_slots: int
    fetch_pages: int
    gather_pages: int
    write_pages: int
    stretch_tokens: float
    recompute_past: int | None = None
    cache_experts: int = 0
    held_slots: int = 0

    @property
    def head_in_halves(self) -> bool:
        """Whether each of two half-blocks has the head computed for itself (`policies.schedule.SweepShape.first_part`)."""
        return not self.placement.count_of("cpu", "head") + self.placement.count_of("disk", "head")

    @property
    def shares_disk(self) -> bool:
        """KV or hidden states live on disk, in small transfers, beside what else is read there."""
        return self.kv_pages["disk"] > 0 or "disk" in self.activation_tiers


def allocate(
    arch: ModelArch,
    policy: Policy,
    workload: Workload,
    *,
    device: str,
    kv_tokens: int | None = None,
    longest_row: int = 0,
) -> Allocation:
    """Counts for running ``policy`` on a device type (``cpu`` or ``cuda``).

    Args:
        kv_tokens: KV capacity over all tiers; default `kv_tokens_wanted`.
        longest_row: tokens of the longest row, prompt and completion, which the buffers of fetched KV are made for;
            default: rows as long as a tier can hold.
    """
    arch = arch.grouped(policy.experts_per_unit)
    placement = residency(arch, policy.expert_order).place(policy.w_gpu_percent, policy.w_cpu_percent)
    longest = longest_row or workload.longest_row
    layout = kv_layout(arch.kv_groups)
    together = layout.held(workload.prompt_len + workload.gen_len) if policy.schedule == "static" else 1
    pages = kv_pages_per_tier(
        policy,
        _kv_pages_wanted(layout, policy, workload, kv_tokens),
        layout.most(longest, min(longest, policy.prefill_tokens)),
        together,
    )
    batch_tokens = policy.prefill_tokens + policy.gpu_batch_size
    held = held_slots(arch, placement) if policy.halves > 1 else 0
    slots, staging_slots = _slots(arch, policy, placement, device, held)
    fetch_pages = _fetch_pages(policy, layout, pages, longest_row)
    return Allocation(
        placement=placement,
        activation_tiers=place_batches(policy.num_gpu_batches, policy.act_gpu_percent, policy.act_cpu_percent),
        kv_pages=pages,
        kv_layout=layout,
        tails=_tails(policy) if pages["disk"] else 0,
        max_tokens=policy.prefill_tokens + policy.block_size,
        batch_tokens=batch_tokens,
        slots=slots,
        staging_slots=staging_slots,
        fetch_pages=fetch_pages,
        gather_pages=_gather_pages(arch, policy, pages, fetch_pages, longest_row) if device == "cuda" else 0,
        write_pages=ceil(batch_tokens / PAGE_TOKENS) + 2 * policy.gpu_batch_size if pages["disk"] else 0,
        stretch_tokens=_stretch_tokens(workload),
        recompute_past=arch.rope_switch,
        held_slots=held,
    )


def kv_layout(groups: Sequence[LayerGroup], page_tokens: int = PAGE_TOKENS) -> KVPages:
    """Pages of a row, given the groups of its layers."""
    windows = [group.window for group in groups if group.window is not None]
    full = len(groups) - len(windows)
    return KVPages(page_tokens=page_tokens, full=full, windowed=len(windows), window=windows[0] if windows else 0)


def held_slots(arch: ModelArch, placement: Placement) -> int:
    """Slots that hold a layer until both half-blocks have used it: for the streamed experts of the layer that has most, and its
    attention. That of the next layer, which the first half asks for meanwhile, has one of the slots beside them.

    Layers get their experts in turns (`policies.placement`), so none has more than another one that is not dense but for one.
    """
    layers, dense = arch.num_layers, len(arch.dense_layers)
    resident, units = placement.count_of("gpu", "expert"), expert_units(arch) if dense < layers else 1
    whole = 0 if resident < layers else 1 + (resident - layers) // max(1, layers - dense)
    streamed = placement.count_of("cpu") + placement.count_of("disk")
    attention = placement.count_of("cpu", "attention") + placement.count_of("disk", "attention")
    return min(streamed, max(0, units - whole) + min(1, attention))


def _slots(arch: ModelArch, policy: Policy, placement: Placement, device: str, held: int) -> tuple[int, int]:
    """(weight slots on the compute device, staging slots in host memory)."""
    on_disk = placement.count_of("disk")
    ahead, streamed = _look_ahead(arch, placement), placement.count_of("cpu") + on_disk
    slots = min(4, ahead) if device == "cuda" else ahead
    if policy.weight_slots is not None:
        slots = policy.weight_slots
    return min(held + slots, streamed), min(on_disk, ahead) if policy.pin_weight else ahead


def _tails(policy: Policy) -> int:
    """Rows that the disk tier holds at once, where it has pages: its share of the rows in flight, and one at least."""
    disk_share = 1 - (policy.cache_gpu_percent + policy.cache_cpu_percent) / 100
    return min(policy.block_size, max(1, ceil(policy.block_size * disk_share)))


def _fetch_pages(policy: Policy, layout: KVPages, pages: Mapping[str, int], longest_row: int) -> int:
    """Pages of one layer that a GPU batch may bring to the device; a run's own tokens may open one more per row."""
    if not pages["disk"] and (not pages["cpu"] or policy.cpu_attention_percent >= 100):
        return 0
    row_pages = max(pages.values())
    if longest_row:
        row_pages = layout.seen(longest_row, policy.prefill_tokens)
    rows = policy.fetched_rows
    return min(rows * row_pages, pages["cpu"] + pages["disk"]) + rows


def _gather_pages(arch: ModelArch, policy: Policy, pages: Mapping[str, int], fetch_pages: int, longest_row: int) -> int:
    """Pages of one layer that attention on CUDA copies at a time: those of a GPU batch, but no more than `GATHER_BYTES`,
    and no less than the longest row's. Where KV is fetched, ``longest_row`` bounds every row."""
    row = max(pages["gpu"], max(pages["cpu"], pages["disk"]) if fetch_pages else 0)
    if fetch_pages and longest_row:
        row = min(row, ceil(longest_row / PAGE_TOKENS))
    batch = max(fetch_pages, min(pages["gpu"], policy.gpu_batch_size * row))
    most = GATHER_BYTES // (arch.kv_bytes_per_token_layer(arch.dtype_bytes) * PAGE_TOKENS)
    return max(row, min(batch, most))


def _stretch_tokens(workload: Workload) -> float:
    """Tokens that lie side by side: half-way through its life a row is its prompt in one stretch, and a stretch for each page
    that it grew by, (s + n / 2) tokens in 1 + n / 2 / PAGE_TOKENS stretches."""
    return (workload.prompt_len + workload.gen_len / 2) / (1 + workload.gen_len / (2 * PAGE_TOKENS))


@lru_cache(maxsize=16)
def residency(arch: ModelArch, expert_order: tuple[tuple[int, ...], ...] | None = None) -> Residency:
    """The model's units in the order in which they deserve a fast tier.

    Args:
        expert_order: that of a policy.

    Raises:
        InfeasibleError: the order is of another model, or of other units of experts.
    """
    try:
        return Residency(units_of(arch), expert_order)
    except UsageError as error:
        raise InfeasibleError(f"the policy was made for another model or other units of experts: {error}") from error


def kv_tokens_wanted(policy: Policy, workload: Workload) -> int:
    """KV capacity in tokens that keeps ``block_size`` rows of the workload in flight.

    Rolling rows are of all ages, so their mean context is s + n/2; a static block marches to s + n together.
    """
    return policy.block_size * _row_tokens(policy, workload)


def common_tokens(workload: Workload, together: float) -> float:
    """Tokens of a row, on average, that count among another row's where so many rows are together: each beginning that several
    of them have counts once."""
    most = float(shared_tokens(workload.prompt_len, PAGE_TOKENS))
    prefix = min(most, workload.prefix_len)
    again, alike = (
        1 - 1 / max(1.0, min(each, together)) for each in (workload.rows_per_prompt, workload.rows_per_prefix)
    )
    return again * most + (1 - again) * alike * prefix


def _row_tokens(policy: Policy, workload: Workload) -> int:
    s, n = workload.prompt_len, workload.gen_len
    if policy.schedule == "static":
        return ceil((s + n) / PAGE_TOKENS) * PAGE_TOKENS
    return s + ceil((n + PAGE_TOKENS) / 2)


def _kv_pages_wanted(layout: KVPages, policy: Policy, workload: Workload, kv_tokens: int | None) -> float:
    """Pages that hold so many tokens of context, in rows of the workload, and what enters in a sweep beside them."""
    tokens, each = float(kv_tokens or kv_tokens_wanted(policy, workload)), _row_tokens(policy, workload)
    if kv_tokens is None and not layout.windowed:
        tokens = max(each, tokens - policy.block_size * common_tokens(workload, policy.block_size))
    if not layout.windowed:
        return layout.full * tokens / PAGE_TOKENS
    rows = max(1.0, tokens / each)
    return rows * layout.mean(tokens / rows) + layout.entering(workload.prompt_len, policy.prefill_tokens)


def kv_pages_per_tier(policy: Policy, kv_pages: float, longest_row: int, together: int = 1) -> dict[str, int]:
    """KV pages per tier, the policy's shares rounded once; a row of ``longest_row`` pages fits the largest tier.

    Args:
        kv_pages: over all tiers; so many there are at least.
        together: pages that go to a tier together: those of a mean row where all rows of a block grow at once, so that no
            tier is left with the room of a part of a row.
    """
    pieces = max(1, ceil(kv_pages / together))
    shares = policy.cache_gpu_percent, policy.cache_cpu_percent
    needed = ceil(longest_row / together)
    placed = place_pieces(pieces, *shares)
    while max(placed.values()) < needed:
        pieces += needed - max(placed.values())
        placed = place_pieces(pieces, *shares)
    return {tier: count * together for tier, count in placed.items()}


def slot_bytes(arch: ModelArch, placement: Placement) -> int:
    """Bytes of a weight slot: the largest unit that is streamed."""
    largest = placement.residency.largest_streamed_bytes(placement.gpu_end)
    return largest + unit_slack_bytes(arch) if largest else 0


@lru_cache(maxsize=16)
def single_expert_bytes(arch: ModelArch) -> float:
    """Stored bytes of one expert of a sparse layer, as `units` have it; without such layers, of an MLP."""
    experts = [unit for unit in units_of(arch) if unit.kind == "expert"]
    unit = next((unit for unit in experts if not arch.is_dense(unit.layer)), experts[0])
    return unit.stored_bytes / len(unit.id.experts)


@lru_cache(maxsize=16)
def entry_bytes(arch: ModelArch) -> int:
    """Room that a single expert takes where experts come on demand."""
    return align_up(ceil(single_expert_bytes(arch) + unit_slack_bytes(arch.grouped(1))))


def _look_ahead(arch: ModelArch, placement: Placement) -> int:
    streamed = placement.count_of("cpu") + placement.count_of("disk")
    wanted = min(expert_units(arch) + 2, LOOK_AHEAD_BYTES // max(1, slot_bytes(arch, placement)))
    return min(streamed, max(4, wanted))
