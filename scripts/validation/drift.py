"""What a prediction becomes where the machine is faster or slower than when it was probed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log2

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import Hardware
from cost_model.hardware.speeds import with_speeds
from cost_model.simulation.simulate import Simulation

#: Speeds of cores relative to the probe's, each in products of so many tokens; tokens rise.
CoreSpeeds = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """Predicted seconds, of the job and of its lanes."""

    job_s: float
    lanes_s: dict[str, float]


def corrected(
    predict: Callable[[Hardware], Simulation], hardware: Hardware, base: float, speeds: CoreSpeeds
) -> Corrected:
    """A prediction on cores of another speed. On device cpu all but the disk is theirs.

    Products have the speed of their number of tokens, all else that of the memory. In a unit of time in which that is as it was,
    the disk is so many times slower: this machine is predicted, and the seconds are converted.

    Args:
        predict: the job on a machine.
        base: speed of the memory, relative to the probe's.
        speeds: none where a GPU computes.
    """
    relative = [(tokens, speed / base) for tokens, speed in speeds] or [(1, 1.0)]
    machine = with_speeds(hardware, disk_read=1 / base, disk_write=1 / base)
    machine = replace(
        machine,
        gpus=(_with_products(machine.gpu, relative),),
        kv_block_read_s=hardware.kv_block_read_s * base,
        kv_block_write_s=hardware.kv_block_write_s * base,
        disk_latency_s=hardware.disk_latency_s * base,
        disk_busy_latency_s=hardware.disk_busy_latency_s * base,
    )
    simulated = predict(machine)
    return Corrected(job_s=simulated.job_s / base, lanes_s={k: s / base for k, s in simulated.lanes_s.items()})


def _with_products(gpu, speeds: CoreSpeeds):
    curves = ("experts", "dense", "grouped_experts")
    return replace(
        gpu, **{name: {size: _scaled(rates, speeds) for size, rates in getattr(gpu, name).items()} for name in curves}
    )


def _scaled(rates: GemmRates, speeds: CoreSpeeds) -> GemmRates:
    factors = [_speed_at(tokens, speeds) for tokens in rates.tokens]
    rows = tuple(tuple(rate * factor for rate, factor in zip(row, factors)) for row in rates.flops_per_s)
    return replace(rates, flops_per_s=rows)


def _speed_at(tokens: float, speeds: CoreSpeeds) -> float:
    """Straight over the logarithm of the tokens; that of the nearest outside."""
    if tokens <= speeds[0][0]:
        return speeds[0][1]
    for (few, low), (many, high) in pairwise(speeds):
        if tokens <= many:
            return low + (high - low) * log2(tokens / few) / log2(many / few)
    return speeds[-1][1]
