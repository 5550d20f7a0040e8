"""FlexMoE on dummy weights: a worker of `bench_gpu` that enters the steady state directly, or runs a whole job.

In the steady state rows of all ages are in flight. The block starts with ages spread evenly over [0, n) and KV that nobody
computed; from then on everything is real: rows end, others are admitted and prefilled, every byte is moved.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.models.loader import load_model
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.probing.disk import transfer
from flexmoe.probing.timing import fill_with_noise
from flexmoe.system.device import Device, process_gpu_bytes
from flexmoe.system.memory import available_host_bytes
from flexmoe.system.trace import LaneTotals
from policies.common.memory_units import GIB
from policies.policy import Policy, Workload
from scripts.benchmark.probes import PeakMemory, Repeater
from scripts.benchmark.worker import serve

TRACED_SWEEPS = 3
TOP_UP_BYTES = 1 << 30
WRITE_BYTES, WRITE_SECONDS = 16 << 20, 300.0


class PeakGpu:
    """The largest figure that NVML (or, where it cannot tell, the driver) gives for this process, every 50 ms."""

    def __init__(self, device: Device):
        self._device, self.peak_bytes = device, 0
        self.source = "none"
        self._look()
        self._repeater = Repeater(self._look, 0.05)

    def _look(self) -> None:
        if not self._device.is_cuda:
            return
        used = process_gpu_bytes(self._device.torch)
        self.source = "NVML, this process" if used else "cudaMemGetInfo, the whole device"
        if not used:
            free, total = torch.cuda.mem_get_info(self._device.torch)
            used = total - free
        self.peak_bytes = max(self.peak_bytes, used)

    def stop(self) -> dict:
        """The peak and who says so."""
        self._repeater.stop()
        self._look()
        return {"gpu_peak_bytes": self.peak_bytes, "gpu_peak_source": self.source}


def room(device: str, gpu_bytes: int, host_bytes: int) -> dict:
    """GPU bytes that a capped process has for tensors, and host bytes that can be had of those asked for."""
    return {"gpu_bytes": Device(device).room(gpu_bytes), "host_bytes": _host_room(host_bytes)}


def _host_room(wanted: int) -> int:
    """Some virtual machines are given their memory as they use it: touch what is wanted once, and see what is there."""
    reserve, held = 4 * GIB, []
    while available_host_bytes() < wanted + reserve and len(held) * TOP_UP_BYTES < wanted:
        if available_host_bytes() < 2 * TOP_UP_BYTES:
            time.sleep(1)
            if available_host_bytes() < 2 * TOP_UP_BYTES:
                break
        held.append(torch.ones(TOP_UP_BYTES, dtype=torch.uint8))
        if available_host_bytes() + len(held) * TOP_UP_BYTES >= wanted + reserve:
            break
    held.clear()
    return min(wanted, available_host_bytes() - reserve)


def steady(
    model: str,
    policy: dict,
    lengths: list[int],
    budgets: dict,
    device: str,
    offload_dir: str,
    rows: int,
    warm: int,
    timed: int,
    deadline_s: float,
    trace: str | None = None,
    seed: int = 0,
) -> dict:
    """Load, enter the steady state, and time it.

    Args:
        lengths: prompt and completion length of every row.
        budgets: `gpu_mem`, `cpu_mem` and `nvme_mem` of `EngineConfig`, in GiB.
        rows: in flight from the first sweep on.
        warm, timed: sweeps before and under the clock.
        deadline_s: stop timing after so many seconds in all, though at least a quarter of the sweeps.
        trace: where a Chrome trace of three further sweeps goes.
    """
    begin, memory = time.perf_counter(), PeakMemory()
    s, n = lengths
    engine, gpu, load_s = _open(model, policy, lengths, budgets, device, offload_dir, keep_spans=trace is not None)
    requests = _requests(s, n, engine.model.arch.vocab_size, seed)
    entered = time.perf_counter()
    _fill_cache(engine)
    for place in reversed(range(rows)):
        age, request = place * n // rows, next(requests)
        if age == 0:
            engine.submit(request)
        else:
            engine.enter_aged(request, [1] * age)
    enter_s = time.perf_counter() - entered
    spare = 2 * (-(-rows // n)) + 4

    def sweeps(count: int) -> float:
        start = time.perf_counter()
        for done in range(count):
            while engine.unfinished < rows + spare:
                engine.submit(next(requests))
            engine.step()
            if done + 1 >= count / 4 and time.perf_counter() - begin > deadline_s:
                break
        return time.perf_counter() - start

    sweeps(warm)
    first, before, waits, stalled = (
        len(engine.sweeps),
        engine.recorder.totals(),
        engine.device.host_waits,
        engine.feed.stall_s,
    )
    wall_s = sweeps(timed)
    after, done = engine.recorder.totals(), engine.sweeps.since(first)
    stalled = engine.feed.stall_s - stalled
    waits = engine.device.host_waits - waits
    if trace:
        start = time.perf_counter()
        sweeps(TRACED_SWEEPS)
        engine.recorder.write_chrome_trace(trace, since_s=start)
    result = {
        "load_s": load_s,
        "enter_s": enter_s,
        "wall_s": wall_s,
        "sweeps": len(done),
        "sweep_s": [sweep.wall_s for sweep in done],
        "rows": [sweep.rows for sweep in done],
        "generated": sum(sweep.generated_tokens for sweep in done),
        "prompt": sum(sweep.prompt_tokens for sweep in done),
        "restarts": engine.scheduler.restarts,
        "stall_s": stalled,
        "host_waits_per_sweep": waits / len(done),
        "lanes": {
            lane: {
                "worker_s": t.worker_s - _of(before, lane).worker_s,
                "busy_s": t.busy_s - _of(before, lane).busy_s,
                "bytes": t.nbytes - _of(before, lane).nbytes,
            }
            for lane, t in after.items()
        },
        "planned": {tier: dict(items) for tier, items in engine.plan.memory.parts.items()},
        "weights": engine.plan.describe_weights(),
        "host_peak_bytes": memory.stop(),
        **gpu.stop(),
    }
    engine.clear()
    engine.close()
    return result


def _fill_cache(engine: Engine) -> None:
    """Noise in every tier: on disk it is written, since a place that never was is read from nowhere."""
    cache = engine.cache
    for pool in (cache.cpu, cache.gpu, cache.tail):
        if pool.numel():
            fill_with_noise(pool.view(-1))
    if cache.file is not None:
        size = cache.shape.layers * cache.total("disk") * cache.page_bytes
        buffers = [engine.device.host_buffer(WRITE_BYTES) for _ in range(4)]
        for buffer in buffers:
            fill_with_noise(buffer.view(cache.shape.dtype))
        transfer("disk_write", cache.file, buffers, -(-size // WRITE_BYTES) * WRITE_BYTES, WRITE_SECONDS)


def job(
    model: str,
    policy: dict,
    lengths: list[int],
    budgets: dict,
    device: str,
    offload_dir: str,
    rows: int,
    probe: list[int],
    path: str,
) -> dict:
    """Run a whole job of equal rows from an empty engine to an empty engine, and write the logits of one prompt."""
    s, n = lengths
    engine, gpu, load_s = _open(model, policy, lengths, budgets, device, offload_dir)
    np.save(path, engine.logits(probe).numpy())
    requests = _requests(s, n, engine.model.arch.vocab_size, 0)
    first, begin = len(engine.sweeps), time.perf_counter()
    for _ in range(rows):
        engine.submit(next(requests))
    while engine.unfinished:
        engine.step()
    wall_s = time.perf_counter() - begin
    generated = sum(sweep.generated_tokens for sweep in engine.sweeps.since(first))
    if generated != rows * n:
        raise ValueError(f"{generated} tokens were generated, and {rows * n} were asked for")
    engine.close()
    return {
        "wall_s": wall_s,
        "generated": generated,
        "sweeps": len(engine.sweeps) - first,
        "load_s": load_s,
        **gpu.stop(),
    }


def _open(
    model: str, policy: dict, lengths: list[int], budgets: dict, device: str, offload_dir: str, keep_spans: bool = False
) -> tuple[Engine, PeakGpu, float]:
    begin, gpu = time.perf_counter(), PeakGpu(Device(device))
    config = EngineConfig(
        policy=Policy(**policy),
        workload=Workload(prompt_len=lengths[0], gen_len=lengths[1]),
        device=device,
        offload_dir=offload_dir,
        gen_len=lengths[1],
        longest_row=sum(lengths),
        keep_spans=keep_spans,
        **budgets,
    )
    return Engine(load_model(model, "dummy"), config), gpu, time.perf_counter() - begin


def _requests(prompt_len: int, gen_len: int, vocab: int, seed: int) -> Iterator[EngineRequest]:
    rng, params, number = random.Random(seed), SamplingParams(max_tokens=gen_len, ignore_eos=True), 0
    blank = EngineRequest(request_id="", prompt_token_ids=(), params=params)
    while True:
        ids = tuple(rng.choices(range(3, vocab), k=prompt_len))
        yield replace(blank, request_id=str(number), prompt_token_ids=ids)
        number += 1


def _of(totals: dict[str, LaneTotals], lane: str) -> LaneTotals:
    return totals.get(lane, LaneTotals())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    serve({"room": room, "steady": steady, "job": job})
