"""What moved bytes take from computing, and what a transfer takes beside it: by sweeps of a model of some size.

Weights are copied from host memory or read from disk while the engine computes with those that are there. On device cpu
the cores do both: the CPU time of the moving threads says too little of what that costs, as it misses interrupts, the
traffic in memory, and that a GEMM of all threads is as slow as the one whose core is shared. So sweeps are compared that
differ in nothing but where weights are.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from cost_model.memory.allocation import residency
from cost_model.model.arch import ModelArch
from flexmoe.probing.effort import Effort
from flexmoe.probing.gemms import bench_arch
from flexmoe.probing.sweeps import gpu_batches, timed_sweeps
from flexmoe.system.device import Device
from flexmoe.system.machine import usable_cores

_LAYERS = 4
#: The disk is to read for no longer than this part of a sweep, and at most this percentage of the weights.
_DISK_BUSY, _DISK_PERCENT = 0.6, 50.0
_ROUNDS = 5
#: Tokens of a row whose KV takes next to no time.
_SHORT = 8


def handoff_s(device: Device, dtype: torch.dtype, directory: Path, effort: Effort) -> float:
    """What a transfer of KV takes in a running engine beyond a few bytes: calls of a thread that shares the interpreter.

    The lanes' own seconds per operation, with many GPU batches of short rows that fetch and store their KV.
    """
    arch, rows, batch_rows = streaming_arch(dtype, effort), max(effort.rows), min(effort.batch_rows)
    timed = timed_sweeps(
        device, arch, dtype, rows, batch_rows, directory, effort.sweeps, cache=(0, 100), context=_SHORT
    )
    operations = 2 * arch.num_layers * len(gpu_batches(rows, batch_rows))  # a load and a store
    return (timed.lanes_s["h2d"] + timed.lanes_s["d2h"]) / operations


def streaming_core_s_per_byte(
    device: Device, dtype: torch.dtype, directory: Path, effort: Effort, disk_bytes_per_s: float
) -> dict[str, float]:
    """Core-seconds that a weight byte takes from computing, by the tier (`cpu`, `disk`) that it comes from.

    Sweeps with weights in host memory, on disk, and all resident, in turn: where they last A seconds when all weights
    are resident, and B with so many bytes elsewhere, a byte takes cores · (B - A) / bytes: the median over rounds.

    Args:
        directory: of the engine's disk tier.
        disk_bytes_per_s: the disk's rate; no more is put there than it reads in a part of a sweep.
    """
    arch = streaming_arch(dtype, effort)
    rows, batch_rows = max(effort.rows), min(effort.batch_rows)

    def sweep_s(gpu: float, cpu: float) -> float:
        timed = timed_sweeps(device, arch, dtype, rows, batch_rows, directory, effort.sweeps, weights=(gpu, cpu))
        return timed.sweep_s

    resident_s = [sweep_s(100, 0)]
    share = 100 * _DISK_BUSY * resident_s[0] * disk_bytes_per_s / arch.total_bytes
    away = {"cpu": (0.0, 100.0), "disk": (100 - min(_DISK_PERCENT, share), 0.0)}
    moved = {tier: residency(arch).place(*percents).bytes_of(tier) for tier, percents in away.items()}
    costs: dict[str, list[float]] = {tier: [] for tier in away}
    for _ in range(_ROUNDS):
        away_s = {tier: sweep_s(*percents) for tier, percents in away.items()}
        resident_s.append(sweep_s(100, 0))
        alone_s = statistics.fmean(resident_s[-2:])  # before and after: the machine's speed may change
        for tier, each_s in away_s.items():
            costs[tier].append(usable_cores() * (each_s - alone_s) / moved[tier] if moved[tier] else 0.0)
    return {tier: max(0.0, statistics.median(each)) for tier, each in costs.items()}


def streaming_arch(dtype: torch.dtype, effort: Effort) -> ModelArch:
    """The largest of the measured experts, with the attention module of its hidden size, of which a model of a few layers fits
    half of the buffers."""
    modules = {heads.hidden: heads for heads in effort.modules}
    shapes = [bench_arch(modules[hidden], ffn, layers=_LAYERS) for hidden, ffn in effort.experts if hidden in modules]
    fits = [s for s in shapes if s.total_bytes // s.dtype_bytes * dtype.itemsize <= effort.buffer_bytes // 2]
    return (fits or shapes[:1])[-1]
