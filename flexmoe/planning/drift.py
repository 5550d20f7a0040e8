"""Whether a run finds the machine as it was measured: what lanes took in the first sweeps beside what was predicted of them.

A disk may be shared, and cores may be throttled or somebody else's, after the measurement as before it. The speed of a lane
is the ratio of predicted to measured seconds at work over the sweeps so far. The prediction has what runs beside it, so
that a lane which only waits for another one is not slower. With the speeds that were found the job is predicted again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cost_model.simulation.simulate import Simulation
from flexmoe.engine.engine import Engine
from flexmoe.progress import duration
from flexmoe.system.trace import LaneTotals

#: Lanes that are judged.
DISK, COMPUTE = "disk_read", "gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """A lane that is not as fast as it was measured.

    Attributes:
        lane: `DISK` or `COMPUTE`.
        speed: as a part of the measured one.
        bytes_per_s: what it moves while it is at work; 0 where it moves nothing.
    """

    lane: str
    speed: float
    bytes_per_s: float = 0.0

    def __str__(self) -> str:
        off = f"{100 * abs(1 - self.speed):.0f} % {'below' if self.speed < 1 else 'above'} the measurement"
        if self.lane == DISK:
            return f"the disk reads at {self.bytes_per_s / 1e9:.2g} GB/s, {off}"
        return f"computation is {off}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """When a lane is called drifted.

    Args:
        off: its speed is off by more than this part, in
        times: as many sweeps in a row,
        sweeps: after at least so many of them, the first one left out, which finds nothing prefetched,
        seconds: and as much work of the lane;
        tokens: the sweeps have computed what was predicted of them but for this part;
        busy: a lane that is slower has worked this part of the time, as one that waits for slots reads less at once;
        most_sweeps: later ones are not judged.
    """

    off: float = 0.2
    times: int = 3
    sweeps: int = 5
    seconds: float = 10.0
    tokens: float = 0.1
    busy: float = 0.8
    most_sweeps: int = 200


class DriftWatch:
    """Compares sweep by sweep, until something is found or the first sweeps are over.

    Args:
        predicted: what the run was expected to do.
        again: predicts it with other speeds, by lane.
        found: told of what is found, once.
        thresholds: when a lane is called drifted.

    Attributes:
        drifts: what was found.
        corrected: the job at those speeds; None where nothing was found.
    """

    def __init__(
        self,
        predicted: Simulation,
        again: Callable[[Mapping[str, float]], Simulation],
        found: Callable[[tuple[Drift, ...]], None],
        thresholds: Thresholds | None = None,
    ):
        self._timeline, self._again, self._found = predicted.timeline, again, found
        self._at = thresholds or Thresholds()
        self._first: Mapping[str, LaneTotals] | None = None
        self._begun = 0  # sweeps that are left out
        self._in_a_row = dict.fromkeys((DISK, COMPUTE), 0)
        self._ended = False
        self.drifts: tuple[Drift, ...] = ()
        self.corrected: Simulation | None = None

    def after_sweep(self, engine: Engine) -> str | None:
        """Judges the sweeps so far; where drift is found, a sentence about it and the hours that are left."""
        if self._ended:
            return None
        count, at = len(engine.sweeps), self._at
        # Which experts are moved on demand no prediction knows.
        if count > min(at.most_sweeps, len(self._timeline.tokens)) or engine.feed.metrics()["on_demand_sweeps"]:
            self._ended = True
            return None
        if self._first is None:
            self._first, self._begun = engine.recorder.totals(), count
            return None
        speeds = self._speeds(engine, count)
        for lane in self._in_a_row:
            is_off = lane in speeds and abs(speeds[lane].speed - 1) > at.off
            self._in_a_row[lane] = self._in_a_row[lane] + 1 if is_off else 0
        if max(self._in_a_row.values()) < at.times:
            return None
        self.drifts = tuple(speeds[lane] for lane, times in self._in_a_row.items() if times)
        return self._tell(count)

    def _tell(self, count: int) -> str:
        self._ended = True
        self.corrected = self._again({drift.lane: drift.speed for drift in self.drifts})
        self._found(self.drifts)
        timeline = self.corrected.timeline
        done_s = float(timeline.end_s[min(count, len(timeline.end_s)) - 1])
        left_s = max(0.0, self.corrected.job_s - done_s)
        return f"{' and '.join(map(str, self.drifts))}; about {duration(left_s)} left"

    def _speeds(self, engine: Engine, count: int) -> dict[str, Drift]:
        """Speeds of the lanes that can be judged after so many sweeps."""
        at, first, timeline = self._at, self._first or {}, self._timeline
        sweeps, judged, found = engine.sweeps.since(self._begun), slice(self._begun, count), {}
        expected, computed = float(timeline.tokens[judged].sum()), sum(sweep.tokens for sweep in sweeps)
        if len(sweeps) < at.sweeps or abs(computed - expected) > at.tokens * expected:
            return {}
        wall_s = sum(sweep.wall_s for sweep in sweeps)
        for lane, now in engine.recorder.totals().items():
            if lane not in self._in_a_row:
                continue
            before = first.get(lane, LaneTotals())
            busy_s, predicted_s = now.busy_s - before.busy_s, float(timeline.lanes_s[lane][judged].sum())
            if busy_s < at.seconds or not predicted_s:
                continue
            speed = predicted_s / busy_s
            if speed > 1 or busy_s >= at.busy * wall_s:
                found[lane] = Drift(lane=lane, speed=speed, bytes_per_s=(now.nbytes - before.nbytes) / busy_s)
        return found


def drift_record(watch: DriftWatch | None) -> dict[str, Any] | None:
    """What was found, for ``--metrics-json``; None where nothing was, or nothing was predicted."""
    if watch is None or watch.corrected is None:
        return None
    return {"lanes": [asdict(drift) for drift in watch.drifts], "predicted_wall_s": watch.corrected.job_s}
