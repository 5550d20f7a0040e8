"""Looks at the machine between the sweeps of a run, and the speeds of the whole run that follow from them."""

import pytest

from cost_model import Hardware
from flexmoe.system.device import Device
from scripts.validation.looks import TOKENS, Look, Looks, Stretch, mean_look

ELEMENTS = 3 * 512 * 1792


def test_rates_of_a_run_count_by_the_time_in_which_they_held():
    fast, slow = Look(disk=4e9, memory=1.0, cores=(1.0, 2.0)), Look(disk=2e9, memory=0.8, cores=(0.5, 2.0))
    stretches = [Stretch(before=fast, after=fast, wall_s=3.0), Stretch(before=fast, after=slow, wall_s=1.0)]
    found = mean_look(stretches)
    assert (found.disk, found.memory) == pytest.approx((3.75e9, 0.975))
    assert found.cores == pytest.approx((0.9375, 2.0))


def test_a_look_finds_cores_that_are_so_many_times_slower_than_the_probe_found_them(tmp_path):
    hardware, slower = Hardware.preset("cpu"), dict(zip(TOKENS, (1.0, 2.0, 4.0)))
    (path := tmp_path / "weights").write_bytes(bytes(32 << 20))

    def seconds(count, seconds, warm, least):
        return slower[count] * hardware.gpu.experts[2].seconds(count, ELEMENTS)

    look = Looks(Device("cpu"), hardware, [path], seconds, ELEMENTS).look()
    assert look.cores == pytest.approx((1.0, 0.5, 0.25)) and look.disk > 0 and look.memory > 0


def test_where_a_gpu_computes_the_cores_are_not_looked_at(tmp_path):
    (path := tmp_path / "weights").write_bytes(bytes(32 << 20))
    look = Looks(Device("cpu"), Hardware.preset("h200"), [path], None, ELEMENTS).look()
    assert (look.memory, look.cores) == (1.0, ())
