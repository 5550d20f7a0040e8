"""The branches that only CUDA takes, on a device that says it is CUDA and computes on the CPU.

Streams and events do nothing, so nothing here says that work on the GPU is ordered rightly: only the `gpu` tests do.
"""

import contextlib
import time

import pytest
import torch

from flexmoe.engine import engine_plan
from flexmoe.system.device import Device
from tests.system.test_exactness import Case, check

pytestmark = pytest.mark.usefixtures("one_thread")


class Event:
    """Remembers when it was recorded; refuses what an unrecorded CUDA event would get wrong silently."""

    recorded_s = None

    def record(self, stream=None):
        self.recorded_s = time.perf_counter()

    def wait(self, stream=None):
        assert self.recorded_s is not None, "waits for an event that nobody recorded: CUDA would not wait at all"

    def synchronize(self):
        self.wait()

    def query(self):
        return self.recorded_s is not None

    def elapsed_time(self, end):
        return (end.recorded_s - self.recorded_s) * 1e3


class Stream:
    def wait_event(self, event):
        event.wait()

    def synchronize(self):
        pass


class PretendCuda(Device):
    def __init__(self, name="auto"):
        super().__init__("cpu")
        self.is_cuda = True
        self._base = Event()
        self._base.record()
        self.pinned = []

    def stream(self):
        return Stream()

    def on(self, stream):
        return contextlib.nullcontext()

    def event(self, timing=False):
        return Event()

    def use_here(self, tensor):
        return tensor

    def room(self, budget_bytes):
        return budget_bytes

    def cap_memory(self, budget_bytes):
        pass

    def host_buffer(self, nbytes, *, pinned=True, shared=False):
        self.is_cuda = False
        try:
            buffer = super().host_buffer(nbytes, pinned=pinned, shared=shared)
        finally:
            self.is_cuda = True
        self.pinned.append(buffer) if pinned else None
        return buffer


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(engine_plan, "Device", PretendCuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 40, 1 << 40))


CASES = [
    Case(placement=(30, 30, 0, 100, 100, 0), cpu_attention=100),
    Case(placement=(30, 30, 0, 100, 0, 100), cpu_attention=50, batches=(3, 6)),
    Case(placement=(0, 0, 0, 0, 0, 0), cpu_attention=0, overlap=False),
    Case(placement=(0, 100, 100, 0, 50, 50), variant="gqa-4-to-1", native=False),
    Case(placement=(10, 20, 30, 30, 30, 30), variant="window", cpu_attention=50, disturbed="sent-back"),
    Case(
        placement=(0, 50, 0, 100, 100, 0), variant="all-experts", cpu_attention=100, batches=(16, 1), schedule="static"
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_branches_give_the_same_ids(case, pretend, tiny, tmp_path, monkeypatch):
    check(tiny(case.variant), case, "cuda", tmp_path, monkeypatch)


def test_at_most_one_host_wait_per_moe_layer(pretend, tiny, tmp_path, monkeypatch):
    devices = []
    monkeypatch.setattr(engine_plan, "Device", lambda name: devices.append(PretendCuda(name)) or devices[-1])
    variant = tiny("gqa-8-to-2")
    metrics = check(variant, CASES[0], "cuda", tmp_path, monkeypatch)
    assert devices[0].host_waits == metrics["sweeps"] * variant.model.config.num_hidden_layers
