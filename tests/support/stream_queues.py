"""Simulated CUDA streams: queues of work that run as late, as early or as mixed up as their waits allow.

Nothing runs when it is issued. A host sync runs what it has to wait for and no more; beyond that the order is an
adversary's, chosen by a seed. Freed device memory is overwritten as soon as the allocator might give it to another tensor.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

#: *lazy*: only what a sync needs. *ahead*: one stream runs as far as its waits allow, the others are lazy. *random*: now and
#: then some work of any stream.
ORDERS = ("lazy", "ahead", "random")
#: Streams of which one may be far ahead, by the order in which they were made.
_MOST_STREAMS = 8


@dataclass(frozen=True, slots=True)
class Wait:
    """An entry of a queue: go on when another stream has done its first ``upto`` entries."""

    stream: Stream
    upto: int


@dataclass(eq=False, slots=True)
class Freed:
    """Device memory of which no tensor is left; ``tail`` are the entries of its own stream that may use it."""

    memory: torch.Tensor
    tail: int
    others: list[Wait]


@dataclass(eq=False)
class Stream:
    """Stands for `torch.cuda.Stream`."""

    simulator: Simulator
    device: torch.device
    queue: deque[Callable[[], object] | Wait] = field(default_factory=deque)
    freed: deque[Freed] = field(default_factory=deque)
    issued: int = 0
    done: int = 0

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.simulator.issue(self, Wait(stream, stream.issued))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.simulator)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.simulator.sync(self, self.issued)

    def query(self) -> bool:
        return self.done == self.issued


@dataclass(eq=False)
class Event:
    """Stands for `torch.cuda.Event`: a place in the queue of a stream."""

    simulator: Simulator
    place: Wait | None = None
    passed_s: float = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.simulator.current()
        self.place = self.simulator.issue(stream, self._stamp)

    def wait(self, stream: Stream | None = None) -> None:
        self.simulator.issue(stream or self.simulator.current(), self._recorded())

    def synchronize(self) -> None:
        place = self._recorded()
        self.simulator.sync(place.stream, place.upto)

    def query(self) -> bool:
        return self.place is None or self.place.stream.done >= self.place.upto

    def elapsed_time(self, end: Event) -> float:
        if not (self.query() and end.query()):
            raise RuntimeError("elapsed_time of events that have not passed")
        return (end.passed_s - self.passed_s) * 1e3

    def _recorded(self) -> Wait:
        if self.place is None:
            raise self.simulator.fault("waits for an event that nobody recorded: CUDA would not wait at all")
        return self.place

    def _stamp(self) -> None:
        self.passed_s = time.perf_counter()


class Simulator:
    """The streams of a pretended machine.

    Args:
        seed: of the adversary; its remainder by three is the order.
        devices: how many GPUs there are.

    Attributes:
        faults: what the device met: an index that nobody has computed yet, an event never recorded, a host tensor in a kernel.
        syncs: where the thread of a sweep waited for the device, and how often.
        pinned: (first byte, end) of the host memory registered with the driver.
    """

    def __init__(self, seed: int, devices: int = 1):
        self.order = ORDERS[seed % len(ORDERS)]
        self._rng = random.Random(seed)
        self._lock = threading.RLock()
        self._here = threading.local()
        self._streams: list[Stream] = []
        self._freed: list[Freed] = []  # that wait for other streams than their own
        self.devices = [torch.device("cuda", index) for index in range(devices)]
        self._default = {device: self.new_stream(device) for device in self.devices}
        self._ahead = self._rng.randrange(_MOST_STREAMS)
        self.faults: list[str] = []
        self.syncs: Counter[str] = Counter()
        self.pinned: dict[int, int] = {}
        self.executed = 0

    # What a thread is at: as in CUDA, each has a current device, and on every device a current stream.

    @property
    def device(self) -> torch.device:
        return getattr(self._here, "device", self.devices[0])

    @device.setter
    def device(self, device: torch.device | int | str) -> None:
        self._here.device = self.device_of(device)

    def device_of(self, device: torch.device | int | str | None) -> torch.device:
        """The device with its index, as code may name it."""
        if device is None:
            return self.device
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return self.device if device.index is None else device

    def default(self, device: torch.device | int | str | None = None) -> Stream:
        """The default stream of a device."""
        return self._default[self.device_of(device)]

    def current(self, device: torch.device | int | str | None = None) -> Stream:
        """The calling thread's current stream of a device."""
        device = self.device_of(device)
        return self._streams_here().get(device, self._default[device])

    def set_current(self, stream: Stream) -> Stream:
        """Make a stream the current one of its device; returns the one before."""
        before = self.current(stream.device)
        self._streams_here()[stream.device] = stream
        return before

    def in_sweep(self, inside: bool) -> None:
        """Whether the syncs of the calling thread are counted from now on."""
        self._here.in_sweep = inside

    def new_stream(self, device: torch.device | int | str | None = None) -> Stream:
        with self._lock:
            self._streams.append(Stream(self, self.device_of(device)))
            return self._streams[-1]

    # Issuing and running.

    def issue(self, stream: Stream, entry: Callable[[], object] | Wait) -> Wait:
        """Put an entry on a stream's queue; returns its place."""
        with self._lock:
            stream.queue.append(entry)
            stream.issued += 1
            place = Wait(stream, stream.issued)
            self._go_on()
            return place

    def sync(self, stream: Stream, upto: int) -> None:
        """The calling thread waits for the first ``upto`` entries of a stream."""
        if getattr(self._here, "in_sweep", False):
            self.syncs[caller()] += 1
        with self._lock:
            waiting = [Wait(stream, upto)]
            while waiting:
                last = waiting[-1]
                if last.stream.done >= last.upto:
                    waiting.pop()
                elif (blocked := self._blocked(last.stream)) is not None:
                    waiting.append(blocked)
                else:
                    self._step(last.stream)

    def free(self, stream: Stream, memory: torch.Tensor, users: set[Stream]) -> None:
        """The last tensor of a piece of memory is gone. May be called at any moment, by the garbage collector too."""
        others = [Wait(user, user.issued) for user in users if user is not stream]
        stream.freed.append(Freed(memory, stream.issued, others))

    def fault(self, message: str) -> RuntimeError:
        """Note what is wrong; returns the error to raise."""
        self.faults.append(message)
        return RuntimeError(message)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor lies in memory that is registered with the driver."""
        at = tensor.data_ptr()
        return any(first <= at < end for first, end in list(self.pinned.items()))

    def _streams_here(self) -> dict[torch.device, Stream]:
        if not hasattr(self._here, "streams"):
            self._here.streams = {}
        return self._here.streams

    def _go_on(self) -> None:
        """What the adversary runs beyond what has to."""
        if self.order == "ahead" and self._ahead < len(self._streams):
            ahead = self._streams[self._ahead]
            while ahead.queue and self._blocked(ahead) is None:
                self._step(ahead)
        elif self.order == "random" and self._rng.random() < 0.2:
            stream = self._rng.choice(self._streams)
            for _ in range(self._rng.randrange(60)):
                if not stream.queue or self._blocked(stream) is not None:
                    break
                self._step(stream)

    def _blocked(self, stream: Stream) -> Wait | None:
        """What the next entry of a stream waits for."""
        entry = stream.queue[0]
        return entry if isinstance(entry, Wait) and entry.stream.done < entry.upto else None

    def _step(self, stream: Stream) -> None:
        self._overwrite_freed()
        entry = stream.queue.popleft()
        stream.done += 1
        if isinstance(entry, Wait):
            return
        self.executed += 1
        try:
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                entry()
        except Exception as error:
            raise self.fault(f"a kernel failed: {error}") from error

    def _overwrite_freed(self) -> None:
        """Other tensors get what has been freed, as soon as the entries that may use it have run."""
        for stream in self._streams:
            while stream.freed and stream.freed[0].tail <= stream.done:
                self._freed.append(stream.freed.popleft())
        if self._freed:
            waiting = []
            for freed in self._freed:
                if all(w.stream.done >= w.upto for w in freed.others):
                    poison(freed.memory)
                else:
                    waiting.append(freed)
            self._freed = waiting


def poison(memory: torch.Tensor) -> torch.Tensor:
    """Fill memory with what no computation survives: not a number, or an index beyond every tensor."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        if memory.is_floating_point():
            return memory.fill_(torch.nan)
        if memory.dtype == torch.bool:
            return memory.fill_(True)
        if memory.dtype == torch.uint8:  # bytes of float weights: not a number either
            return memory.fill_(0xFF)
        return memory.fill_(torch.iinfo(memory.dtype).max // 3)


def caller() -> str:
    """The function of the engine that waits, as ``folder/module.function``."""
    for frame in _frames():
        parts = frame.f_code.co_filename.split("/")
        if "flexmoe" in parts and "tests" not in parts:
            where = "/".join(parts[len(parts) - parts[::-1].index("flexmoe") :]).removesuffix(".py")
            if where != "system/device":
                return f"{where}.{frame.f_code.co_name}"
    return "outside"


def _frames():
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
