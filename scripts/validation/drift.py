"""What a prediction becomes where the cores are faster or slower than when they were probed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cost_model.hardware.hardware import Hardware
from cost_model.hardware.speeds import with_speeds


def corrected_s(job_s: Callable[[Hardware], float], hardware: Hardware, speed: float) -> float:
    """The predicted seconds of a job on cores of another speed. On device cpu all but the disk is theirs.

    In a unit of time in which the cores are as fast as they were, the disk is ``speed`` times slower: that machine is
    predicted, and the seconds are converted.

    Args:
        job_s: seconds of the job on a machine.
        speed: of the cores, relative to the probe's.
    """
    if hardware.device != "cpu":
        return job_s(hardware)
    machine = replace(
        with_speeds(hardware, disk_read=1 / speed, disk_write=1 / speed),
        kv_block_read_s=hardware.kv_block_read_s * speed,
        kv_block_write_s=hardware.kv_block_write_s * speed,
        disk_latency_s=hardware.disk_latency_s * speed,
        disk_busy_latency_s=hardware.disk_busy_latency_s * speed,
    )
    return job_s(machine) / speed
