"""A pytest plugin for the tests of exactness: streams of random pace, and memory that is free holds no number.

    FLEXMOE_RACES=SEED python -m pytest -p tests.support.races -m gpu tests/system/test_exactness.py

Before copies and kernels the GPU sleeps for a random while (on a CPU the thread does). The slot of a weight unit that has
been released, and the buffer of fetched KV that has been attended to, are filled with NaN in the order of the compute
stream: a kernel that reads them too late, or a copy that fills them too early, gives other tokens.
"""

import contextlib
import os
import random
import time

import torch

from flexmoe.kv.transfers import KVLanes
from flexmoe.system.device import Device
from flexmoe.weights.stream import WeightStream

SHARE, MOST_CYCLES, MOST_S = 0.25, 2_000_000, 5e-4
#: Every byte of a NaN in bfloat16, float16 and float32.
POISON = 0xFF


def pytest_configure(config):
    """Applied to the whole process."""
    disturb(random.Random(int(os.environ.get("FLEXMOE_RACES", "0"))), setattr)


def disturb(rng, replace):
    """Let streams sleep and freed memory be poisoned; ``replace`` is `setattr` or that of a `monkeypatch`."""

    def sleep(device):
        if rng.random() >= SHARE:
            return
        if torch.cuda.is_available() and device.torch.type == "cuda":
            torch.cuda._sleep(rng.randint(1, MOST_CYCLES))
        else:
            time.sleep(rng.random() * MOST_S)

    on, timed = Device.on, Device.timed
    release, attend_fetched = WeightStream.release, KVLanes.attend_fetched

    @contextlib.contextmanager
    def late_on(self, stream):
        with on(self, stream) as entered:
            sleep(self)
            yield entered

    @contextlib.contextmanager
    def late_timed(self, recorder, lane, *about, **options):
        with timed(self, recorder, lane, *about, **options):
            if lane == "gpu":
                sleep(self)
            yield

    def poisoned_release(self, unit):
        fetch = self._held.get(unit)
        if fetch is not None:
            fetch.slot.buffer.fill_(POISON)
        release(self, unit)

    def poisoned_attend_fetched(self, layer, batch, *about):
        indexes = [index for groups in batch.kv.values() for index in groups]
        (index,) = (i for i in indexes if layer in getattr(i, "sides", ()))
        side = index.sides[layer]
        out = attend_fetched(self, layer, batch, *about)
        self._staging[side].fill_(torch.nan)
        self._staging_read[side] = self._device.record()
        return out

    for owner, name, by in (
        (Device, "on", late_on),
        (Device, "timed", late_timed),
        (WeightStream, "release", poisoned_release),
        (KVLanes, "attend_fetched", poisoned_attend_fetched),
    ):
        replace(owner, name, by)
