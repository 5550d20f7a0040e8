"""The seconds of every operation of the schedule when nothing else runs: bytes or FLOPs over a measured rate.

`cost_model.timing.sweep_bounds` adds them up in closed form, `cost_model.simulation.replay` replays the schedule of `policies.schedule` with them;
`cost_model.memory.memory_plan` has the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import Hardware
from cost_model.hardware.link_curves import transfer_s
from cost_model.memory.allocation import KV_TRANSFERS, PAGE_TOKENS, Allocation, single_expert_bytes
from cost_model.memory.memory_plan import expert_chunk, kv_disk_page_bytes, scored_at_once
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import are_grouped
from cost_model.routing.demand import Demand, Routing
from cost_model.timing.sweep_load import BatchLoad, SweepLoad, batches, half_batches
from policies.placement import TIERS
from policies.policy import Policy
from policies.schedule import halves_of_sweep

if TYPE_CHECKING:
    import numpy as np


#: Part of a row's host work that comes after its logits: its token is chosen, kept and looked at. The rest is admission and the
#: index tensors of the next sweep. Measured with 500 to 6,000 rows that decode without stop strings: 0.3 to 0.5.
BOOKED_SHARE = 0.3
#: Kinds of units that pass through slots where they do not live on the compute device; the embedding stays where it is.
STREAMED = ("attention", "expert", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demanded:
    """Seconds of a mean layer whose experts come on demand. One is computed, or copied, while the next one comes.

    Attributes:
        read_s: from disk; of a layer that has experts there.
        copy_s, copy_last_s: to the device, while others are read, and the last one of the disk's afterwards.
        ahead_s, last_s: computation of those that are cached or arrive earlier, and of the last one.
        unit_s: of a unit that lives on the device.
    """

    read_s: float
    copy_s: float
    copy_last_s: float
    ahead_s: float
    last_s: float
    unit_s: float


class Costs:
    """Seconds of every operation when nothing else runs.

    Args:
        arch, hardware, policy: the model on the machine under the policy.
        allocation: from `allocate`.
        dtype_bytes: bytes of one number in the compute dtype.
        shares, on_demand: as in `Routing`.
        scored_share: part of the prompt tokens whose log-probabilities are asked.

    Attributes:
        routing: which experts tokens are routed to.
        overlap, half_blocks: as in `Policy`.
        kv_bytes, kv_disk_bytes: of a token in a layer, in memory and on disk.
        disk_wait_s: latency of a small transfer: behind the weights, where some of them come from disk.
        stages_host_units: units in host memory are not pinned, so each is copied to a pinned buffer first.
        stream_bytes_per_s: rates at which the links bring a mean streamed unit, by user of `cost_model.timing.contention`.
        lane_share: part of all cores that an operation on a lane keeps busy (device cpu, where all lanes share them).
    """

    def __init__(
        self,
        arch: ModelArch,
        hardware: Hardware,
        policy: Policy,
        allocation: Allocation,
        dtype_bytes: int,
        shares: np.ndarray | None = None,
        on_demand: bool = True,
        scored_share: float = 0.0,
    ):
        gpu, b = hardware.gpu, dtype_bytes
        self.routing = Routing(arch, allocation, shares, on_demand)
        self.arch, self.hardware, self.allocation, self._gpu, self._b = arch, hardware, allocation, gpu, b
        self._scored_share = scored_share
        self._scored_at_once = scored_at_once(arch, policy, allocation, device=hardware.device, compute_bytes=b)
        self.overlap, self.half_blocks = policy.overlap, policy.halves
        self._fetched_share = policy.fetched_rows / policy.gpu_batch_size
        self.stages_host_units = hardware.device == "cuda" and not policy.pin_weight
        compressed = policy.compress_cache
        self.kv_bytes = arch.kv_bytes_per_token_layer(b, compressed=compressed)
        self.kv_disk_bytes = kv_disk_page_bytes(arch, b, compressed=compressed) / PAGE_TOKENS
        # Seconds of a token of context: compressed ones are measured beside those of 16 bits.
        stored = arch.kv_bytes_per_token_layer(2 if compressed else b)
        self._attend_s = stored / gpu.attention_bytes_per_s * (gpu.int8_attention if compressed else 1)
        self._cpu_attend_s = stored / hardware.cpu_attention_bytes_per_s
        self._cpu_attend_s *= hardware.cpu_int8_attention if compressed else 1
        self._chunk = expert_chunk(policy, hardware.device)
        self._experts, self._dense = gpu.experts[b], gpu.dense[b]
        self._module = arch.projection_params + arch.router_params + arch.shared_params
        # Part of the module's weights that make queries, keys and values; the rest are output projection, router and shared MLP.
        self._projected = arch.hidden * arch.head_dim * (arch.num_heads + 2 * arch.num_kv_heads) / self._module
        self._pair_flops = 4 * arch.num_heads * arch.head_dim  # a multiply-add for the score, one for the weighted sum
        self._query_bytes = arch.num_heads * arch.head_dim * b
        self._moves_queries = hardware.device != "cpu"
        at = allocation.placement
        self._streamed = {tier: [(at.count_of(tier, k), at.bytes_of(tier, k)) for k in STREAMED] for tier in TIERS}
        self._streams = any(units for tier in TIERS[1:] for units, _ in self._streamed[tier])
        on_disk, on_host = (at.count_of(tier) for tier in ("disk", "cpu"))
        self.disk_wait_s = hardware.disk_busy_latency_s if on_disk else hardware.disk_latency_s
        # What a small copy up waits for the pieces of weights that are before it.
        self._link_wait_s = gpu.h2d_busy_latency_s if on_disk or on_host else 0.0
        self.stream_bytes_per_s = self._stream_rates()
        self.lane_share = self._lane_share()

    def cut(self, load: SweepLoad, gpu_batch_size: int, demand: Demand | None) -> list[list[BatchLoad]]:
        """The GPU batches of a sweep, of each half-block; of one where the block marches as one (`SweepShape.first_half`)."""
        expert_tokens = load.tokens * self.arch.top_k / self.arch.num_experts
        halves = halves_of_sweep(self.half_blocks, self.hardware.device, expert_tokens)
        if halves == 1 or demand is not None:
            return [batches(load, gpu_batch_size)]
        moves = self._streams or any(group.rows > 0 for mode, group in load.groups.items() if mode != "gpu")
        fetched_rows = self._fetched_share * gpu_batch_size
        return half_batches(load, gpu_batch_size, fetched_rows) if moves else [batches(load, gpu_batch_size)]

    def part_shares(self, halves: Sequence[Sequence[BatchLoad]]) -> list[float]:
        """The rows of a sweep that get their tokens together, as parts of all: of each half-block, or all at once
        (`SweepShape.first_part`)."""
        if len(halves) == 1 or not self.allocation.head_in_halves:
            return [1.0]
        rows = [sum(batch.rows for batch in cut) for cut in halves]
        return [each / sum(rows) for each in rows]

    def unpack_s(self, kind: str, weights: float) -> float:
        """So many weights of units of a kind, as each product unpacks them; 0 where they are not packed."""
        packed = self.arch.packed
        if packed is None or kind not in packed.kinds:
            return 0.0
        moved = packed.bits / 8 + 2 * self._b  # read, written, read again by the product
        return weights * self._gpu.unpack_s.get(packed.name, moved / self._gpu.memory_bytes_per_s)

    def _lane_share(self) -> dict[str, float]:
        hw, on_cpu = self.hardware, self.hardware.device == "cpu"
        core = 1 / hw.cores
        copy = core if on_cpu else 0.0
        all_cores = 1.0 if on_cpu else 0.0
        return {
            "gpu": all_cores,
            "cpu": 1.0,
            "h2d": hw.h2d_core_s_per_byte * self.stream_bytes_per_s["h2d"] * core if on_cpu else 0.0,
            "h2d/kv": all_cores,
            "h2d/act": copy,
            "d2h": all_cores,
            "d2h/act": copy,
            "disk_read": hw.disk_read_core_s_per_byte * self.stream_bytes_per_s["disk_read"] * core,
            "disk_read/kv": self._kv_read_cores() * core,
            "disk_write": hw.disk_write_core_s_per_byte * hw.disk_write_bytes_per_s * core,
        }

    def _kv_read_cores(self) -> float:
        """Cores that are busy while KV is read from disk, in stretches that lie side by side: core-seconds over seconds."""
        hw, nbytes = self.hardware, self.kv_disk_bytes * self.allocation.stretch_tokens
        core_s = hw.kv_block_core_s + nbytes * hw.disk_read_core_s_per_byte
        return core_s / (hw.kv_block_read_s + nbytes / hw.disk_read_bytes_per_s)

    def _stream_rates(self) -> dict[str, float]:
        """Of the units outside the compute device, where there are any: a mean of all that are moved in a sweep."""
        found = {}
        for user, seconds, flat in (
            ("h2d", self.copy_s, self._gpu.h2d_bytes_per_s),
            ("disk_read", self.read_s, self.hardware.disk_read_bytes_per_s),
        ):
            moved = [part for tier in TIERS[1:] for part in self.streamed(tier)]
            taken_s = sum(seconds(size, units) for units, size in moved)
            found[user] = sum(size for _, size in moved) / taken_s if taken_s else flat
        return found

    def streamed(self, tier: str, *, without: tuple[int, int] = (0, 0)) -> list[tuple[int, int]]:
        """(units, bytes) of each kind that passes through slots and lives in a tier.

        Args:
            without: (units, bytes) of experts that do not.
        """
        attention, (units, nbytes), head = self._streamed[tier]
        return [attention, (units - without[0], nbytes - without[1]), head]

    def read_s(self, nbytes: float, transfers: float = 1.0) -> float:
        """Units of one size, disk to host: so many, which have so many bytes together."""
        return transfer_s(self.hardware.disk_read_curve, self.hardware.disk_read_bytes_per_s, nbytes, transfers)

    def write_s(self, nbytes: float) -> float:
        """Host to disk."""
        return nbytes / self.hardware.disk_write_bytes_per_s

    def copy_s(self, nbytes: float, transfers: float = 1.0) -> float:
        """Units of one size, host to the compute device: so many, which have so many bytes together."""
        return transfer_s(self._gpu.h2d_curve, self._gpu.h2d_bytes_per_s, nbytes, transfers)

    def embed_s(self, batch: BatchLoad) -> float:
        """Rows of the embedding table, read and written."""
        return 2 * batch.tokens * self.arch.hidden * self._b / self._gpu.memory_bytes_per_s

    def activation_bytes(self, batch: BatchLoad) -> float:
        """Hidden states of the batch."""
        return batch.tokens * self.arch.hidden * self._b

    def load_act_s(self, batch: BatchLoad) -> float:
        """Hidden states of the batch to the compute device."""
        return self.hardware.handoff_s + self._link_wait_s + self.copy_s(self.activation_bytes(batch))

    def store_act_s(self, batch: BatchLoad) -> float:
        """Hidden states of the batch home."""
        return self.hardware.handoff_s + self.activation_bytes(batch) / self._gpu.d2h_bytes_per_s

    def read_act_s(self, batch: BatchLoad) -> float:
        """Hidden states of the batch, disk to host; the device waits for them."""
        return self.disk_wait_s + self.read_s(self.activation_bytes(batch))

    def write_act_s(self, batch: BatchLoad) -> float:
        """Hidden states of the batch, host to disk."""
        return self.disk_wait_s + self.write_s(self.activation_bytes(batch))

    def project_s(self, batch: BatchLoad) -> float:
        """Norm, queries, keys and values, rope."""
        return self._projected * self._module_s(batch)

    def _module_s(self, batch: BatchLoad) -> float:
        """The linear part of an attention module; each GPU batch unpacks it anew."""
        arch, unpacked_s = self.arch, 0.0
        if batch.tokens:
            unpacked_s = self.unpack_s("attention", arch.projection_params) + self.unpack_s("dense", arch.shared_params)
        return self._dense.seconds(batch.tokens, self._module) + unpacked_s

    def attend_s(self, batch: BatchLoad) -> float:
        """Attention of what is attended on the compute device; output projection, norm and router of all."""
        context = batch.context["gpu"] + batch.context["fetch"] + batch.context["disk"]
        pairs = batch.pairs["gpu"] + batch.pairs["fetch"] + batch.pairs["disk"]
        attention = context * self._attend_s
        attention += pairs * self._pair_flops / self._gpu.attention_flops_per_s
        return attention + (1 - self._projected) * self._module_s(batch)

    @property
    def cpu_attention_bytes_per_s(self) -> float:
        """Bytes of host memory that decode attention there reads."""
        return self.kv_bytes / self._cpu_attend_s

    def cpu_attend_s(self, batch: BatchLoad) -> float:
        """Attention in host memory."""
        hw = self.hardware
        read = batch.context["cpu"] * self._cpu_attend_s
        read += batch.pairs["cpu"] * self._pair_flops / hw.cpu_attention_flops_per_s
        return read + hw.handoff_s if read else 0.0

    def read_kv_s(self, batch: BatchLoad) -> float:
        """Past KV of the batch's disk rows, disk to host; what lies side by side is read at once."""
        hw, past = self.hardware, batch.past["disk"]
        read_s = self.kv_disk_bytes / hw.disk_read_bytes_per_s
        return past * (read_s + hw.kv_block_read_s / self.allocation.stretch_tokens)

    def load_kv_s(self, batch: BatchLoad) -> float:
        """Past KV of the fetched rows into the staging buffer; attended outputs of the CPU's rows up."""
        fetched = batch.past["fetch"] + batch.past["disk"]
        past = self.hardware.handoff_s + fetched * self.kv_bytes / self._gpu.kv_load_bytes_per_s if fetched else 0.0
        return past + self.attended_s(batch)

    def attended_s(self, batch: BatchLoad) -> float:
        """What the CPU attended, up; a part of `load_kv_s`."""
        up = batch.new["cpu"] * self._query_bytes
        return self._link_wait_s + self.copy_s(up) if self._moves_queries and up else 0.0

    def store_kv_s(self, batch: BatchLoad) -> float:
        """New KV of rows whose home is not the GPU; queries of the rows attended on the CPU down."""
        new = batch.new["fetch"] + batch.new["disk"] + batch.new["cpu"]
        stored = self.hardware.handoff_s + new * self.kv_bytes / self._gpu.kv_store_bytes_per_s if new else 0.0
        down = batch.new["cpu"] * self._query_bytes / self._gpu.d2h_bytes_per_s if self._moves_queries else 0.0
        return stored + down

    def write_kv_s(self, batch: BatchLoad) -> float:
        """New KV of the batch's disk rows; a page is written when it is full, so this is the mean over sweeps."""
        hw = self.hardware
        write_s = self.kv_disk_bytes / hw.disk_write_bytes_per_s
        return batch.new["disk"] * (write_s + hw.kv_block_write_s / PAGE_TOKENS)

    def copied_s(self, load: SweepLoad) -> dict[str, float]:
        """Prefixes from tier to tier, between two sweeps: by lane, one after the other."""
        hw, layers = self.hardware, self.arch.num_layers / len(self.arch.kv_groups)
        on_disk = self.kv_disk_bytes * PAGE_TOKENS
        each_s = {
            "h2d": self.kv_bytes * PAGE_TOKENS / self._gpu.h2d_bytes_per_s,
            "d2h": self.kv_bytes * PAGE_TOKENS / self._gpu.d2h_bytes_per_s,
            "disk_read": on_disk / hw.disk_read_bytes_per_s,
            "disk_write": on_disk / hw.disk_write_bytes_per_s,
        }
        return {lane: pages * layers * each_s[lane] for lane, pages in load.copied.items()}

    @property
    def kv_speed_beside_weights(self) -> dict[str, float]:
        """How fast KV is read and written while weights are read, 1 being its speed alone, by user of
        `cost_model.timing.contention`.

        Each of the lane's transfers then takes ``disk_busy_latency_s``, and `KV_TRANSFERS` are under way.
        """
        hw, page = self.hardware, self.kv_disk_bytes * PAGE_TOKENS
        stretch = self.kv_disk_bytes * self.allocation.stretch_tokens
        alone_s = {
            "disk_read/kv": hw.kv_block_read_s + stretch / hw.disk_read_bytes_per_s,
            "disk_write": hw.kv_block_write_s + page / hw.disk_write_bytes_per_s,
        }
        busy_s = hw.disk_busy_latency_s / KV_TRANSFERS
        return {user: min(1.0, seconds / busy_s) if busy_s else 1.0 for user, seconds in alone_s.items()}

    def expert_s(self, tokens: float, elements: float) -> float:
        """One expert of so many weights over its tokens, by itself."""
        return self._experts.seconds_in_chunks(tokens, elements, self._chunk)

    def mlp_s(self, tokens: float) -> float:
        """The MLP of a dense layer; 0 where there is none."""
        elements = self.arch.dense_params
        return self.expert_s(tokens, elements) + self.unpack_s("dense", elements) if elements else 0.0

    def touched(self, tokens: float) -> float:
        """Experts of a layer that the tokens reach."""
        return self.routing.touched(tokens)

    def unit_rates(self, tokens: float) -> GemmRates:
        """Rates of an expert that is computed with the others of its unit, in a sweep of so many tokens."""
        grouped = self._gpu.grouped_experts.get(self._b)
        return (
            grouped
            if grouped and not self.arch.is_packed("expert") and are_grouped(self.arch, self._b, tokens)
            else self._experts
        )

    def reached_expert_s(self, tokens: float) -> float:
        """One of the experts that a sweep's tokens reach, over its share of them."""
        return self._reached_s(self.unit_rates(tokens), tokens)

    def _reached_s(self, rates: GemmRates, tokens: float) -> float:
        touched, elements = self.touched(tokens), self.arch.expert_params
        if not touched:
            return 0.0
        each_s = rates.seconds_in_chunks(tokens * self.arch.top_k / touched, elements, self._chunk)
        return each_s + self.unpack_s("expert", elements)

    def demanded_bytes(self, demand: Demand) -> tuple[float, float]:
        """(read in a mean layer that has experts on disk, copied in a mean layer) where experts come on demand.

        On device cpu what is on disk is read straight into its place.
        """
        copied = demand.host_bytes + (0.0 if self.hardware.device == "cpu" else demand.disk_bytes)
        return demand.disk_bytes / max(1, demand.disk_layers), copied / len(demand.layers)

    def demanded(self, demand: Demand, tokens: float) -> Demanded:
        """Seconds of a layer whose experts come on demand; what is not pinned is copied to a pinned buffer first.

        What comes is computed one expert at a time, on device cpu together like a unit; what lives on the device, in its units.
        """
        layers, on_cpu = len(demand.layers), self.hardware.device == "cpu"
        read, copied = self.demanded_bytes(demand)
        staged = demand.host_bytes / layers if self.stages_host_units else 0.0
        missed = demand.missed / layers
        each = self._reached_s(self.unit_rates(tokens) if on_cpu else self._experts, tokens)
        resident = self._reached_s(self.unit_rates(tokens), tokens)
        waited = min(1.0, missed)
        last_bytes = 0.0 if on_cpu or not missed else demand.disk_bytes / layers * waited / missed
        ahead_bytes, expert_bytes = copied + staged - last_bytes, single_expert_bytes(self.arch)
        return Demanded(
            read_s=self.read_s(read, read / expert_bytes),
            copy_s=self.copy_s(ahead_bytes, ahead_bytes / expert_bytes),
            copy_last_s=self.copy_s(last_bytes, last_bytes / expert_bytes),
            ahead_s=(each + self.op_s) * demand.streamed / layers - each * waited,
            last_s=each * waited,
            unit_s=resident * demand.resident / demand.resident_units if demand.resident_units else 0.0,
        )

    def head_s(self, rows: float, elements: float, prompt_tokens: float = 0.0) -> float:
        """A chunk of the head, as large a matrix as an expert's: over the rows that get a token, and apart from them over the
        positions of prompts that are scored, a few at a time, whose logits are reduced to a log-probability each."""
        scored = self._scored_share * prompt_tokens
        at_once = min(scored, self._scored_at_once)
        scored_s = scored / at_once * self._experts.seconds(at_once, elements) if scored else 0.0
        scored_s += scored * elements / self.arch.head_row_params * self._gpu.score_s
        return self._experts.seconds(rows, elements) + scored_s

    def sample_s(self, rows: float) -> float:
        """The choice of a token per row: its logits are read once."""
        return rows * self.arch.vocab_size * self._b / self._gpu.memory_bytes_per_s

    def host_s(self, rows: float) -> float:
        """Admission, index tensors and bookkeeping of a sweep, during which only the links work."""
        return self.hardware.sweep_s + rows * self.hardware.row_s

    def booked_s(self, rows: float) -> float:
        """Of this, what may be done for so many rows of the first half-block while a GPU computes."""
        return BOOKED_SHARE * rows * self.hardware.row_s if self.hardware.device == "cuda" else 0.0

    @property
    def op_s(self) -> float:
        """Dispatch of one operation, whatever its lane."""
        return self._gpu.op_s
