"""What the machine gives, by the runtime's own buffers, streams, kernels and disk threads: a worker of `bench_gpu`.

Every operation answers with bytes/s or FLOP/s. On device `cpu` the same code runs for a rehearsal; its numbers mean nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cost_model.arch import ModelArch
from cost_model.sizes import BLOCK_TOKENS
from flexmoe.attention import Ragged, paged_attention
from flexmoe.device import Device
from flexmoe.models import family
from flexmoe.storage import DirectFile, DiskPool, Transfer
from flexmoe.trace import Recorder
from scripts.bench_probes import disk_rate
from scripts.bench_worker import serve

UNIT_BYTES = 336 << 20
PIECES = 3  # an expert crosses PCIe as three tensors
ATTENTION_CONTEXT = 640


def about(device: str) -> dict:
    """The GPU's name, memory, driver and link; empty on cpu."""
    dev = Device(device)
    if not dev.is_cuda:
        return {"gpu": "none"}
    found = {"gpu": torch.cuda.get_device_name(dev.torch), "cuda": torch.version.cuda}
    found["gpu_bytes"] = torch.cuda.mem_get_info(dev.torch)[1]
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(dev.torch.index)
        found["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        found["pcie"] = (
            f"gen {nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)} x{nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)}"
        )
    except Exception as error:  # no NVML, or a virtual machine that hides the link
        found["nvml"] = f"{type(error).__name__}: {error}"
    return found


def copies(device: str, scale: float = 1.0) -> dict:
    """Pinned copies of one expert at a time: up, down, and both at once."""
    dev, nbytes = Device(device), int(UNIT_BYTES * scale)
    host = [dev.host_buffer(nbytes).fill_(1) for _ in range(2)]
    on_device = [torch.zeros(nbytes, dtype=torch.uint8, device=dev.torch) for _ in range(2)]
    streams = [dev.stream(), dev.stream()]
    up, down = (on_device[0], host[0], streams[0]), (host[1], on_device[1], streams[1])
    rates = {}
    for name, lanes in {"h2d": [up], "d2h": [down], "both": [up, down]}.items():
        _copy_rates(dev, lanes, 3)
        rates[name] = _copy_rates(dev, lanes, 60)
    return {
        "h2d": rates["h2d"][0],
        "d2h": rates["d2h"][0],
        "h2d_of_both": rates["both"][0],
        "d2h_of_both": rates["both"][1],
    }


def gemm(device: str, model: str, tokens: list[int], seconds: float = 0.15) -> dict:
    """FLOP/s of one expert of the model over so many tokens, by the family's own function; `[[tokens, rate], ...]`."""
    dev, arch = Device(device), ModelArch.from_name(model) if not os.path.isdir(model) else ModelArch.from_dir(model)
    new = {"dtype": torch.bfloat16, "device": dev.torch}
    shapes = {"gate": (arch.ffn, arch.hidden), "up": (arch.ffn, arch.hidden), "down": (arch.hidden, arch.ffn)}
    weights = {role: torch.randn(shape, **new).mul_(0.02) for role, shape in shapes.items()}
    math, curve = family(arch), []
    with torch.inference_mode():
        for count in tokens:
            x_TD = torch.randn(count, arch.hidden, **new)
            each_s = _repeat_s(dev, lambda: math.expert(x_TD, weights), seconds)  # noqa: B023
            curve.append([count, 6 * count * arch.hidden * arch.ffn / each_s])
    return {"curve": curve, "weight_bytes": 6 * arch.hidden * arch.ffn}


def hbm(device: str, scale: float = 1.0) -> dict:
    """Reads of the GPU's own memory: a sum over 4 GiB."""
    dev = Device(device)
    values = torch.ones(int((1 << 30) * scale), device=dev.torch)
    with torch.inference_mode():
        return {"read": values.nbytes / _repeat_s(dev, values.sum, 0.3)}


def host(device: str, model: str, scale: float = 1.0) -> dict:
    """Reads of host memory, attention on the CPU over a KV cache of Mixtral's heads, and the latter under copies."""
    dev, arch = Device(device), ModelArch.from_name(model) if not os.path.isdir(model) else ModelArch.from_dir(model)
    values = dev.host_buffer(int((4 << 30) * scale), pinned=False).view(torch.float32).fill_(1)
    half = len(values) // 2
    reads = {"sum": values.sum, "dot": lambda: torch.dot(values[:half], values[-half:]), "amax": values.amax}
    best = {name: values.nbytes / _best_s(read, 5) for name, read in reads.items()}
    attend, kv_bytes = _attention(dev, arch, int(1024 * scale) or 1)
    alone = kv_bytes / _best_s(attend, 7)
    out, source = torch.zeros(UNIT_BYTES // 8, dtype=torch.uint8, device=dev.torch), dev.host_buffer(UNIT_BYTES // 8)
    under, copied = _under_copies(dev, attend, kv_bytes, (out, source, dev.stream()))
    return {
        "read": max(best.values()), "reads": best, "attention": alone, "attention_under_copies": under,
        "copies_under_attention": copied, "threads": torch.get_num_threads(),
    }  # fmt: skip


def disk(directory: str, nbytes: int, device: str) -> dict:
    """Writes and O_DIRECT reads by the runtime's disk threads; beside them, the best of a plain loop of `preadv`."""
    dev, path = Device(device), Path(directory) / f"probe-{os.getpid()}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = min(UNIT_BYTES, nbytes)
    count = max(1, nbytes // size)
    buffers = [dev.host_buffer(size) for _ in range(4)]
    for seed, buffer in enumerate(buffers):  # distinct bytes: nothing to compress
        buffer.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    try:
        file = DirectFile(path, writable=True)
        write_s = _pool_s("disk_write", file, buffers, count)
        start = time.perf_counter()
        file.sync()
        write_s += time.perf_counter() - start
        read_s = _pool_s("disk_read", file, buffers, count)
        file.close()
        plain = disk_rate([str(path)], min(count * size, 1 << 30))
    finally:
        path.unlink(missing_ok=True)
    return {"read": count * size / read_s, "write": count * size / write_s, "direct": file.direct, "plain": plain}


def _pool_s(lane: str, file: DirectFile, buffers: list[torch.Tensor], count: int) -> float:
    pool, size = DiskPool(Recorder(), lane), buffers[0].numel()
    start = time.perf_counter()
    pending = []
    for i in range(count):
        if i >= len(buffers):
            pending[i - len(buffers)].wait()
        transfer = Transfer(file, i * size, memoryview(buffers[i % len(buffers)].numpy()), size)
        pending.append(pool.submit([transfer], lane))
    for p in pending:
        p.wait()
    seconds = time.perf_counter() - start
    pool.close()
    return seconds


def _attention(dev: Device, arch: ModelArch, rows: int) -> tuple[Callable[[], torch.Tensor], int]:
    """Decode over `rows` rows with blocks in no order, in pinned memory as the KV cache has it; and its KV bytes."""
    per_row = -(-ATTENTION_CONTEXT // BLOCK_TOKENS)
    shape = (2, rows * per_row, BLOCK_TOKENS, arch.num_kv_heads, arch.head_dim)
    count = torch.Size(shape).numel()
    pool = dev.host_buffer(2 * count).view(torch.bfloat16)
    fill_with_noise(pool)
    k_pool, v_pool = pool.view(shape)
    tables = torch.randperm(rows * per_row).view(rows, per_row).tolist()
    ragged = Ragged.of([1] * rows, [ATTENTION_CONTEXT] * rows, tables)
    q = torch.randn(rows, arch.num_heads, arch.head_dim).to(torch.bfloat16)
    return lambda: paged_attention(q, k_pool, v_pool, ragged, window=None), pool.nbytes


def fill_with_noise(flat: torch.Tensor, chunk: int = 1 << 24) -> None:
    """Numbers of a normal distribution, repeated: no page is the kernel's shared zero page."""
    pattern = torch.randn(min(chunk, flat.numel()), generator=torch.Generator().manual_seed(0)).to(flat.dtype)
    for start in range(0, flat.numel(), len(pattern)):
        piece = flat[start : start + len(pattern)]
        piece.copy_(pattern[: len(piece)])


def _under_copies(dev: Device, attend: Callable, kv_bytes: int, lane: tuple) -> tuple[float, float]:
    """Attention while host-to-device copies run all the time: its rate, and theirs."""
    if not dev.is_cuda:
        return 0.0, 0.0
    into, source, stream = lane
    each_s = into.nbytes / _copy_rates(dev, [lane], 20)[0]
    calls = 5
    copies_queued = int(2 * calls * _best_s(attend, 2) / each_s) + 20
    first, last = dev.event(timing=True), dev.event(timing=True)
    with dev.on(stream):
        first.record(stream)
        for _ in range(copies_queued):
            into.copy_(source, non_blocking=True)
        last.record(stream)
    seconds = _best_s(attend, calls)
    last.synchronize()
    return kv_bytes / seconds, copies_queued * into.nbytes / (first.elapsed_time(last) / 1e3)


def _copy_rates(dev: Device, lanes: list[tuple], count: int) -> list[float]:
    """Bytes/s of each (target, source, stream), all of them started together."""
    begin, marks = time.perf_counter(), []
    for target, source, stream in lanes:
        size = target.numel() // PIECES
        with dev.on(stream):
            start = dev.event(timing=True)
            start.record(stream)
            for i in range(count * PIECES):
                at = i % PIECES * size
                target[at : at + size].copy_(source[at : at + size], non_blocking=True)
            end = dev.event(timing=True)
            end.record(stream)
        marks.append((start, end, count * PIECES * size))
    for _, end, _ in marks:
        end.synchronize()
    if not dev.is_cuda:
        return [nbytes / (time.perf_counter() - begin) for _, _, nbytes in marks]
    return [nbytes / (start.elapsed_time(end) / 1e3) for start, end, nbytes in marks]


def _repeat_s(dev: Device, work: Callable, seconds: float) -> float:
    """Device seconds of one call, the mean over about `seconds` of them."""

    def run(count: int) -> float:
        start, end, begin = dev.event(timing=True), dev.event(timing=True), time.perf_counter()
        start.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 if dev.is_cuda else time.perf_counter() - begin

    run(2)
    count = max(3, min(1000, int(seconds / max(1e-6, run(3) / 3))))
    return run(count) / count


def _best_s(work: Callable, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    serve({"about": about, "copies": copies, "gemm": gemm, "hbm": hbm, "host": host, "disk": disk})
