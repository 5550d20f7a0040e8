"""Replays sweeps as the runtime's threads would: an event simulation with durations from `Costs`.

Every thread works its operations off in order (`cost_model.simulation.program`). An operation has seconds that it takes alone;
while it runs it has a speed, at most 1, that follows from what else runs (`cost_model.timing.contention`). The weight stream runs
ahead, across layers and sweeps, as far as there are slots; a slot is free after the last operation that computes with
its unit. `cost_model.timing.sweep_bounds` is the closed form of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

from cost_model.memory.allocation import KEPT_SLOTS
from cost_model.routing.demand import Demand
from cost_model.simulation.event_loop import Buffers, EventLoop, Record
from cost_model.simulation.op_tables import table_of_bytes, table_of_seconds
from cost_model.simulation.program import Program, compile_sweep
from cost_model.simulation.serial_loop import SerialLoop
from cost_model.simulation.weight_queues import WeightQueues, weight_queues
from cost_model.timing.contention import USERS, Resources
from cost_model.timing.op_costs import Costs
from cost_model.timing.sweep_load import BatchLoad, SweepLoad
from policies.common.chrome_trace import Span
from policies.schedule import LANES, SweepShape, SweepUnits

#: Where the runtime's recorder puts what is not recorded under its own name.
_TRACKS = {
    "disk_read": "disk_read/0",
    "disk_read/kv": "disk_read/kv0",
    "disk_write": "disk_write/kv0",
    "disk_read/routed": "disk_read/1",
    "h2d/routed": "h2d",
}
_NOT_RECORDED = ("host", "h2d/attended", "stage", "disk_read/wait", "disk_write/wait")
_LANE_MASKS = {
    lane: sum(1 << place for place, user in enumerate(USERS) if user.partition("/")[0] == lane) for lane in LANES
}
#: Of each GPU batch, whether it has rows whose KV is fetched, that the CPU attends, and whose KV is on disk.
_Shapes = tuple[tuple[bool, bool, bool], ...]
#: Sweeps of one load until they are alike, as a rule and at most.
STEADY_SWEEPS = (3, 8)
_SETTLED = 0.002
_NONE = frozenset[int]()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What sweeps in a row do.

    Attributes:
        sweep_s: seconds of each sweep, from its start to the start of the next.
        lanes_s: per sweep, the seconds in which each lane is at work.
        spans: (track, name, start, end, bytes) of every operation, tracks and names as the runtime's recorder has
            them; empty unless kept.
    """

    sweep_s: list[float]
    lanes_s: list[dict[str, float]]
    spans: list[Span]


def replay(costs: Costs, loads: Sequence[SweepLoad], gpu_batch_size: int, *, keep_spans: bool = False) -> Replayed:
    """Sweeps one after the other; before the first one nothing has been prefetched.

    Args:
        costs: durations of the operations.
        loads: the rows in flight of each sweep.
        gpu_batch_size: rows per GPU batch.
        keep_spans: keep every operation, for a trace.
    """
    return Replayer(costs, gpu_batch_size).replay(loads, keep_spans=keep_spans)


class Replayer:
    """`replay` for many sweeps of one policy: what depends on their shape alone is made once.

    Args:
        costs: durations of the operations.
        gpu_batch_size: rows per GPU batch.
    """

    def __init__(self, costs: Costs, gpu_batch_size: int):
        self._costs, self._rows = costs, gpu_batch_size
        self._units = SweepUnits.of(costs.allocation.placement.tier_of)
        self._streams: dict[frozenset[int], tuple[WeightQueues, Buffers]] = {}
        self._programs: dict[tuple[_Shapes, int, frozenset[int], bool], Program] = {}
        self._speeds = _KnownSpeeds(costs)

    def replay(self, loads: Sequence[SweepLoad], *, keep_spans: bool = False) -> Replayed:
        """As the function of this name."""
        done = Replayed(sweep_s=[], lanes_s=[], spans=[])

        def record(user: str, name: str, start: float, end: float, nbytes: float) -> None:
            if user not in _NOT_RECORDED:
                done.spans.append((_TRACKS.get(user, user), name, start, end, round(nbytes)))

        for sweep_s, lanes_s in self._sweeps(loads, self._rows, record if keep_spans else None):
            done.sweep_s.append(sweep_s)
            done.lanes_s.append(lanes_s)
        return done

    def steady(self, load: SweepLoad, gpu_batch_size: int | None = None) -> tuple[float, dict[str, float]]:
        """Seconds of a sweep in a row of like ones, and those in which each lane is at work.

        At first nothing has been prefetched; where many slots fill slowly, that takes more than a sweep to be made up.

        Args:
            gpu_batch_size: rows per GPU batch, where it is another one than the policy's.
        """
        fewest, most = STEADY_SWEEPS
        found = self._sweeps(repeat(load), gpu_batch_size or self._rows)
        for sweeps in (fewest, most - fewest):
            *_, (before_s, _), (sweep_s, lanes_s) = islice(found, sweeps)
            if abs(sweep_s - before_s) <= _SETTLED * sweep_s:
                break
        return sweep_s, lanes_s

    def _sweeps(
        self, loads: Iterable[SweepLoad], rows: int, record: Record | None = None
    ) -> Iterator[tuple[float, dict[str, float]]]:
        """Of each sweep, one after the other: its seconds, and those in which each lane is at work."""
        costs = self._costs
        before: SweepLoad | None = None
        demand: Demand | None = None
        loop = (EventLoop if costs.overlap else SerialLoop)(*self._stream(_NONE), self._speeds, costs.op_s, record)
        for load in loads:
            start, last = loop.now, demand
            demand = costs.routing.on_demand(load.tokens, already=demand is not None)
            if load is not before or demand is not last:  # else it is as the sweep before
                before, on_demand = load, demand.layers if demand else _NONE
                halves = costs.cut(load.seen(costs.arch), rows, demand)
                cut = [batch for half in halves for batch in half]
                seconds = table_of_seconds(costs, halves, load, demand)
                nbytes = table_of_bytes(costs, cut, demand) if record else ()
                program = self._program(cut, len(halves), on_demand, one_by_one=record is not None)
                loop.turn_to(*self._stream(on_demand))
            loop.sweep(program, seconds, nbytes)
            lanes_s = _lanes_s(loop.active_s)
            for lane, copied_s in costs.copied_s(load).items():
                lanes_s[lane] += copied_s
            yield loop.now - start, lanes_s

    def _stream(self, on_demand: frozenset[int]) -> tuple[WeightQueues, Buffers]:
        """The weight stream; in on-demand mode the expert cache borrows all but a few of its slots."""
        if on_demand not in self._streams:
            allocation = self._costs.allocation
            slots = min(allocation.slots, KEPT_SLOTS) if on_demand else allocation.slots
            buffers = Buffers(slots=slots, staging_slots=max(1, allocation.staging_slots))
            self._streams[on_demand] = weight_queues(self._costs, self._units, on_demand), buffers
        return self._streams[on_demand]

    def _program(self, cut: Sequence[BatchLoad], halves: int, on_demand: frozenset[int], one_by_one: bool) -> Program:
        shapes = tuple((b.new["fetch"] + b.new["disk"] > 0, b.new["cpu"] > 0, b.new["disk"] > 0) for b in cut)
        key = shapes, halves, on_demand, one_by_one
        if key not in self._programs:
            tiers = self._costs.allocation.activation_tiers
            fetched, on_cpu, on_disk = (frozenset(j for j, own in enumerate(shapes) if own[k]) for k in range(3))
            shape = SweepShape(
                units=self._units,
                activation_tiers=[tiers[min(j, len(tiers) - 1)] for j in range(len(cut))],
                fetched_batches=fetched,
                cpu_batches=on_cpu,
                stored_batches=fetched | on_cpu,
                disk_batches=on_disk,
                on_demand=on_demand,
                half_blocks=halves,
            )
            queues = self._stream(on_demand)[0]
            self._programs[key] = compile_sweep(
                self._costs.arch, shape, queues, device=self._costs.hardware.device, one_by_one=one_by_one
            )
        return self._programs[key]


class _KnownSpeeds(dict[int, tuple[float, ...] | None]):
    """As `event_loop.Speeds`; of each mask they are found once."""

    def __init__(self, costs: Costs):
        super().__init__()
        self._resources = Resources(costs)

    def __missing__(self, mask: int) -> tuple[float, ...] | None:
        found = self._resources.speeds([user for place, user in enumerate(USERS) if mask >> place & 1])
        slowed = any(speed != 1.0 for speed in found.values())
        self[mask] = tuple(found.get(user, 1.0) for user in USERS) if slowed else None
        return self[mask]


def _lanes_s(active_s: dict[int, float]) -> dict[str, float]:
    """Seconds in which each lane is at work, from those in which each set of users is."""
    return {lane: sum(s for mask, s in active_s.items() if mask & users) for lane, users in _LANE_MASKS.items()}
