"""The CPU in the part of a CUDA device: streams, events and pinned memory that count what is asked of them."""

import contextlib
import threading
import time

import pytest
import torch

from flexmoe.engine import engine_plan
from flexmoe.system.device import Device


class Event:
    """Remembers when it was recorded; refuses what an unrecorded CUDA event would get wrong silently, and streams that are left
    to whichever the calling thread has at the time."""

    recorded_s = None

    def record(self, stream=None):
        assert stream is not None, "records on the current stream, which may be that of another GPU"
        self.recorded_s = time.perf_counter()

    def wait(self, stream=None):
        assert stream is not None, "lets the current stream wait, which may be that of another GPU"
        self.synchronize()

    def synchronize(self):
        assert self.recorded_s is not None, "waits for an event that nobody recorded: CUDA would not wait at all"

    def query(self):
        return self.recorded_s is not None

    def elapsed_time(self, end):
        return (end.recorded_s - self.recorded_s) * 1e3


class Stream:
    def synchronize(self):
        pass


class PretendCuda(Device):
    def __init__(self, name="auto"):
        super().__init__("cpu")
        self.is_cuda = True
        self.compute, self.pinned, self._streams = Stream(), [], threading.local()
        self.rebase()

    def stream(self, *, urgent=False):
        return Stream()

    @contextlib.contextmanager
    def on(self, stream):
        """The calling thread's own, as on CUDA."""
        before, self._streams.current = self.current, stream
        yield
        self._streams.current = before

    @property
    def current(self):
        """The stream that the calling thread is on; None: it has none of its own."""
        return getattr(self._streams, "current", None)

    def event(self, timing=False):
        return Event() if self.is_cuda else super().event(timing)

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
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 40, 1 << 40))
