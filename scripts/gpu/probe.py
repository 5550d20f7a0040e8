"""What the machine gives, by the runtime's own buffers, streams, kernels and disk threads: a worker of `bench_gpu`.

Every operation answers with bytes/s or FLOP/s. On device `cpu` the same code runs for a rehearsal; its numbers mean nothing.
What a run of the engine can expect is measured by `flexmoe.probe` (`machine`); the rest are the limits that it is held
against.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch

from cost_model.model.arch import ModelArch
from flexmoe.kernels.expert_weights import ExpertWeights
from flexmoe.kernels.linear import linear, unpack
from flexmoe.models.registry import family
from flexmoe.probing.attention import AttentionCase
from flexmoe.probing.copies import Lane, copy_rates, lane_rates, memory_rate
from flexmoe.probing.disk import random_buffers, transfer
from flexmoe.probing.effort import Effort, Heads
from flexmoe.probing.facts import device_name, gpu_details
from flexmoe.probing.measure import probe
from flexmoe.probing.timing import best_s, noise, repeat_s
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DirectFile
from policies.common.memory_units import MIB, align_down
from scripts.benchmark.probes import disk_rate
from scripts.benchmark.worker import serve
from scripts.packed.products import FORMATS, SCALES, drawn

UNIT_BYTES = 336 << 20
COPY_SECONDS = 0.4
DISK_SECONDS = 60.0
ATTENTION_CONTEXT = 640
_FEW_TOKENS = (1, 16, 256)
REHEARSAL = Effort(
    buffer_bytes=32 * MIB,
    point_s=0.002,
    tokens={"cpu": _FEW_TOKENS, "cuda": _FEW_TOKENS},
    experts=((64, 128), (256, 512)),
    modules=(Heads(hidden=64, heads=4, kv_heads=1, head_dim=16), Heads(hidden=256, heads=8, kv_heads=2, head_dim=32)),
    cycle_bytes=2 * MIB,
    copy_bytes={"cpu": MIB, "cuda": MIB},
    decode_rows=8,
    fetched_rows=4,
    contexts=(20, 40),
    prompts=(16,),
    disk_bytes=16 * MIB,
    least_disk_bytes=4 * MIB,
    disk_s=1.0,
    layers=(1, 2),
    rows=(2, 6),
    batch_rows=(2, 8),
    sweeps=2,
)


def about(device: str) -> dict:
    """The GPU's name, memory, driver and link; `none` on cpu."""
    dev = Device(device)
    return {"gpu": device_name(dev), **gpu_details(dev)} if dev.is_cuda else {"gpu": "none"}


def machine(device: str, directory: str, path: str, rehearse: bool = False) -> None:
    """What `python -m flexmoe.probe` measures, into a hardware file; a rehearsal takes hardly any time over it."""
    probe(device, directory, REHEARSAL if rehearse else None).save(path)


def copies(device: str, scale: float = 1.0) -> dict:
    """Pinned copies of one expert at a time: up, down, and both at once."""
    rates = copy_rates(Device(device), int(UNIT_BYTES * scale), COPY_SECONDS * scale)
    return {"h2d": rates.h2d, "d2h": rates.d2h, "h2d_of_both": rates.h2d_duplex, "d2h_of_both": rates.d2h_duplex}


def gemm(device: str, model: str, tokens: list[int], seconds: float = 0.15) -> dict:
    """FLOP/s of one expert of the model over so many tokens, by the family's own function; `[[tokens, rate], ...]`."""
    dev, arch = Device(device), _arch(model)
    shapes = {"gate_up": (1, 2 * arch.ffn, arch.hidden), "down": (1, arch.hidden, arch.ffn)}
    weights = ExpertWeights.of({r: noise(dev, torch.bfloat16, *shape).mul_(0.02) for r, shape in shapes.items()})
    math, curve = family(arch), []
    with torch.inference_mode():
        for count in tokens:
            x_TD = noise(dev, torch.bfloat16, count, arch.hidden)
            each_s = repeat_s(dev, lambda: math.feed_forward(x_TD, weights.expert(0)), seconds, warm=2)  # noqa: B023
            curve.append([count, 6 * count * arch.hidden * arch.ffn / each_s])
    return {"curve": curve, "weight_bytes": 6 * arch.hidden * arch.ffn}


def packed(device: str, model: str, tokens: int, seconds: float = 0.15) -> dict:
    """Of each packed format the bytes/s of unpacking a matrix of the model's experts, read and written, and what a product over so
    many tokens takes beside one of bf16: `{name: {"bytes_per_s", "of_bf16"}}`."""
    dev, arch, found = Device(device), _arch(model), {}
    rows, columns = arch.ffn, arch.hidden
    x_TD, plain = noise(dev, torch.bfloat16, tokens, columns), noise(dev, torch.bfloat16, rows, columns)
    with torch.inference_mode():
        plain_s = repeat_s(dev, partial(linear, x_TD, plain), seconds, warm=2)
        for name, layout in FORMATS.items():
            matrix = drawn(layout, rows, columns, SCALES.get(name, torch.bfloat16), device)
            unpack_s = repeat_s(dev, partial(unpack, matrix, torch.empty_like(plain)), seconds, warm=2)
            product_s = repeat_s(dev, partial(linear, x_TD, matrix), seconds, warm=2)
            moved = layout.matrix_bytes(rows, columns) + plain.nbytes
            found[name] = {"bytes_per_s": moved / unpack_s, "of_bf16": plain_s / product_s}
    return found


def hbm(device: str, scale: float = 1.0) -> dict:
    """Reads of the GPU's own memory: a sum over 4 GiB."""
    dev = Device(device)
    return {"read": memory_rate(dev, torch.ones(int((1 << 30) * scale), device=dev.torch), 0.3)}


def host(device: str, model: str, scale: float = 1.0) -> dict:
    """Reads of host memory, attention on the CPU over a KV cache of Mixtral's heads, and the latter under copies."""
    dev, arch = Device(device), _arch(model)
    values = dev.host_buffer(int((4 << 30) * scale), pinned=False).view(torch.float32).fill_(1)
    half = len(values) // 2
    reads = {"sum": values.sum, "dot": lambda: torch.dot(values[:half], values[-half:]), "amax": values.amax}
    best = {name: values.nbytes / best_s(read, 5) for name, read in reads.items()}
    rows, heads = int(1024 * scale) or 1, (arch.num_heads, arch.num_kv_heads, arch.head_dim)
    case = AttentionCase(dev, True, torch.bfloat16, heads, [1] * rows, [ATTENTION_CONTEXT] * rows)
    alone = case.kv_bytes / best_s(case.attend, 7)
    lane = Lane(
        torch.zeros(UNIT_BYTES // 8, dtype=torch.uint8, device=dev.torch),
        dev.host_buffer(UNIT_BYTES // 8),
        dev.stream(),
    )
    under, copied = _under_copies(dev, case, lane)
    return {
        "read": max(best.values()),
        "reads": best,
        "attention": alone,
        "attention_under_copies": under,
        "copies_under_attention": copied,
        "threads": torch.get_num_threads(),
    }


def disk(directory: str, nbytes: int, device: str) -> dict:
    """Writes and O_DIRECT reads by the runtime's disk threads; beside them, the best of a plain loop of `preadv`."""
    dev, path = Device(device), Path(directory) / f"probe-{os.getpid()}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = align_down(min(UNIT_BYTES, nbytes))
    buffers = random_buffers(dev, size, 4)
    try:
        file = DirectFile(path, writable=True)
        write = transfer("disk_write", file, buffers, max(size, nbytes), DISK_SECONDS)
        read = transfer("disk_read", file, buffers, write.nbytes, DISK_SECONDS)
        file.close()
        plain = disk_rate([str(path)], min(write.nbytes, 1 << 30))
    finally:
        path.unlink(missing_ok=True)
    return {"read": read.bytes_per_s, "write": write.bytes_per_s, "direct": file.direct, "plain": plain}


def _arch(model: str) -> ModelArch:
    return ModelArch.from_dir(model) if os.path.isdir(model) else ModelArch.from_name(model)


def _under_copies(dev: Device, case: AttentionCase, lane: Lane) -> tuple[float, float]:
    """Attention while host-to-device copies run all the time: its rate, and theirs."""
    if not dev.is_cuda:
        return 0.0, 0.0
    (rate,) = lane_rates(dev, [lane], COPY_SECONDS)
    calls = 5
    copies_queued = int(2 * calls * best_s(case.attend, 2) * rate / lane.nbytes) + 20
    first, last = dev.event(timing=True), dev.event(timing=True)
    with dev.on(lane.stream):
        first.record(lane.stream)
        for _ in range(copies_queued):
            lane.target.copy_(lane.source, non_blocking=True)
        last.record(lane.stream)
    seconds = best_s(case.attend, calls)
    last.synchronize()
    return case.kv_bytes / seconds, copies_queued * lane.target.nbytes / (first.elapsed_time(last) / 1e3)


if __name__ == "__main__":
    serve(
        {
            "about": about,
            "machine": machine,
            "copies": copies,
            "gemm": gemm,
            "packed": packed,
            "hbm": hbm,
            "host": host,
            "disk": disk,
        }
    )
