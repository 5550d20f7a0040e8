"""A machine that is faster or slower in some of what it does than another: what drifts, and what would help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import Gpu, Hardware
from cost_model.hardware.link_curves import scaled


def with_speeds(
    hardware: Hardware, *, disk_read: float = 1.0, disk_write: float = 1.0, compute: float = 1.0
) -> Hardware:
    """The machine with some of its lanes so many times as fast.

    Args:
        disk_read, disk_write: reads at every size, and writes.
        compute: attention and products on the compute device, and reads of its memory.
    """
    gpu = hardware.gpu if compute == 1 else _computing(hardware.gpu, compute)
    return replace(
        hardware,
        gpus=(gpu,),
        disk_read_bytes_per_s=disk_read * hardware.disk_read_bytes_per_s,
        disk_read_curve=scaled(hardware.disk_read_curve, disk_read),
        disk_write_bytes_per_s=disk_write * hardware.disk_write_bytes_per_s,
    )


def _computing(gpu: Gpu, factor: float) -> Gpu:
    def faster(curves: Mapping[int, GemmRates]) -> dict[int, GemmRates]:
        return {size: _faster(rates, factor) for size, rates in curves.items()}

    return replace(
        gpu,
        attention_bytes_per_s=factor * gpu.attention_bytes_per_s,
        attention_flops_per_s=factor * gpu.attention_flops_per_s,
        memory_bytes_per_s=factor * gpu.memory_bytes_per_s,
        experts=faster(gpu.experts),
        dense=faster(gpu.dense),
        grouped_experts=faster(gpu.grouped_experts),
    )


def _faster(rates: GemmRates, factor: float) -> GemmRates:
    return replace(rates, flops_per_s=tuple(tuple(factor * rate for rate in row) for row in rates.flops_per_s))
