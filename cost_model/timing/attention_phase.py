"""The attention phase of a mean layer in closed form: who waits for whom, GPU batch by GPU batch.

Of a block that marches as two halves, `HalfBlocks` is the same with the experts of one half between the batches of the other one.

The order is that of `policies.schedule`. Batch j + 1 is projected, and its KV requested, before batch j is attended; the
KV of the first batch is requested a layer's experts earlier. Hidden states are loaded right before their batch is
projected, by the thread that stores those of the batches before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, groupby, islice

from cost_model.timing.op_costs import Costs
from cost_model.timing.sweep_load import BatchLoad
from policies.schedule import KV_BUFFERS, is_moved_at_once

#: Users of `cost_model.timing.contention` that bring hidden states to the device, and home.
UP = ("disk_read/wait", "disk_read/act", "h2d/act")
DOWN = ("d2h/act", "disk_write/wait", "disk_write/act")
#: Users that are at work beside the compute device, by lane.
_BESIDE = (
    *("cpu", "h2d/kv", "h2d/attended", "h2d/act", "d2h", "d2h/act"),
    *("disk_read/kv", "disk_read/act", "disk_read/wait", "disk_write", "disk_write/act", "disk_write/wait"),
)
#: Layers that are followed of two half-blocks.
_LAPS = 3


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Seconds of one GPU batch in one layer, by operation; dispatch is counted in ``project_s`` and ``attend_s``, and so is, on
    device cpu, all that the thread which computes does itself (`policies.schedule.is_moved_at_once`).

    ``fetch_s``: its KV to the device, from disk too; ``up_s`` and ``down_s``: its hidden states, from and to disk too.
    ``on_disk``: it has rows there, whose new KV goes home when the old has come.
    """

    project_s: float
    fetch_s: float
    store_s: float
    cpu_s: float
    attended_s: float
    attend_s: float
    up_s: float
    down_s: float
    on_disk: bool

    def on_cpu(self, read_s: float, moves_states: bool) -> BatchTimes:
        """The same on device cpu, where the thread that computes does itself, before it attends, what KV takes beyond ``read_s``.

        Args:
            moves_states: it moves hidden states, too.
        """
        own_s = self.fetch_s - read_s + self.store_s + self.cpu_s + self.attended_s
        times = replace(self, attend_s=self.attend_s + own_s, fetch_s=read_s, store_s=0.0, cpu_s=0.0, attended_s=0.0)
        if not moves_states:
            return times
        up_s, down_s = times.project_s + self.up_s, times.attend_s + self.down_s
        return replace(times, project_s=up_s, attend_s=down_s, up_s=0.0, down_s=0.0)


class AttentionPhase:
    """The attention of all GPU batches of a layer.

    Args:
        costs: durations of the operations.
        cut: the GPU batches.
        first: how many of the block are before them, in the other half.

    Attributes:
        batches: seconds of each.
        compute_s: seconds that the thread which computes is busy.
        moved_s: busy seconds of everybody else, by user of `cost_model.timing.contention`.
        own_s: what the thread that computes moves itself, a part of ``compute_s``, by user.
    """

    def __init__(self, costs: Costs, cut: Sequence[BatchLoad], first: int = 0):
        tiers = [*costs.allocation.activation_tiers[first:], *["gpu"] * len(cut)][: len(cut)]
        self.moved_s, self.own_s = dict.fromkeys(_BESIDE, 0.0), dict.fromkeys(_BESIDE, 0.0)
        self.batches: list[BatchTimes] = []
        for (batch, tier), alike in groupby(zip(cut, tiers, strict=True)):  # most are like the one before
            count = sum(1 for _ in alike)
            self.batches += [self._times(costs, batch, tier, count)] * count
        self.compute_s = sum(batch.project_s + batch.attend_s for batch in self.batches)

    def seconds(self, experts_s: float, slower: float = 1.0, routed_s: float = 0.0) -> float:
        """Seconds of the phase, after experts that take so long, where loads of KV take ``slower`` times as long as alone, and
        that of the first batch shares its links with experts that come on demand for ``routed_s``.

        Each time is when a thread is done with what it has got so far, counted from the first projection: ``now`` the main
        thread, ``loaded`` the one that fetches KV, ``stored`` the one that takes new KV home, ``on_cpu`` the CPU's
        attention, ``brought`` the one that brings its results, ``moved`` the one that moves hidden states. What is asked
        for while the experts of the layer before run begins that much earlier. ``ready`` is when all that the batch to
        attend next waits for is there.
        """
        now = stored = on_cpu = brought = ready = 0.0
        first_s = self.batches[0].fetch_s
        loaded = slower * first_s + min(first_s, routed_s) - experts_s
        moved = self.batches[-1].down_s - experts_s
        before: BatchTimes | None = None
        for batch in self.batches:
            if before and batch.fetch_s:
                loaded = max(loaded, now) + slower * batch.fetch_s
            if batch.up_s:
                now = moved = max(moved, now) + batch.up_s
            now += batch.project_s
            wait = loaded if batch.fetch_s else 0.0
            stored = max(stored, now, wait if batch.on_disk else 0.0) + batch.store_s
            if batch.cpu_s:
                on_cpu = max(on_cpu, stored) + batch.cpu_s
                brought = max(brought, on_cpu) + batch.attended_s
                wait = max(wait, brought)
            if before:
                now = max(now, ready) + before.attend_s
                moved = max(moved, now) + before.down_s
            before, ready = batch, wait
        return max(now, ready) + self.batches[-1].attend_s

    def _times(self, costs: Costs, batch: BatchLoad, tier: str, count: int) -> BatchTimes:
        """Its seconds; what so many of them move is added to ``moved_s`` or ``own_s``."""
        on_cpu = costs.hardware.device == "cpu"
        moved = self.own_s if on_cpu else self.moved_s
        fetches, on_host = batch.new["fetch"] + batch.new["disk"] > 0, batch.new["cpu"] > 0
        to_disk, away = batch.new["disk"] > 0, tier != "gpu"
        attended = costs.attended_s(batch) if on_host else 0.0
        load = costs.load_kv_s(batch) - attended if fetches else 0.0
        read = costs.read_kv_s(batch) if to_disk else 0.0
        store = costs.store_kv_s(batch) if fetches or on_host else 0.0
        cpu = costs.cpu_attend_s(batch) if on_host else 0.0
        for user, seconds in (("cpu", cpu), ("h2d/kv", load), ("h2d/attended", attended), ("d2h", store)):
            moved[user] += count * seconds
        if to_disk:
            self.moved_s["disk_read/kv"] += count * read
            self.moved_s["disk_write"] += count * costs.write_kv_s(batch)
        up, down = self._hidden_states(costs, batch, tier, count) if away else (0.0, 0.0)
        handed_on = away + fetches + (fetches or on_host) + on_host + to_disk * (1 + on_cpu)
        times = BatchTimes(
            project_s=costs.project_s(batch) + (1 + handed_on) * costs.op_s,
            fetch_s=read + load,
            store_s=store,
            cpu_s=cpu,
            attended_s=attended,
            attend_s=costs.attend_s(batch) + (1 + away) * costs.op_s,
            up_s=up,
            down_s=down,
            on_disk=to_disk,
        )
        return times.on_cpu(read, is_moved_at_once(costs.hardware.device, tier)) if on_cpu else times

    def _hidden_states(self, costs: Costs, batch: BatchLoad, tier: str, count: int) -> tuple[float, float]:
        """Seconds in which those of a batch that live elsewhere come and go; those of so many are added to ``moved_s`` or ``own_s``."""
        moved = hidden_states_s(costs, batch, tier)
        added = self.own_s if is_moved_at_once(costs.hardware.device, tier) else self.moved_s
        for user, seconds in moved.items():
            added[user] += count * seconds
        return sum(moved[user] for user in UP), sum(moved[user] for user in DOWN)


class HalfBlocks:
    """The chain of operations of a block that marches as two halves, in the order of `policies.schedule`.

    In the turn of one half, the next batch is projected before one is attended, and between them a part of the experts of the
    other half is computed, all of it before the last but one is attended. When a batch that fetches KV has been attended,
    that of the last but one after it is requested.

    Args:
        halves: the attention of each half.
        experts_s: seconds of the experts of each half.

    Attributes:
        first_s: seconds of the first layer, until the experts of its second half begin.
        layer_s: seconds of each layer after it: of the third one, when those before it have filled the lanes.
    """

    def __init__(self, halves: Sequence[AttentionPhase], experts_s: Sequence[float]):
        self._order = [phase.batches for phase in halves]
        self._now = self._stored = self._on_cpu = self._brought = self._loaded = self._moved = 0.0
        self._to_load = cycle([batch.fetch_s for order in self._order for batch in order if batch.fetch_s])
        self._loads: deque[float] = deque()  # when the KV that has been requested is there
        for _ in range(KV_BUFFERS):
            self._load_next()
        ends, ready = [], self._project(self._order[0][0])
        for layer in range(_LAPS):
            for half in range(2):
                ready = self._turn(half, ready, experts_s[1 - half] if layer or half else 0.0)
            ends.append(self._now)
        self.first_s, self.layer_s = ends[0], ends[-1] - ends[-2]

    def _turn(self, half: int, ready: float, experts_s: float) -> float:
        """One half in a layer, whose first batch is ``ready`` then; returns when the batch after the last one is."""
        own = self._order[half]
        parts = max(1, len(own) - 1)
        following, part_s = [*own[1:], self._order[1 - half][0]], experts_s / parts
        for place, (batch, after) in enumerate(zip(own, following), start=1):
            if place == len(own) == parts:
                self._now += part_s
            coming = self._project(after)
            if place < len(own):
                self._now += part_s
            self._now = max(self._now, ready) + batch.attend_s
            if batch.fetch_s:
                self._load_next()
            self._moved = max(self._moved, self._now) + batch.down_s
            ready = coming
        return ready

    def _load_next(self) -> None:
        """Requests the KV of the next batch that fetches."""
        for fetch_s in islice(self._to_load, 1):
            self._loaded = max(self._loaded, self._now) + fetch_s
            self._loads.append(self._loaded)

    def _project(self, batch: BatchTimes) -> float:
        """When all is there that the attention of the batch waits for."""
        loaded = self._loads.popleft() if batch.fetch_s else 0.0
        if batch.up_s:
            self._now = self._moved = max(self._moved, self._now) + batch.up_s
        self._now += batch.project_s
        self._stored = max(self._stored, self._now, loaded if batch.on_disk else 0.0) + batch.store_s
        if not batch.cpu_s:
            return loaded
        self._on_cpu = max(self._on_cpu, self._stored) + batch.cpu_s
        self._brought = max(self._brought, self._on_cpu) + batch.attended_s
        return max(loaded, self._brought)


def hidden_states_s(costs: Costs, batch: BatchLoad, tier: str) -> dict[str, float]:
    """Seconds in which those of a batch that live elsewhere come and go, by user of `cost_model.timing.contention`."""
    seconds = {"h2d/act": costs.load_act_s(batch), "d2h/act": costs.store_act_s(batch)}
    wait_s = costs.disk_wait_s if tier == "disk" else 0.0
    read_s, write_s = (costs.read_act_s(batch), costs.write_act_s(batch)) if tier == "disk" else (0.0, 0.0)
    seconds |= {"disk_read/wait": wait_s, "disk_read/act": read_s - wait_s}
    return seconds | {"disk_write/wait": wait_s, "disk_write/act": write_s - wait_s}
