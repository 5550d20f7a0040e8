"""Seconds of transfers by the size of each."""

import random

import pytest

from cost_model.hardware.link_curves import scaled, transfer_s

MIB = 1 << 20
CURVE = ((MIB, 1e9), (4 * MIB, 3e9), (64 * MIB, 4e9))


def test_transfer_takes_its_bytes_over_the_rate_of_its_size():
    assert transfer_s(CURVE, 9e9, MIB) == MIB / 1e9
    assert transfer_s(CURVE, 9e9, 4 * MIB) == 4 * MIB / 3e9
    assert transfer_s(CURVE, 9e9, 2 * MIB) == pytest.approx(2 * MIB / 2e9)  # half-way in the logarithm
    assert transfer_s(CURVE, 9e9, MIB // 2) == MIB / 2 / 1e9
    assert transfer_s(CURVE, 9e9, 1000 * MIB) == 1000 * MIB / 4e9


def test_many_transfers_take_the_time_of_one_each():
    assert transfer_s(CURVE, 9e9, 40 * MIB, 10) == pytest.approx(10 * transfer_s(CURVE, 9e9, 4 * MIB))
    assert transfer_s(CURVE, 9e9, 1.5 * MIB, 1.5) == pytest.approx(1.5 * MIB / 1e9)


def test_link_that_was_not_measured_by_size_has_one_rate():
    assert transfer_s((), 5e9, 1e9, 1000) == 0.2


def test_nothing_takes_no_time():
    assert transfer_s(CURVE, 9e9, 0, 0) == transfer_s((), 9e9, 0) == 0.0


def test_link_twice_as_fast_takes_half_the_time_at_every_size():
    rng = random.Random(0)
    for _ in range(50):
        size = rng.uniform(1e4, 1e9)
        assert transfer_s(scaled(CURVE, 2), 9e9, size) == pytest.approx(transfer_s(CURVE, 9e9, size) / 2)
