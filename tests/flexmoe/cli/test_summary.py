"""The end of a run in words."""

from types import SimpleNamespace

import pytest

from flexmoe.batch.bottleneck import bottleneck
from flexmoe.cli.running.summary import elapsed, summary_lines


def metrics(wall_s=10.0, **busy_s):
    return {"wall_s": wall_s, "lanes": {lane: {"busy_s": seconds, "bytes": 0} for lane, seconds in busy_s.items()}}


@pytest.mark.parametrize(
    "lanes, words",
    [
        ({"disk_read": 9.7, "gpu": 5.0}, ("reading from the disk, busy 97 %", "a faster drive")),
        ({"disk_read": 2.0, "gpu": 9.0}, ("computing, busy 90 %", "a faster device")),
        ({"h2d": 9.99, "gpu": 2.0}, ("copying to the GPU tier, busy 100 %", "more gpu_mem")),
        ({"cpu": 8.0, "gpu": 2.0}, ("attention on the CPU, busy 80 %",)),
        ({}, ("nothing ran",)),
        ({"gpu": 3.0, "disk_read": 4.0}, ("none of the lanes", "40 %", "more rows at once")),
    ],
)
def test_the_busiest_lane_is_the_bottleneck_unless_none_is_busy(lanes, words):
    told = bottleneck(metrics(**lanes))
    assert all(part in told for part in words), told


@pytest.mark.parametrize(
    "seconds, told", [(0.04, "0.0 s"), (119.0, "119.0 s"), (600, "10.0 minutes"), (9000, "2.50 hours")]
)
def test_time_is_told_in_the_unit_that_suits_it(seconds, told):
    assert elapsed(seconds) == told


@pytest.mark.parametrize("drifted", [True, False])
def test_what_the_run_found_otherwise_than_measured_is_told_with_what_was_to_be_expected(drifted):
    lanes = [
        {"lane": "disk_read", "speed": 0.6, "bytes_per_s": 1.94e9},
        {"lane": "gpu", "speed": 1.5, "bytes_per_s": 0.0},
    ]
    found = metrics(11_000.0) | {"drift": {"lanes": lanes, "predicted_wall_s": 11_520.0} if drifted else None}
    found |= dict.fromkeys(("generated_tokens", "prompt_tokens", "mean_rows_in_flight", "peak_process_bytes"), 1)
    plan = SimpleNamespace(memory=SimpleNamespace(parts={}), budgets={})
    lines = [line for line in summary_lines(found, plan, None) if line.startswith("drift: ")]
    assert (
        lines
        == [
            "drift: the disk reads at 1.9 GB/s, 40 % below the measurement and computation is 50 % above the measurement; "
            "predicted with that: 3.20 hours (+5 %)"
        ][: int(drifted)]
    )
