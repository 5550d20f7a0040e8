"""Bytes/s of copies between host and device, and of reads of either's memory."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cost_model.hardware.link_curves import LinkCurve
from flexmoe.probing.timing import best_s, elapsed_s, mean_of_rounds, mean_s, repeat_s
from flexmoe.system.device import Device, Event, Stream
from flexmoe.weights.slots import copy_in_pieces

_SMALL_BYTES = 1 << 20  # outputs of attention of a hundred rows
PIECES = 3  # a unit is copied tensor by tensor; an expert has three


@dataclass(frozen=True, slots=True)
class Lane:
    """Copies of one unit after another: from, to, and the CUDA stream (None on cpu, where it is a thread)."""

    target: torch.Tensor
    source: torch.Tensor
    stream: Stream | None = None

    def pieces(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) of each tensor of the unit."""
        size = self.target.numel() // PIECES
        return [(self.target[at : at + size], self.source[at : at + size]) for at in range(0, PIECES * size, size)]

    @property
    def nbytes(self) -> int:
        """Bytes of a unit."""
        return self.target.numel() // PIECES * PIECES


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRates:
    """Bytes/s up and down, each alone and both at once."""

    h2d: float
    d2h: float
    h2d_duplex: float
    d2h_duplex: float


def copy_rates(device: Device, unit_bytes: int, seconds: float) -> CopyRates:
    """Copies of units as the weight stream makes them: on CUDA between pinned memory and the device, each way on a
    stream of its own; on cpu between host buffers, each way in a thread of its own.

    Args:
        unit_bytes: bytes of a unit; two host buffers and two on the device are made.
        seconds: of copying in each of the three tests.

    Raises:
        InfeasibleError: the host has not that much memory, or the driver does not lock it.
    """
    host = [device.host_buffer(unit_bytes).fill_(1) for _ in range(2)]
    if device.is_cuda:
        on_device = [torch.zeros(unit_bytes, dtype=torch.uint8, device=device.torch) for _ in range(2)]
    else:
        on_device = [device.host_buffer(unit_bytes).fill_(2) for _ in range(2)]
    up = Lane(on_device[0], host[0], device.stream())
    down = Lane(host[1], on_device[1], device.stream())
    (h2d,), (d2h,) = (lane_rates(device, [lane], seconds) for lane in (up, down))
    both = lane_rates(device, [up, down], seconds)
    return CopyRates(h2d=h2d, d2h=d2h, h2d_duplex=both[0], d2h_duplex=both[1])


def copy_curve(device: Device, nbytes: int, sizes: Sequence[int], seconds: float) -> LinkCurve:
    """Bytes/s of copies up by the bytes of a unit; the units lie one after the other, as no cache holds all weights.

    Args:
        nbytes: of a buffer on the host and another on the device; larger units are left out.
        seconds: of copying for each size and round.

    Raises:
        InfeasibleError: as for `copy_rates`.
    """
    host = device.host_buffer(nbytes).fill_(1)
    if device.is_cuda:
        on_device = torch.zeros(nbytes, dtype=torch.uint8, device=device.torch)
    else:
        on_device = device.host_buffer(nbytes).fill_(2)
    stream = device.stream()

    def rate(size: int) -> float:
        starts = range(0, nbytes - size + 1, size)
        lanes = [Lane(on_device[at : at + size], host[at : at + size], stream) for at in starts]
        pieces = (lane.pieces() for lane in lanes)
        units: Iterator[list[tuple[Any, Any]]] = itertools.cycle(
            [[(t, s) if device.is_cuda else (t.numpy(), s.numpy()) for t, s in p] for p in pieces]
        )

        def copy() -> None:
            for target, source in next(units):
                target.copy_(source, non_blocking=True) if device.is_cuda else np.copyto(target, source)

        with device.on(stream):
            return lanes[0].nbytes / repeat_s(device, copy, seconds, stream=stream)

    return mean_of_rounds([size for size in sizes if size <= nbytes], rate)


def small_copy_s(device: Device, nbytes: int, seconds: float) -> float:
    """What a small copy up takes beyond what it takes alone, while a thread copies weights as the weight stream does.

    Args:
        nbytes: of the buffer of weights on either side.
        seconds: of copying.
    """
    small, host = device.host_buffer(_SMALL_BYTES), device.host_buffer(nbytes)
    there, on_device = (torch.zeros(n, dtype=torch.uint8, device=device.torch) for n in (_SMALL_BYTES, nbytes))
    own, stream, ends = device.stream(urgent=True), device.stream(), threading.Event()

    def feed() -> None:
        while not ends.is_set():
            with device.on(stream):
                copy_in_pieces(device, stream, host, on_device)

    def copy() -> None:
        with device.on(own):
            there.copy_(small, non_blocking=True)
            arrived = device.record(own)
        device.link.small(arrived)
        arrived.synchronize()

    alone_s = mean_s(copy, seconds)
    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        return max(0.0, mean_s(copy, seconds) - alone_s)
    finally:
        ends.set()
        feeder.join()
        device.record(stream).synchronize()  # the buffers may be freed then


def lane_rates(device: Device, lanes: Sequence[Lane], seconds: float) -> list[float]:
    """Bytes/s of each lane while all of them copy, for about ``seconds``."""
    return _stream_rates(device, lanes, seconds) if device.is_cuda else _thread_rates(lanes, seconds)


def memory_rate(device: Device, values: torch.Tensor, seconds: float) -> float:
    """Bytes/s of the best of a few reductions over all of ``values`` (float32), on its device."""
    with torch.inference_mode():
        if values.device.type == "cuda":
            return values.nbytes / repeat_s(device, values.sum, seconds)
        half = len(values) // 2
        reads = (values.sum, values.amax, lambda: torch.dot(values[:half], values[-half:]))
        each_s = min(best_s(read, 2) for read in reads)
        rounds = max(2, int(seconds / len(reads) / each_s))
        return values.nbytes / min(best_s(read, rounds) for read in reads)


def _thread_rates(lanes: Sequence[Lane], seconds: float) -> list[float]:
    rates = [0.0] * len(lanes)
    ready = threading.Barrier(len(lanes))

    def copy(place: int, lane: Lane) -> None:
        pieces = [(target.numpy(), source.numpy()) for target, source in lane.pieces()]
        for _ in range(2):  # the first round faults pages in and fills caches
            ready.wait()
            begin, units = time.perf_counter(), 0
            while units == 0 or time.perf_counter() - begin < seconds:
                for target, source in pieces:
                    np.copyto(target, source)
                units += 1
            rates[place] = units * lane.nbytes / (time.perf_counter() - begin)

    threads = [threading.Thread(target=copy, args=(place, lane), daemon=True) for place, lane in enumerate(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rates


def _stream_rates(device: Device, lanes: Sequence[Lane], seconds: float) -> list[float]:
    """Counted only while every lane copies: the slower one would else continue alone."""
    once_s = max(max(ends) for ends in _ends_s(device, lanes, 2)) / 2
    ends_s = _ends_s(device, lanes, max(3, int(seconds / max(once_s, 1e-6))))
    window_s = min(ends[-1] for ends in ends_s)
    rates = []
    for lane, ends in zip(lanes, ends_s, strict=True):
        done = [end for end in ends if end <= window_s] or ends[:1]
        rates.append(len(done) * lane.nbytes / done[-1])
    return rates


def _ends_s(device: Device, lanes: Sequence[Lane], units: int) -> list[list[float]]:
    """When each unit of each lane had arrived, in seconds after the start they have in common."""
    start = device.event(timing=True)
    start.record(device.compute)
    marks: list[list[Event]] = [[] for _ in lanes]
    for lane in lanes:
        start.wait(lane.stream)
    for _ in range(units):
        for lane, ends in zip(lanes, marks, strict=True):
            with device.on(lane.stream):
                for target, source in lane.pieces():
                    target.copy_(source, non_blocking=True)
                ends.append(device.event(timing=True))
                ends[-1].record(lane.stream)
    for ends in marks:
        ends[-1].synchronize()
    return [[elapsed_s(start, end) for end in ends] for ends in marks]
