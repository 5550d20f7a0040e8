"""A run that finds the machine otherwise than it was measured says so, and how long the rest takes then."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cost_model.hardware.hardware import Hardware
from cost_model.hardware.speeds import with_speeds
from cost_model.model.arch import ModelArch
from cost_model.simulation.simulate import simulate
from flexmoe.engine.sweep_log import Sweep, SweepLog
from flexmoe.planning.drift import COMPUTE, DISK, Drift, DriftWatch, Thresholds, drift_record
from flexmoe.planning.forecast import Forecaster
from flexmoe.progress import Progress
from flexmoe.system.trace import LaneTotals
from policies import Policy, Workload

SWEEPS, SWEEP_S, TOKENS, NBYTES = 100, 10.0, 64, 30 * 10**9
#: Predicted: the disk reads all the time, at 3 GB/s.
BUSY = {"disk_read": SWEEP_S, "gpu": 4.0}


def predicted(sweep_s=SWEEP_S, busy=BUSY):
    ends = np.arange(1, SWEEPS + 1) * sweep_s
    lanes = {lane: np.full(SWEEPS, seconds) for lane, seconds in busy.items()}
    timeline = SimpleNamespace(end_s=ends, tokens=np.full(SWEEPS, TOKENS), lanes_s=lanes)
    return SimpleNamespace(job_s=SWEEPS * sweep_s, timeline=timeline)


class FakeRun:
    """An engine's counters, sweep by sweep."""

    def __init__(self, predicted, thresholds=None, on_demand=0):
        self.sweeps, self._lanes, self.asked, self.told = SweepLog(), {}, [], []
        self.recorder = SimpleNamespace(totals=lambda: {lane: replace(t) for lane, t in self._lanes.items()})
        self.feed = SimpleNamespace(metrics=lambda: {"on_demand_sweeps": on_demand})

        def again(speeds):
            self.asked.append(speeds)
            return globals()["predicted"](SWEEP_S / min(speeds.values()))

        self.watch = DriftWatch(predicted, again, self.told.append, thresholds)

    def run(self, sweeps, wall_s, tokens=TOKENS, **busy_s):
        """So many sweeps; returns what was said after them."""
        said = []
        for _ in range(sweeps):
            for lane, seconds in busy_s.items():
                totals = self._lanes.setdefault(lane, LaneTotals())
                totals.busy_s += seconds
                totals.nbytes += NBYTES * (lane == "disk_read")
            self.sweeps.add(
                Sweep(wall_s=wall_s, rows=1, tokens=tokens, computed_tokens=tokens, prompt_tokens=0, generated_tokens=1)
            )
            if (sentence := self.watch.after_sweep(self)) is not None:
                said.append(sentence)
        return said


def test_disk_at_half_of_its_rate_is_told_with_the_hours_left():
    run = FakeRun(predicted())
    said = run.run(50, 20.0, disk_read=20.0, gpu=4.0)
    # Six sweeps, and two more of which the same can be said; the other 92 take 20 s each.
    assert said == ["the disk reads at 1.5 GB/s, 50 % below the measurement; about 30:40 left"]
    assert run.asked == [{"disk_read": 0.5}] and run.told == [run.watch.drifts]
    assert drift_record(run.watch) == {
        "lanes": [{"lane": "disk_read", "speed": 0.5, "bytes_per_s": 1.5e9}],
        "predicted_wall_s": 2000.0,
    }


def test_machine_as_measured_says_nothing():
    run = FakeRun(predicted())
    assert run.run(SWEEPS, 11.0, disk_read=11.0, gpu=4.4) == [] and not run.asked  # 9 % slower
    assert drift_record(run.watch) is None and drift_record(None) is None


def test_faster_disk_is_told_too():
    said = FakeRun(predicted()).run(50, 6.0, disk_read=5.0, gpu=4.0)
    assert said[0].startswith("the disk reads at 6 GB/s, 100 % above the measurement")


def test_cores_that_are_taken_away_are_told():
    run = FakeRun(predicted(busy={"disk_read": 1.0, "gpu": 10.0}))
    said = run.run(50, 16.0, disk_read=1.0, gpu=16.0)
    assert said[0].startswith("computation is 38 % below the measurement; about ") and run.asked == [{"gpu": 0.625}]


def test_lane_that_waits_for_others_is_not_called_slow():
    run = FakeRun(predicted())
    assert run.run(50, 40.0, disk_read=20.0, gpu=4.0) == []  # half of the time: it had no slot to read into


@pytest.mark.parametrize(
    "why",
    [
        {"tokens": 100},  # rows are not as they were planned
        {"on_demand": 1},
        {"thresholds": Thresholds(seconds=1e6)},
        {"thresholds": Thresholds(off=0.6)},
        {"thresholds": Thresholds(most_sweeps=6)},
    ],
)
def test_what_cannot_be_compared_is_not_judged(why):
    tokens = why.pop("tokens", TOKENS)
    assert FakeRun(predicted(), **why).run(50, 20.0, tokens, disk_read=20.0) == []


def test_one_slow_sweep_is_no_drift():
    run = FakeRun(predicted())
    said = run.run(6, 10.0, disk_read=10.0) + run.run(1, 25.0, disk_read=25.0) + run.run(40, 10.0, disk_read=10.0)
    assert said == []


def test_forecast_at_other_speeds_is_that_of_such_a_machine():
    arch = replace(ModelArch.from_name("mixtral-8x7b"), num_layers=2)
    machine, job = Hardware.preset("cpu"), Workload(prompt_len=32, gen_len=4, num_requests=8)
    policy = Policy.from_percent((0, 0, 100, 0, 100, 0), gpu_batch_size=8, num_gpu_batches=1, prompt_len=32, gen_len=4)
    forecaster = Forecaster(arch=arch, hardware=machine, workload=job, dtype_bytes=2)
    slower = forecaster.at_speeds({DISK: 0.5, COMPUTE: 0.25}).predict(policy)
    there = with_speeds(machine, disk_read=0.5, compute=0.25)
    assert (
        slower.job_s == simulate(arch, there, job, policy, dtype_bytes=2).job_s > 1.9 * forecaster.predict(policy).job_s
    )
    assert there.disk_read_bytes_per_s == machine.disk_read_bytes_per_s / 2
    assert there.gpu.experts[2].seconds(64, 1e6) == pytest.approx(4 * machine.gpu.experts[2].seconds(64, 1e6))
    assert forecaster.at_speeds({}).hardware == machine


def test_sentence_is_a_line_of_the_log_without_a_bar(caplog):
    caplog.set_level(logging.INFO, "flexmoe.progress")
    progress = Progress(3, 0, bar=False, left=None)
    progress.tell(str(Drift(lane=DISK, speed=0.6, bytes_per_s=1.94e9)))
    assert "the disk reads at 1.9 GB/s, 40 % below the measurement" in caplog.text


def test_sentence_stands_above_the_bar(capsys):
    progress = Progress(3, 0, bar=True, left=None)
    progress.tell("a sentence")
    progress.close()
    assert "a sentence\n" in capsys.readouterr().err
