"""The end of a run in words."""

import pytest

from flexmoe.cli.summary import bottleneck, elapsed


def metrics(wall_s=10.0, **busy_s):
    return {"wall_s": wall_s, "lanes": {lane: {"busy_s": seconds, "bytes": 0} for lane, seconds in busy_s.items()}}


@pytest.mark.parametrize(
    "lanes, words",
    [
        ({"disk_read": 9.7, "gpu": 5.0}, ("reading from the disk, busy 97 %", "a faster drive")),
        ({"disk_read": 2.0, "gpu": 9.0}, ("computing, busy 90 %", "a faster device")),
        ({"h2d": 9.99, "gpu": 2.0}, ("copying to the GPU tier, busy 100 %", "more --gpu-mem")),
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
