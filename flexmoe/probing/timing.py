"""Seconds of a piece of work, on the host's clock or the device's, and buffers that look like the runtime's: noise in every
page, weights cut from slots."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.link_curves import LinkCurve
from flexmoe.checkpoint.unit_layout import Part, pack, views
from flexmoe.system.device import Device, Event, Stream

_MOST_CALLS = 1000
CURVE_ROUNDS = 5
_OUTLIER = 3.0


def repeat_s(
    device: Device,
    work: Callable[[], object],
    seconds: float,
    *,
    warm: int = 1,
    least: int = 3,
    stream: Stream | None = None,
) -> float:
    """Seconds of one call of what is done on ``stream`` (None: the compute stream).

    On cpu `mean_s` of as many calls as take ``seconds``, at least ``least`` of them unless those took three times as
    long. On CUDA the mean between two events around about as many, the first calls left out.
    """
    for _ in range(warm):
        work()
    return (
        _device_s(device, work, seconds, stream or device.compute) if device.is_cuda else mean_s(work, seconds, least)
    )


def elapsed_s(start: Event, end: Event) -> float:
    """Seconds of the device between two events that were made with timing."""
    milliseconds: float = cast("torch.cuda.Event", start).elapsed_time(cast("torch.cuda.Event", end))
    return milliseconds / 1e3


def best_s(work: Callable[[], object], rounds: int) -> float:
    """Host seconds of the fastest of ``rounds`` calls."""
    return min(_timed(work) for _ in range(rounds))


def mean_of_rounds(sizes: Sequence[int], bytes_per_s: Callable[[int], float]) -> LinkCurve:
    """The mean rate of each size: a run gets the slow times of a drive or a link, too.

    The sizes take turns, so that a machine which is slow for a while is so for all of them.
    """
    rounds = [[bytes_per_s(size) for size in sizes] for _ in range(CURVE_ROUNDS)]
    return tuple((size, statistics.fmean(rates)) for size, *rates in zip(sizes, *rounds, strict=True))


def mean_of_passes(values: Sequence[Any]) -> Any:
    """The mean of a value of a machine that was measured several times: a number, `GemmRates`, a curve over sizes, or a mapping
    to these."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: mean_of_passes([each[key] for each in values]) for key in first}
    if isinstance(first, GemmRates):
        return GemmRates.mean(values)
    if isinstance(first, tuple):
        return tuple((size, statistics.fmean(each[at][1] for each in values)) for at, (size, _) in enumerate(first))
    return statistics.fmean(values)


def mean_s(work: Callable[[], object], seconds: float, least: int = 3) -> float:
    """Host seconds of one of as many calls as take ``seconds``, as `repeat_s` on cpu.

    A run pays for slow calls, too, so this is their mean and not their median. Calls of more than three times the median are
    left out: they waited for something else.
    """
    times: list[float] = []
    while not times or sum(times) < seconds or (len(times) < least and sum(times) < 3 * seconds):
        times.append(_timed(work))
    most = _OUTLIER * statistics.median(times)
    return statistics.mean(each for each in times if each <= most)


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _device_s(device: Device, work: Callable[[], object], seconds: float, stream: Stream | None) -> float:
    def run(count: int) -> float:
        start, end = device.event(timing=True), device.event(timing=True)
        start.record(stream)
        for _ in range(count):
            work()
        end.record(stream)
        end.synchronize()
        return elapsed_s(start, end) / count

    estimate_s = run(3)
    calls = min(_MOST_CALLS, int(seconds / max(1e-6, estimate_s)))
    return run(calls) if calls > 3 else estimate_s


def fill_with_noise(flat: torch.Tensor, chunk: int = 1 << 24) -> None:
    """Numbers of a normal distribution, repeated: no page is the kernel's shared zero page."""
    pattern = torch.randn(min(chunk, flat.numel()), generator=torch.Generator().manual_seed(0)).to(flat)
    for start in range(0, flat.numel(), len(pattern)):
        piece = flat[start : start + len(pattern)]
        piece.copy_(pattern[: len(piece)])


def noise(device: Device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of noise on the compute device."""
    tensor = torch.empty(shape, dtype=dtype, device=device.torch)
    fill_with_noise(tensor.view(-1), 1 << 20)
    return tensor


class WeightArena:
    """Compute slots full of random weights, in memory like that of the runtime's slots.

    Args:
        device: the compute device.
        dtype: of the weights.
        nbytes: size.
        scale: standard deviation.
    """

    def __init__(self, device: Device, dtype: torch.dtype, nbytes: int, scale: float = 0.02):
        self._dtype = dtype
        self.nbytes = nbytes // 256 * 256
        if device.is_cuda:
            self._bytes = torch.empty(self.nbytes, dtype=torch.uint8, device=device.torch)
        else:
            self._bytes = device.host_buffer(self.nbytes, pinned=False)
        numbers = self._bytes.view(dtype)
        fill_with_noise(numbers, 1 << 22)
        numbers.mul_(scale)

    def sets(self, parts: Sequence[Part], cycle_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """The weights of one unit after another, for ever, from the first ``cycle_bytes``; at least one fits.

        Args:
            parts: the unit's `flexmoe.checkpoint.unit_layout.Part`s.
        """
        places, size = pack({part.role: (self._dtype, part.of or part.shape) for part in parts})
        count = max(1, min(self.nbytes, cycle_bytes) // size)
        return itertools.cycle([views(self._bytes[i * size : (i + 1) * size], places) for i in range(count)])
