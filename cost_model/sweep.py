"""How long a sweep takes, in closed form: no lane is faster than its work, and the compute chain waits for what it needs.

All layers carry the same load and differ by at most one unit per tier, so one mean layer stands for all of them. A
sweep takes the largest of

* each lane's busy seconds, and each shared resource's (cores, host memory, the link's two directions together);
* the compute chain: in every layer the attention of all GPU batches, with CPU attention and fetched KV on the way, and
  then the experts (`_attention_s` follows the pipeline batch by batch);
* the chain with the link behind it: while a layer is in its attention phase no slot is freed, so only as many units
  arrive as there are slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_model.costs import Costs
from cost_model.load import BatchLoad, SweepLoad, batches

_OPS_PER_BATCH = 3  # project, attend, and what stores or loads beside them
_OPS_PER_LAYER = 2
_STREAMED = ("attention", "expert", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTime:
    """Seconds of a sweep.

    Attributes:
        total_s: from its start to the start of the next one.
        lanes_s: busy seconds by lane.
        bounds_s: what could have decided, by name; `total_s` is the largest.
    """

    total_s: float
    lanes_s: Mapping[str, float]
    bounds_s: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The name of the bound that decides."""
        return max(self.bounds_s, key=self.bounds_s.__getitem__)


def sweep_time(costs: Costs, load: SweepLoad, gpu_batch_size: int) -> SweepTime:
    """Seconds of one sweep in a row of like ones.

    Args:
        costs: durations of the operations.
        load: the rows in flight.
        gpu_batch_size: rows per GPU batch.
    """
    layers, cut = costs.arch.num_layers, batches(load, gpu_batch_size)
    away = sum(tier != "gpu" for tier in costs.counts.activation_tiers[: len(cut)])
    experts_s = _experts_s(costs, load.tokens)
    phase_s, compute_s = _attention_s(costs, cut, experts_s)
    acts_up_s, acts_down_s, acts_disk_s = _acts_s(costs, cut)
    if away:  # the first batch's hidden states come up before anything of the layer, and the last go down after it
        moves_s = acts_up_s + acts_down_s + acts_disk_s  # one thread moves them all
        phase_s = max(phase_s, moves_s) + (acts_up_s + acts_down_s + acts_disk_s / 2) / away
    head_s = _head_s(costs, load.logits)
    outside_s = costs.host_s(load.rows) + sum(map(costs.embed_s, cut)) + head_s + costs.sample_s(load.logits)
    weights = _weight_seconds(costs)
    lanes = {
        "gpu": layers * (compute_s + experts_s) + outside_s,
        "cpu": layers * sum(map(costs.cpu_attend_s, cut)),
        "h2d": weights["h2d"],
        "h2d/kv": layers * (sum(map(costs.load_kv_s, cut)) + acts_up_s),
        "d2h": layers * (sum(map(costs.store_kv_s, cut)) + acts_down_s),
        "disk_read": weights["disk_read"],
        "disk_read/kv": layers * sum(map(costs.read_kv_s, cut)),
        "disk_write": layers * sum(map(costs.write_kv_s, cut)),
    }
    chain_s = layers * (phase_s + experts_s) + outside_s
    attended_bytes = layers * costs.kv_bytes * sum(batch.context["cpu"] for batch in cut)
    bounds = _resources_s(costs, lanes, attended_bytes) | {"schedule": chain_s}
    late_s = _late_s(costs, weights["unit"], experts_s)
    if late_s:  # the KV of the next layer's first batch comes over the same link meanwhile
        late_s += costs.load_kv_s(cut[0]) if costs.hardware.device == "cuda" else 0.0
        bounds["slots"] = layers * (phase_s + late_s) + outside_s
    if not costs.overlap:
        bounds = {"serial": sum(lanes.values())}
    for part in ("h2d/kv", "disk_read/kv"):
        lanes[part.partition("/")[0]] += lanes.pop(part)
    return SweepTime(total_s=max(bounds.values()), lanes_s=lanes, bounds_s=bounds)


def _acts_s(costs: Costs, cut: list[BatchLoad]) -> tuple[float, float, float]:
    """Seconds of a layer that hidden states take up, down, and from and to disk."""
    tiers = costs.counts.activation_tiers
    away = [batch for batch, tier in zip(cut, tiers) if tier != "gpu"]
    on_disk = [batch for batch, tier in zip(cut, tiers) if tier == "disk"]
    disk_s = sum(map(costs.read_act_s, on_disk)) + sum(map(costs.write_act_s, on_disk))
    return sum(map(costs.load_act_s, away)), sum(map(costs.store_act_s, away)), disk_s


def _experts_s(costs: Costs, tokens: float) -> float:
    """Seconds of all experts of a mean layer."""
    arch = costs.arch
    dense = len(arch.dense_layers)
    sparse = arch.num_layers - dense
    touched = costs.touched(tokens)
    each = costs.expert_s(tokens * arch.top_k / touched, arch.expert_params) if touched else 0.0
    total = sparse * (touched * each + (arch.num_experts + _OPS_PER_LAYER) * costs.op_s)
    if dense:
        elements = arch.expert_params_in(arch.dense_layers[0])
        total += dense * (costs.expert_s(tokens, elements) + (1 + _OPS_PER_LAYER) * costs.op_s)
    return total / arch.num_layers


def _attention_s(costs: Costs, cut: list[BatchLoad], experts_s: float) -> tuple[float, float]:
    """(seconds of a layer's attention phase, those of them that the compute device is busy).

    The order is that of `policies.schedule`: batch j + 1 is projected, and its KV requested, before batch j is
    attended; the KV of the first batch is requested a layer's experts earlier.
    """
    busy = now = on_cpu = 0.0
    loaded = costs.read_kv_s(cut[0]) + costs.load_kv_s(cut[0]) - experts_s
    waits = []
    dispatch = _OPS_PER_BATCH * costs.op_s
    for index, batch in enumerate(cut):
        if index:
            loaded = max(loaded, now) + costs.read_kv_s(batch) + costs.load_kv_s(batch)
        project = costs.project_s(batch) + dispatch
        now, busy = now + project, busy + project
        cpu = costs.cpu_attend_s(batch)
        if cpu:
            on_cpu = max(on_cpu, now + costs.store_kv_s(batch)) + cpu
        waits.append(max(loaded, on_cpu if cpu else 0.0))
        if index:
            now, busy = _attend(costs, cut[index - 1], waits[index - 1], now, busy)
    return _attend(costs, cut[-1], waits[-1], now, busy)


def _attend(costs: Costs, batch: BatchLoad, wait: float, now: float, busy: float) -> tuple[float, float]:
    seconds = costs.attend_s(batch)
    return max(now, wait) + seconds, busy + seconds


def _head_s(costs: Costs, logits: float) -> float:
    chunks = costs.arch.num_head_chunks
    elements = costs.arch.embed_params / chunks
    return chunks * (costs.head_s(logits, elements) + costs.op_s) + 2 * costs.op_s


def _weight_seconds(costs: Costs) -> dict[str, float]:
    """Link seconds of a sweep's streamed weights; ``unit``: of one of them on the link that is slower."""
    at = costs.counts.placement
    on_cpu, on_disk = at.bytes_of("cpu", *_STREAMED), at.bytes_of("disk", *_STREAMED)
    units = at.count_of("cpu", *_STREAMED) + at.count_of("disk", *_STREAMED)
    through_host = costs.hardware.device == "cuda"  # on device cpu, disk units are read straight into their slot
    h2d = costs.copy_s(on_cpu + (on_disk if through_host else 0))
    read = costs.read_s(on_disk)
    slower = max(h2d, read) if through_host else h2d + read
    return {"h2d": h2d, "disk_read": read, "unit": slower / units if units else 0.0}


def _late_s(costs: Costs, unit_s: float, experts_s: float) -> float:
    """Seconds of a layer's expert phase in which units arrive that found no slot before it.

    The attention unit keeps its slot until its phase ends, so one slot fewer is filled meanwhile, and the link goes on at
    once when it is given back. Where that unit is resident, the first slot comes free with the first expert.
    """
    arch, at, slots = costs.arch, costs.counts.placement, costs.counts.slots
    experts = (at.count_of("cpu", "expert") + at.count_of("disk", "expert")) / arch.num_layers
    attention = (at.count_of("cpu", "attention") + at.count_of("disk", "attention")) / arch.num_layers
    each_s = experts_s / arch.num_experts
    held = experts - slots + attention  # experts that are not there when the expert phase begins
    if held <= 0:
        return 0.0
    streamed = max((held + 1) * unit_s, held * unit_s + each_s)
    return attention * streamed + (1 - attention) * (held * unit_s + 2 * each_s)


def _resources_s(costs: Costs, lanes: Mapping[str, float], attended_bytes: float) -> dict[str, float]:
    """Seconds that each lane and each resource that lanes share needs; the CPU attends over so many bytes."""
    hw, gpu = costs.hardware, costs.hardware.gpu
    up, down = lanes["h2d"] + lanes["h2d/kv"], lanes["d2h"]
    found = {name: seconds for name, seconds in lanes.items() if "/" not in name}
    found |= {"h2d": up, "disk_read": lanes["disk_read"] + lanes["disk_read/kv"]}
    if hw.device == "cpu":
        found["h2d"] = max(lanes["h2d"], lanes["h2d/kv"])  # two threads; the link of CUDA is one
        found["cores"] = sum(costs.lane_share[name] * seconds for name, seconds in lanes.items())
        return found
    both = min(gpu.h2d_duplex_bytes_per_s / gpu.h2d_bytes_per_s, gpu.d2h_duplex_bytes_per_s / gpu.d2h_bytes_per_s, 1.0)
    found["pcie"] = max(up, down) + min(up, down) * (1 / both - 1)  # while both directions run, each is slower
    moved = up * gpu.h2d_bytes_per_s + down * gpu.d2h_bytes_per_s
    found["host memory"] = (moved + attended_bytes) / hw.host_bytes_per_s
    return found
