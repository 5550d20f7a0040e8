"""How long a sweep takes, in closed form: no lane is faster than its work, and the compute chain waits for what it needs.

All layers carry the same load and differ by at most one unit per tier, so one mean layer stands for all of them. A
sweep takes the largest of

* each thread's busy seconds, and each shared resource's (`cost_model.resources`);
* the compute chain: in every layer the attention of all GPU batches, with CPU attention, fetched KV and hidden states on
  the way (`cost_model.attention_phase`), and then the experts;
* each link behind the chain: from the last expert of a layer to the first of the next no slot is freed, so no more units
  arrive than there are slots, and the link stands still for the rest of that time.

`cost_model.walk` is the same event by event; where two bounds are near each other it takes longer than either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_model.attention_phase import DOWN, UP, AttentionPhase
from cost_model.costs import Costs
from cost_model.load import BatchLoad, SweepLoad, batches
from cost_model.resources import USERS, Resources

_LANES = ("gpu", "cpu", "h2d", "d2h", "disk_read", "disk_write")
_STREAMED = ("attention", "expert", "head")
#: What one thread does, one after the other: by its name the users of `Resources`.
THREADS = {
    "gpu": ("gpu", "host"),
    "cpu": ("cpu",),
    "h2d": ("h2d",),
    "kv loads": ("h2d/kv", "disk_read/kv"),
    "d2h": ("d2h",),
    "hidden states": (*UP, *DOWN),
    "disk_write": ("disk_write", "disk_write/act"),
}
#: Users that keep all cores of device cpu busy.
_ALL_CORES = ("gpu", "cpu", "h2d/kv", "h2d/attended", "d2h")
_LANE_OF = {user: "gpu" if user == "host" else user.partition("/")[0] for user in USERS}


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
    return SweepForm(costs, gpu_batch_size).time(load)


class SweepForm:
    """`sweep_time` for many loads of one policy: what they have in common is made once.

    Args:
        costs: durations of the operations.
        gpu_batch_size: rows per GPU batch.
    """

    def __init__(self, costs: Costs, gpu_batch_size: int):
        self._costs, self._rows, self._layers = costs, gpu_batch_size, costs.arch.num_layers
        self._on_cpu = costs.hardware.device == "cpu"
        self._resources = Resources(costs)
        self._beside = beside_shares(self._resources) if self._on_cpu else {}
        self._weights_s = _weights_s(costs)
        self._streams = _streams(costs, self._weights_s)

    def time(self, load: SweepLoad) -> SweepTime:
        """Seconds of one sweep in a row of like ones."""
        costs, layers, cut = self._costs, self._layers, batches(load, self._rows)
        experts_s, attention = _experts_s(costs, load.tokens), AttentionPhase(costs, cut)
        embed_s = costs.embed_s(BatchLoad(tokens=load.tokens)) + len(cut) * costs.op_s
        computed_s = embed_s + _head_s(costs, load.logits) + costs.sample_s(load.logits)
        busy = {user: layers * seconds for user, seconds in attention.moved_s.items()} | self._weights_s
        busy |= {"gpu": layers * (attention.compute_s + experts_s) + computed_s, "host": costs.host_s(load.rows)}
        lanes = dict.fromkeys(_LANES, 0.0)
        for user, seconds in busy.items():
            lanes[_LANE_OF[user]] += seconds
        if costs.overlap:
            chain = self._chain(busy, attention, experts_s, computed_s + busy["host"])
            bounds = self._shared(busy) | chain
        else:
            bounds = {"serial": sum(lanes.values())}
        return SweepTime(total_s=max(bounds.values()), lanes_s=lanes, bounds_s=bounds)

    def _shared(self, busy: Mapping[str, float]) -> dict[str, float]:
        """The fewest seconds in which each thread, and each resource that threads share, does its work."""
        found = {name: sum([busy[user] for user in users]) for name, users in THREADS.items()}
        found |= self._resources.seconds(busy)
        if self._on_cpu:  # all cores compute, so a thread that asks for one of them copies more slowly
            cores = self._costs.hardware.cores
            slower = max(0.0, self._beside["h2d"] * (cores + 1) - 1)
            found["h2d"] += slower * min(busy["h2d"], sum(busy[user] for user in _ALL_CORES))
        return found

    def _chain(
        self, busy: Mapping[str, float], attention: AttentionPhase, experts_s: float, outside_s: float
    ) -> dict[str, float]:
        """Seconds of the compute chain, and of each link behind it."""
        layers, phase_s = self._layers, attention.seconds(experts_s)
        chain_s = layers * (phase_s + experts_s) + outside_s
        found = {"schedule": chain_s + (self._beside_s(busy, chain_s) if self._on_cpu else 0.0)}
        for link_s, ahead_s in self._streams:
            # Where a link decides, the experts last as long as their units take to come, and more KV hides behind them.
            window_s = attention.seconds(max(experts_s, link_s / layers - min(ahead_s, phase_s)))
            idle_s = (layers - 1) * max(0.0, window_s - ahead_s) + max(0.0, window_s + outside_s - ahead_s)
            found["slots"] = max(found.get("slots", 0.0), link_s + idle_s)
        return found

    def _beside_s(self, busy: Mapping[str, float], chain_s: float) -> float:
        """Seconds that copies and readers take from the cores that compute on device cpu."""
        return sum(share * min(chain_s, busy[user]) for user, share in self._beside.items())


def beside_shares(resources: Resources) -> dict[str, float]:
    """Part of all cores that weights and disk transfers take from what computes beside them on device cpu."""
    users = ("h2d", *(user for user in USERS if user.startswith("disk")))
    return {user: resources.seconds({user: 1.0})["cores"] for user in users}


def _weights_s(costs: Costs) -> dict[str, float]:
    """Busy seconds of the weight stream in a sweep, by user of `cost_model.resources`."""
    at = costs.counts.placement
    on_cpu, on_disk = at.bytes_of("cpu", *_STREAMED), at.bytes_of("disk", *_STREAMED)
    through_host = costs.hardware.device == "cuda"  # on device cpu, disk units are read straight into their slot
    return {"h2d": costs.copy_s(on_cpu + on_disk * through_host), "disk_read": costs.read_s(on_disk)}


def _streams(costs: Costs, weights_s: Mapping[str, float]) -> list[tuple[float, float]]:
    """Of each link of the weight stream, (its seconds in a sweep, those of what it may bring before a slot is freed)."""
    at, counts, layers = costs.counts.placement, costs.counts, costs.arch.num_layers
    from_host, from_disk = (at.count_of(tier, *_STREAMED) for tier in ("cpu", "disk"))
    if not from_host + from_disk:
        return []
    part = counts.slots / (from_host + from_disk)
    copy_s, read_s = weights_s["h2d"], weights_s["disk_read"]
    if costs.hardware.device == "cuda":
        staged = counts.staging_slots / from_disk if from_disk else 0.0
        return [(copy_s, part * copy_s), (read_s, (part + staged) * read_s)]
    # A layer's host units come before its disk units, so few slots hold either these or those, and one link rests.
    each_s = min(copy_s / from_host, read_s / from_disk) if from_host and from_disk else 0.0
    link_s = max(copy_s, read_s, copy_s + read_s - 2 * layers * (counts.slots - 1) * each_s)
    return [(link_s, part * link_s)]


def _experts_s(costs: Costs, tokens: float) -> float:
    """Seconds of the routing and of all experts of a mean layer."""
    arch = costs.arch
    dense = len(arch.dense_layers)
    sparse = arch.num_layers - dense
    touched = costs.touched(tokens)
    each = costs.expert_s(tokens * arch.top_k / touched, arch.expert_params) if touched else 0.0
    total = sparse * (touched * each + (arch.num_experts + 1) * costs.op_s)
    if dense:
        total += dense * (costs.expert_s(tokens, arch.dense_params) + 2 * costs.op_s)
    return total / arch.num_layers


def _head_s(costs: Costs, logits: float) -> float:
    """Seconds of all chunks of the head, and of the operations before and after them."""
    chunks = costs.arch.num_head_chunks
    elements = costs.arch.embed_params / chunks
    return chunks * (costs.head_s(logits, elements) + costs.op_s) + 2 * costs.op_s
