"""The attention phase of a mean layer in closed form: who waits for whom, GPU batch by GPU batch.

The order is that of `policies.schedule`. Batch j + 1 is projected, and its KV requested, before batch j is attended; the
KV of the first batch is requested a layer's experts earlier. Hidden states are loaded right before their batch is
projected, by the thread that stores those of the batches before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cost_model.timing.op_costs import Costs
from cost_model.timing.sweep_load import BatchLoad

#: Users of `cost_model.timing.contention` that bring hidden states to the device, and home.
UP = ("disk_read/wait", "disk_read/act", "h2d/act")
DOWN = ("d2h/act", "disk_write/wait", "disk_write/act")


@dataclass(frozen=True, slots=True)
class _Batch:
    """Seconds of one GPU batch in one layer, by operation; dispatch is counted in ``project_s`` and ``attend_s``.

    ``fetch_s``: its KV to the device, from disk too; ``up_s`` and ``down_s``: its hidden states, from and to disk too.
    """

    project_s: float
    fetch_s: float
    store_s: float
    cpu_s: float
    attended_s: float
    attend_s: float
    up_s: float
    down_s: float


class AttentionPhase:
    """The attention of all GPU batches of a layer.

    Args:
        costs: durations of the operations.
        cut: the GPU batches.

    Attributes:
        compute_s: seconds that the compute device is busy.
        moved_s: busy seconds of everybody else, by user of `cost_model.timing.contention`.
    """

    def __init__(self, costs: Costs, cut: Sequence[BatchLoad]):
        tiers = [*costs.allocation.activation_tiers, *["gpu"] * len(cut)][: len(cut)]
        self.moved_s = dict.fromkeys(
            ("cpu", "h2d/kv", "h2d/attended", "h2d/act", "d2h", "d2h/act", "disk_read/kv", "disk_read/act",
             "disk_read/wait", "disk_write", "disk_write/act", "disk_write/wait"), 0.0,
        )  # fmt: skip
        self._batches: list[_Batch] = []
        for (batch, tier), alike in groupby(zip(cut, tiers, strict=True)):  # most are like the one before
            count = sum(1 for _ in alike)
            self._batches += [self._batch(costs, batch, tier, count)] * count
        self.compute_s = sum(batch.project_s + batch.attend_s for batch in self._batches)

    def seconds(self, experts_s: float) -> float:
        """Seconds of the phase, after experts that take so long."""
        now = stored = on_cpu = ready = 0.0
        loaded = self._batches[0].fetch_s - experts_s
        moved = self._batches[-1].down_s - experts_s
        before = None
        for batch in self._batches:
            if before and batch.fetch_s:
                loaded = max(loaded, now) + batch.fetch_s
            if batch.up_s:
                now = moved = max(moved, now) + batch.up_s
            now += batch.project_s
            wait = loaded if batch.fetch_s else 0.0
            stored = max(stored, now, wait) + batch.store_s
            if batch.cpu_s:
                on_cpu = max(on_cpu, stored) + batch.cpu_s
                wait = max(wait, on_cpu + batch.attended_s)
            if before:
                now = max(now, ready) + before.attend_s
                moved = max(moved, now) + before.down_s
            before, ready = batch, wait
        return max(now, ready) + before.attend_s

    def _batch(self, costs: Costs, batch: BatchLoad, tier: str, count: int) -> _Batch:
        """Its seconds; what so many of them move is added to ``moved_s``."""
        moved = self.moved_s
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
            moved["disk_read/kv"] += count * read
            moved["disk_write"] += count * costs.write_kv_s(batch)
        up, down = self._hidden_states(costs, batch, tier, count) if away else (0.0, 0.0)
        handed_on = away + fetches + (fetches or on_host) + on_host + to_disk
        return _Batch(
            project_s=costs.project_s(batch) + (1 + handed_on) * costs.op_s,
            fetch_s=read + load,
            store_s=store,
            cpu_s=cpu,
            attended_s=attended,
            attend_s=costs.attend_s(batch) + (1 + away) * costs.op_s,
            up_s=up,
            down_s=down,
        )

    def _hidden_states(self, costs: Costs, batch: BatchLoad, tier: str, count: int) -> tuple[float, float]:
        """Seconds in which those of a batch that live elsewhere come and go; those of so many are added to ``moved_s``."""
        moved = hidden_states_s(costs, batch, tier)
        for user, seconds in moved.items():
            self.moved_s[user] += count * seconds
        return sum(moved[user] for user in UP), sum(moved[user] for user in DOWN)


def hidden_states_s(costs: Costs, batch: BatchLoad, tier: str) -> dict[str, float]:
    """Seconds in which those of a batch that live elsewhere come and go, by user of `cost_model.timing.contention`."""
    seconds = {"h2d/act": costs.load_act_s(batch), "d2h/act": costs.store_act_s(batch)}
    wait_s = costs.disk_wait_s if tier == "disk" else 0.0
    read_s, write_s = (costs.read_act_s(batch), costs.write_act_s(batch)) if tier == "disk" else (0.0, 0.0)
    seconds |= {"disk_read/wait": wait_s, "disk_read/act": read_s - wait_s}
    return seconds | {"disk_write/wait": wait_s, "disk_write/act": write_s - wait_s}
