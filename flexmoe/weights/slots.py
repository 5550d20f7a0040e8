"""Buffers for weights on the compute device, the fetches that fill them, and the copies of those."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from flexmoe.system.device import Device, Event, Stream
from flexmoe.system.link import pieces_of
from flexmoe.weights.store import WeightStore
from policies.units import UnitId

#: Stretches of a copy: (first byte of the source, first byte of the target, bytes).
Copies = Sequence[tuple[int, int, int]]


@dataclass(slots=True, eq=False)
class Slot:
    """A fixed buffer on the compute device; ``freed`` marks the last kernel that read it."""

    buffer: torch.Tensor
    freed: Event | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StagingSlot:
    """A pinned buffer on the host; ``copied`` marks the last copy out of it."""

    buffer: torch.Tensor
    copied: Event | None = None

    def wait(self) -> None:
        """Wait until it may be written."""
        if self.copied is not None:
            self.copied.synchronize()


@dataclass(slots=True, eq=False)
class Fetch:
    """The transfer of one unit into a slot: ``ready`` is set when its transfer is complete or, on CUDA, issued (then ``copied``);
    ``seconds`` are those until then."""

    unit: UnitId
    slot: Slot
    ready: threading.Event = field(default_factory=threading.Event)
    copied: Event | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    error: BaseException | None = None
    seconds: float = 0.0
    _start_s: float = field(default_factory=time.perf_counter)

    def done(self, error: BaseException | None = None) -> None:
        """The transfer has ended: wakes the threads that wait for it."""
        self.error, self.seconds = error, time.perf_counter() - self._start_s
        self.ready.set()


def needs_staging(store: WeightStore, unit: UnitId) -> bool:
    """Whether a unit passes through a staging slot where transfers are staged."""
    return store.tier_of[unit] == "disk" or not store.pinned


def copy_bytes(copies: Copies, source: torch.Tensor, target: torch.Tensor) -> None:
    """The stretches on the host. By numpy: one thread, and the GIL is released."""
    for start, into, size in copies:
        np.copyto(target.numpy()[into : into + size], source.numpy()[start : start + size])


def copy_to_device(
    store: WeightStore,
    stream: Stream | None,
    source: torch.Tensor,
    slot: Slot,
    name: str,
    copies: Copies,
    nbytes: int,
    lane: str = "h2d",
) -> Event:
    """Issue the copy of the stretches from host bytes to a slot on ``stream``, after the slot's last user, in pieces between which
    small transfers find room: it returns when all but the last few are there.

    Args:
        name, nbytes, lane: how the copy is recorded.

    Returns:
        The event of the copy.
    """
    device = store.device
    if slot.freed is not None and stream is not None:
        slot.freed.wait(stream)
    with device.on(stream), device.timed(store.recorder, lane, name, nbytes, stream):
        for start, into, size in copies:
            copy_in_pieces(device, stream, source[start : start + size], slot.buffer[into : into + size])
    return device.record(stream)


def copy_in_pieces(device: Device, stream: Stream | None, source: torch.Tensor, target: torch.Tensor) -> None:
    """Issue a copy of host bytes to the device on ``stream``, the current one; it returns when all but a few pieces are there."""
    for piece in pieces_of(len(source)):
        device.link.give_way()
        target[piece].copy_(source[piece], non_blocking=True)
        device.link.piece(device.record(stream))
