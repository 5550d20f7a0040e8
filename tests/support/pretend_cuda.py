"""The CPU in the part of a CUDA device: streams, events and pinned memory that count what is asked of them."""

import contextlib
import time

import pytest
import torch

from flexmoe.engine import engine_plan
from flexmoe.system.device import Device


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
