"""How long a sweep takes, in closed form: no lane is faster than its work, and the compute chain waits for what it needs.

All layers carry the same load and differ by at most one unit per tier, so one mean layer stands for all of them. A
sweep takes the largest of

* each thread's busy seconds, and each shared resource's (`cost_model.timing.contention`);
* the compute chain: in every layer the attention of all GPU batches, with CPU attention, fetched KV and hidden states on
  the way (`cost_model.timing.attention_phase`), and then the experts; where these come on demand, only what lives on the device
  is computed meanwhile;
* each link behind the chain: from the last streamed expert of a layer to the first of the next no slot is freed, so no more
  units arrive than there are slots, and the link stands still for the rest of that time.

Of a block that marches as two halves, the chain is `cost_model.timing.attention_phase.HalfBlocks`. A layer's units keep their slots
until the second half has used them, so only the others are there for what comes ahead, and no slot is freed from the last
expert of the first half to the first one of the second. The tokens of the first half are booked while the device computes the last
experts of the second, and its head.

`cost_model.simulation.replay` is the same event by event; where two bounds are near each other it takes longer than either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cost_model.memory.allocation import KEPT_SLOTS
from cost_model.model.weight_units import expert_units, head_chunks
from cost_model.routing.demand import Demand
from cost_model.timing.attention_phase import DOWN, UP, AttentionPhase, HalfBlocks
from cost_model.timing.contention import USERS, Resources, lost_s
from cost_model.timing.op_costs import Costs
from cost_model.timing.sweep_load import BatchLoad, SweepLoad
from policies.placement import TIERS

_LANES = ("gpu", "cpu", "h2d", "d2h", "disk_read", "disk_write")
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
#: Users that the chain waits for where experts come on demand.
_DEMANDED = ("disk_read/routed", "h2d/routed")
#: Who copies prefixes from tier to tier, by lane.
_COPIES = {"h2d": "h2d/kv", "d2h": "d2h", "disk_read": "disk_read/kv", "disk_write": "disk_write"}
#: Who brings weights over each resource.
_LINKS = (("pcie", "h2d"), ("disk_read", "disk_read"))
#: Users that keep all cores of device cpu busy.
_ALL_CORES = ("gpu", "cpu", "h2d/kv", "h2d/attended", "d2h")
_LANE_OF = {user: "gpu" if user == "host" else user.partition("/")[0] for user in USERS}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTime:
    """Seconds of a sweep.

    Attributes:
        total_s: from its start to the start of the next one.
        lanes_s: seconds in which each lane is at work.
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
        self._streams: dict[tuple[bool, int], _WeightStream] = {}

    def time(self, load: SweepLoad) -> SweepTime:
        """Seconds of one sweep in a row of like ones."""
        costs, layers, load = self._costs, self._layers, load.seen(self._costs.arch)
        demand = costs.routing.on_demand(load.tokens)
        halves = costs.cut(load, self._rows, demand)
        attention = [AttentionPhase(costs, cut, at * len(halves[0])) for at, cut in enumerate(halves)]
        stream = self._stream_beside(demand, len(halves))
        experts = [_experts(costs, sum(batch.tokens for batch in cut), demand, stream) for cut in halves]
        embed_s = costs.embed_s(BatchLoad(tokens=load.tokens)) + sum(map(len, halves)) * costs.op_s
        shares = costs.part_shares(halves)
        heads_s = [_head_s(costs, load, share) for share in shares]
        computed_s = embed_s + sum(heads_s) + costs.sample_s(load.logits)
        busy = {user: layers * seconds for user, seconds in _summed(part.moved_s for part in attention).items()}
        busy |= stream.busy_s
        busy |= {user: layers * seconds for user, seconds in _summed(part.moved_s for part in experts).items()}
        layer_s = sum(part.compute_s for part in attention) + sum(part.compute_s for part in experts)
        busy |= {"gpu": layers * layer_s + computed_s, "host": costs.host_s(load.rows)}
        copied = costs.copied_s(load)
        copied_s = sum(copied.values())
        for lane, seconds in copied.items():
            busy[_COPIES[lane]] += seconds
        if costs.overlap:
            if len(shares) > 1:
                busy["host"] -= min(costs.booked_s(shares[0] * load.rows), experts[1].chain_s + heads_s[1])
            shared = self._shared(busy)
            outside = _Outside(
                total_s=computed_s + busy["host"] + copied_s,
                standing_s=computed_s + busy["host"] + copied_s - stream.head_share * heads_s[-1],
                beside_s={name: max(0.0, shared[name] - busy[user]) for name, user in _LINKS if name in shared},
                late_s={"disk_read": self._resources.read_lost_s(busy)},
            )
            shared["disk_read"] += outside.late_s["disk_read"]
            if len(halves) > 1:
                chain = self._chain_of_halves(busy, attention, experts, stream, outside)
            else:
                chain = self._chain(busy, attention[0], experts[0], stream, outside)
            bounds = shared | chain
        else:
            bounds = {"serial": sum(busy.values())}
        total_s = max(bounds.values())
        if self._on_cpu:  # the thread that computes works for other lanes, too
            own = {user: layers * seconds for user, seconds in _summed(part.own_s for part in attention).items()}
            busy = _summed([busy, own, {"gpu": -sum(own.values())}])
        return SweepTime(total_s=total_s, lanes_s=_lanes_s(busy, total_s), bounds_s=bounds)

    def _stream_beside(self, demand: Demand | None, halves: int) -> _WeightStream:
        key = demand is not None, halves
        if key not in self._streams:
            held = self._costs.allocation.held_slots if halves > 1 else 0
            self._streams[key] = _WeightStream(self._costs, demanded=key[0], held_slots=held)
        return self._streams[key]

    def _shared(self, busy: Mapping[str, float]) -> dict[str, float]:
        """The fewest seconds in which each thread, and each resource that threads share, does its work.

        On device cpu, while all c cores compute, a copy that wants a part x of them runs on one of c + 1 threads and gets
        1 / (c + 1) of them: it takes x (c + 1) times as long, where that is more than 1.
        """
        found = {name: sum([busy[user] for user in users]) for name, users in THREADS.items()}
        found |= self._resources.seconds(busy)
        found["kv loads"] = self._loads_s(busy) + self._waited_s(busy)
        found["disk_write"] += lost_s(busy["disk_write"], self._resources.kv_speed["disk_write"], busy["disk_read"])
        if self._on_cpu:
            cores = self._costs.hardware.cores
            slower = max(0.0, self._beside["h2d"] * (cores + 1) - 1)
            found["h2d"] += slower * min(busy["h2d"], sum(busy[user] for user in _ALL_CORES))
        return found

    def _waited_s(self, busy: Mapping[str, float]) -> float:
        """Seconds that the thread which loads KV loses to streamed weights on the disk.

        Two that read share the disk, so while both do, each loses what the other gets done. The thread reads and copies in turn; of
        what the other one reads, that part coincides which the thread reads of its time.
        """
        read_s = busy["disk_read/kv"]
        if not read_s:
            return 0.0
        speed = min(0.5, self._resources.kv_speed["disk_read/kv"])
        late_s = lost_s(read_s, speed, busy["disk_read"] / (1 - speed))
        return read_s / sum(busy[user] for user in THREADS["kv loads"]) * late_s

    def _loads_s(self, busy: Mapping[str, float], moved_s: float = 0.0) -> float:
        """Seconds of the thread that fetches KV, without those in which it rests; weights of ``moved_s`` are moved in those.

        KV keeps the link busy for a part w of its seconds. While weights are moved too, each has 1 / (1 + w) of its speed, so KV
        takes longer by w times the seconds of those weights that are not moved while the thread rests or reads the disk.
        """
        loads_s = sum(busy[user] for user in THREADS["kv loads"])
        if self._on_cpu:
            return loads_s
        beside_s = min(busy["h2d/kv"], max(0.0, busy["h2d"] - busy["disk_read/kv"] - moved_s))
        return loads_s + self._resources.seconds({"h2d/kv": beside_s})["pcie"]

    def _chain(
        self,
        busy: Mapping[str, float],
        attention: AttentionPhase,
        experts: _Experts,
        stream: _WeightStream,
        outside: _Outside,
    ) -> dict[str, float]:
        """Seconds of the compute chain, and of each link behind it.

        The chain is L layers of attention and experts, and what is done once per sweep. A link has its own seconds and those
        in which it stands still: in each of the L windows from the last streamed expert of a layer to the first of the next,
        with that layer's attention and the experts that live on the device, no slot is freed, so it stops after the seconds
        ``ahead_s`` that fill all slots. The last window has what is done once, too, but for the head as far as it is streamed:
        it frees slots. What else crosses a link does so while layers are computed, in these windows at best.
        """
        layers, experts_s = self._layers, experts.chain_s
        loads_s = sum(busy[user] for user in THREADS["kv loads"])
        slower = 1 + self._waited_s(busy) / loads_s if loads_s else 1.0
        routed_s = sum(experts.moved_s[user] for user in _DEMANDED)
        phase_s = attention.seconds(experts_s, slower, routed_s)
        chain_s = layers * (phase_s + experts_s) + outside.total_s
        name = "on demand" if experts_s > experts.compute_s else "schedule"
        computed_s = chain_s - layers * (experts_s - experts.compute_s)
        found = {name: chain_s + (self._beside_s(busy, computed_s) if self._on_cpu else 0.0)}
        for name, alone_s, ahead_s in stream.links:
            link_s = alone_s + outside.late_s.get(name, 0.0)
            # Where a link decides, the experts last as long as their units take to come, and more KV hides behind them.
            window_s = attention.seconds(max(experts_s, link_s / layers - min(ahead_s, phase_s)), slower, routed_s)
            window_s += experts.resident_s
            idle_s, last_s = layers * max(0.0, window_s - ahead_s), max(0.0, window_s - ahead_s)
            end_s = max(0.0, window_s + outside.standing_s - ahead_s) - last_s
            beside_s = outside.beside_s.get(name, 0.0)
            found["slots"] = max(found.get("slots", 0.0), link_s + max(idle_s, beside_s) + end_s)
        return found

    def _chain_of_halves(
        self,
        busy: Mapping[str, float],
        attention: Sequence[AttentionPhase],
        experts: Sequence[_Experts],
        stream: _WeightStream,
        outside: _Outside,
    ) -> dict[str, float]:
        """The same of two half-blocks. A sweep is a first layer, L - 1 more, and the experts of the second half.

        Where a link decides, the last batch of the second half is attended, and the first one of the next layer projected, when
        the first half has computed the last unit of a layer to come. It was projected a batch's part of a layer before. Only
        then is a slot freed. At the end of a sweep that takes as long as all of what is outside the layers and in the first one,
        in which the slots of the last layer are filled, too. Fetched KV comes all the time but for what is outside the layers.
        """
        layers, seconds = self._layers, [part.chain_s for part in experts]
        march = HalfBlocks(attention, seconds)
        chain_s = march.first_s + (layers - 1) * march.layer_s + seconds[1] + outside.total_s
        moved_s = min([outside.total_s, *(ahead_s for _, _, ahead_s in stream.links)])
        chain_s = max(chain_s, self._loads_s(busy, moved_s) + outside.total_s)
        found = {"schedule": chain_s + (self._beside_s(busy, chain_s) if self._on_cpu else 0.0)}
        first, last, batches = attention[0].batches[0], attention[1].batches[-1], len(attention[1].batches)
        for name, alone_s, ahead_s in stream.links:
            link_s = alone_s + outside.late_s.get(name, 0.0)
            late_s = max(last.fetch_s, last.store_s + last.cpu_s + last.attended_s) - link_s / layers / batches
            window_s = sum(seconds) / expert_units(self._costs.arch) + first.up_s + first.project_s
            window_s += max(0.0, late_s) + last.attend_s
            idle_s = max(0.0, window_s - ahead_s)
            end_s = march.first_s + seconds[1] + outside.standing_s - link_s / layers - ahead_s
            found["slots"] = max(found.get("slots", 0.0), link_s + (layers - 1) * idle_s + max(idle_s, end_s))
        return found

    def _beside_s(self, busy: Mapping[str, float], computed_s: float) -> float:
        """Seconds that others take from the cores that compute on device cpu: copies and readers, and new KV on its way home,
        which wants all cores and has half of them, but where the CPU's attention waits for it and nothing is computed meanwhile."""
        stored_s = 0.0 if busy["cpu"] else min(computed_s, busy["d2h"])
        return stored_s + sum(share * min(computed_s, busy[user]) for user, share in self._beside.items())


def beside_shares(resources: Resources) -> dict[str, float]:
    """Part of all cores that weights and disk transfers take from what computes beside them on device cpu."""
    users = ("h2d", *(user for user in USERS if user.startswith("disk") and user not in _DEMANDED))
    return {user: resources.seconds({user: 1.0})["cores"] for user in users}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outside:
    """Seconds beside the layers.

    ``total_s``: of the chain; ``standing_s``: of these, those in which no slot is freed; ``beside_s``: what a link does beside
    weights, in the layers, by the name of the resource; ``late_s``: what its weights take longer as cores compute meanwhile.
    """

    total_s: float
    standing_s: float
    beside_s: Mapping[str, float]
    late_s: Mapping[str, float]


class _WeightStream:
    """What is moved ahead of the computation, whatever is routed where.

    Args:
        costs: durations of the operations.
        demanded: experts come on demand; only what else is streamed passes through the slots that are kept for that.
        held_slots: those that hold a layer for two half-blocks.

    Attributes:
        busy_s: seconds of a sweep, by user of `cost_model.timing.contention`.
        head_share: part of the head's units that are streamed.
        links: of each link, (the shared resource that it alone is of those who bring weights, its seconds in a sweep, those of what
            it may bring before a slot is freed).
    """

    def __init__(self, costs: Costs, demanded: bool = False, held_slots: int = 0):
        without = {tier: costs.routing.streamed(tier) if demanded else (0, 0) for tier in ("cpu", "disk")}
        moved = {tier: costs.streamed(tier, without=these) for tier, these in without.items()}
        # On device cpu, disk units are read straight into their slot.
        copied = moved["cpu"] + (moved["disk"] if costs.hardware.device == "cuda" else [])
        copy_s = sum(costs.copy_s(size, units) for units, size in copied)
        read_s = sum(costs.read_s(size, units) for units, size in moved["disk"])
        from_host, from_disk = (sum(units for units, _ in moved[tier]) for tier in ("cpu", "disk"))
        slots = min(costs.allocation.slots, KEPT_SLOTS) if demanded else costs.allocation.slots - held_slots
        at, chunks = costs.allocation.placement, head_chunks(costs.arch)
        self.head_share = sum(at.count_of(tier, "head") for tier in TIERS[1:]) / chunks
        self.busy_s = {"h2d": copy_s, "disk_read": read_s}
        if costs.stages_host_units:
            self.busy_s["stage"] = sum(costs.copy_s(size, units) for units, size in moved["cpu"])
        self.links = _links(costs, from_host, from_disk, copy_s, read_s, slots)


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of what has the same name."""
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0.0) + value
    return found


def _links(
    costs: Costs, from_host: int, from_disk: int, copy_s: float, read_s: float, slots: int
) -> list[tuple[str, float, float]]:
    """(shared resource, seconds of a sweep, seconds of what fills all slots) of each link that brings units; none where none is
    streamed. Where two links count as one, it is no part of a single resource, which is "" then.

    On CUDA every unit is copied, and the disk fills its staging slots as well. On device cpu each unit is copied or read into
    its slot, and the two count as one link: with one slot they take turns, and each further one lets a unit of the next kind
    come while the last of the other kind does, at both changes of kind in each layer.
    """
    allocation, layers = costs.allocation, costs.arch.num_layers
    if not from_host + from_disk:
        return []
    part = slots / (from_host + from_disk)
    if costs.hardware.device == "cuda":
        staged = allocation.staging_slots / from_disk if from_disk else 0.0
        return [("pcie", copy_s, part * copy_s), ("disk_read", read_s, (part + staged) * read_s)]
    # A layer's host units come before its disk units, so few slots hold either these or those, and one link rests.
    each_s = min(copy_s / from_host, read_s / from_disk) if from_host and from_disk else 0.0
    link_s = max(copy_s, read_s, copy_s + read_s - 2 * layers * (slots - 1) * each_s)
    return [("" if from_host else "disk_read", link_s, part * link_s)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """Routing and experts of a mean layer.

    ``compute_s``: the compute device is busy; ``chain_s``: until the last of them is done; ``resident_s``: until the first that
    is streamed; ``moved_s``: busy seconds of those who bring experts on demand, by user of `cost_model.timing.contention`.
    """

    compute_s: float
    chain_s: float
    resident_s: float
    moved_s: Mapping[str, float]


def _experts(costs: Costs, tokens: float, demand: Demand | None, stream: _WeightStream) -> _Experts:
    """Those of a mean layer: all that are touched, one after the other, and the MLPs of dense layers.

    On demand, those that live on the device and those that have come are computed while others come; the last one to come
    is computed after that. A link that also streams is shared, so each of the two takes twice as long while both move.
    """
    arch = costs.arch
    layers, dense = arch.num_layers, len(arch.dense_layers)
    beside_s = dense * (costs.mlp_s(tokens) + 2 * costs.op_s) if dense else 0.0
    if demand is None:
        each_layer = costs.touched(tokens) * costs.reached_expert_s(tokens) + (expert_units(arch) + 1) * costs.op_s
        seconds = ((layers - dense) * each_layer + beside_s) / layers
        at = costs.allocation.placement
        resident = at.count_of("gpu", "expert") / sum(at.count_of(tier, "expert") for tier in TIERS)
        return _Experts(
            compute_s=seconds,
            chain_s=seconds,
            resident_s=resident * seconds,
            moved_s=dict.fromkeys(_DEMANDED, 0.0),
        )
    own, asking = costs.demanded(demand, tokens), len(demand.layers)
    # Beside the experts: the routing of each layer, and two operations with those that come.
    other_s = ((layers - dense + 2 * asking) * costs.op_s + asking * own.last_s + beside_s) / layers
    while_s = (demand.resident_units * (own.unit_s + costs.op_s) + asking * own.ahead_s) / layers
    moved_s = {
        "disk_read/routed": demand.disk_layers * own.read_s / layers,
        "h2d/routed": asking * (own.copy_s + own.copy_last_s) / layers,
    }
    # What is streamed begins when the attention of the layer is over, as this does, and a link has room for one at a time.
    disk_layers = max(1, demand.disk_layers)
    read_s = own.read_s + min(own.read_s, stream.busy_s["disk_read"] / disk_layers)
    copied_s = own.copy_s + own.copy_last_s
    if costs.hardware.device == "cuda":  # on device cpu a copy is work for a core of its own
        copied_s += min(copied_s, stream.busy_s["h2d"] / asking)
    # Layers that have experts on disk wait for these, the others do not: the mean of both, not of what they wait for.
    on_disk_s = max(read_s + own.copy_last_s, copied_s)
    waits = ((demand.disk_layers, on_disk_s), (asking - demand.disk_layers, copied_s))
    beyond_s = sum(count * max(0.0, wait_s - while_s) for count, wait_s in waits) / layers
    return _Experts(
        compute_s=while_s + other_s,
        chain_s=while_s + beyond_s + other_s,
        resident_s=while_s,
        moved_s=moved_s,
    )


def _lanes_s(busy: Mapping[str, float], total_s: float) -> dict[str, float]:
    """Seconds of a sweep in which each lane is at work, at most all of it.

    Several threads of a lane share what it has, so that while they work at once each takes longer: their seconds alone
    add up, until none is left.
    """
    lanes = dict.fromkeys(_LANES, 0.0)
    for user, seconds in busy.items():
        if user != "stage":  # a copy within host memory is on no lane
            lanes[_LANE_OF[user]] += seconds
    return {lane: min(seconds, total_s) for lane, seconds in lanes.items()}


def _head_s(costs: Costs, load: SweepLoad, share: float) -> float:
    """Seconds of all chunks of the head over a part of the rows, and of the operations before and after them."""
    chunks = head_chunks(costs.arch)
    elements = costs.arch.embed_params / chunks
    each_s = costs.head_s(share * load.logits, elements, share * load.prompt_tokens)
    return chunks * (each_s + costs.op_s) + 2 * costs.op_s
