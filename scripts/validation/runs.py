"""Measured runs of a configuration: the engine as users run it, with the disk rate just before and after."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import linear

from cost_model.model.arch import ModelArch
from flexmoe import LLM, EngineRequest
from flexmoe.probing.disk import random_buffers, transfer
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DirectFile
from scripts.support.stolen import Stolen, wait_for_calm
from scripts.validation.configs import Configuration

_UNIT_BYTES, _UNITS, _PROBE_BYTES = 32 << 20, 8, 1 << 30
_CALM_S = 30.0  # the longest wait for a calm machine before a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run took; ``lanes_s`` are the seconds in which a lane was at work.

    ``stolen`` is the share of the cores' time that went to other machines; ``cache_experts`` are those that device memory beyond
    the policy's holds.
    """

    wall_s: float
    sweeps: int
    lanes_s: dict[str, float]
    disk_before: float
    disk_after: float
    cpu_before: float
    cpu_after: float
    stolen: float
    cache_experts: int

    @property
    def disk_read_bytes_per_s(self) -> float:
        """The mean of both rates."""
        return (self.disk_before + self.disk_after) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to run: its shape, its directory and where it runs; ``disk_files`` are read to find the disk's rate.

    ``text`` has the token ids that prompts are taken from; without it they are random ones.
    """

    arch: ModelArch
    path: Path
    disk_files: tuple[Path, ...]
    device: str = "cpu"
    load_format: str = "auto"
    text: tuple[int, ...] = ()


def measure(c: Configuration, subject: Subject, work: Path, most: int) -> Iterator[Run]:
    """Run the job up to ``most`` times on one loaded engine."""
    workload = c.workload
    llm = LLM(
        str(subject.path),
        load_format=subject.load_format,
        policy=c.policy,
        device=subject.device,
        workload=workload,
        longest_row=workload.longest_row,
        offload_dir=work / "offload",
    )
    buffers = random_buffers(Device(subject.device), _UNIT_BYTES, _UNITS)
    requests = c.requests(_prompts(c, subject))
    try:
        for _ in range(most):
            yield _run(llm, requests, lambda: _disk_rate(subject.disk_files, buffers))
    finally:
        llm.close()


def _prompts(c: Configuration, subject: Subject) -> Iterator[Sequence[int]]:
    rng, text = random.Random(0), subject.text
    for s, _ in c.rows:
        start = rng.randrange(max(1, len(text) - s))
        yield text[start : start + s] if text else [rng.randrange(subject.arch.vocab_size) for _ in range(s)]


def _run(llm: LLM, requests: list[EngineRequest], disk_rate: Callable[[], float]) -> Run:
    wait_for_calm(_CALM_S)
    before = llm.metrics()
    cpu_before, disk_before, stolen = cpu_rate(), disk_rate(), Stolen()
    for output in llm.stream(requests):
        if output.error:
            raise RuntimeError(output.error)
    share = stolen.share()
    disk_after, cpu_after = disk_rate(), cpu_rate()
    after = llm.metrics()
    lanes = {lane: t["busy_s"] - before["lanes"].get(lane, {}).get("busy_s", 0.0) for lane, t in after["lanes"].items()}
    return Run(
        wall_s=after["wall_s"] - before["wall_s"],
        sweeps=after["sweeps"] - before["sweeps"],
        lanes_s=lanes,
        disk_before=disk_before,
        disk_after=disk_after,
        cpu_before=cpu_before,
        cpu_after=cpu_after,
        stolen=share,
        cache_experts=llm.engine.plan.allocation.cache_experts,
    )


@torch.inference_mode()
def cpu_rate(tokens: int = 24, hidden: int = 512, ffn: int = 1792, seconds: float = 0.4) -> float:
    """FLOP/s of small GEMMs over weights that no cache holds: whether the machine is as fast as it was."""
    weights = [torch.full((ffn, hidden), 0.01, dtype=torch.bfloat16) for _ in range(64)]
    x_TD, calls, begin = torch.ones(tokens, hidden, dtype=torch.bfloat16), 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for weight in weights:
            linear(x_TD, weight)
        calls += len(weights)
    return 2 * calls * tokens * hidden * ffn / (time.perf_counter() - begin)


def _disk_rate(files: Sequence[Path], buffers: list) -> float:
    """Bytes/s of the runtime's disk threads over the files, page cache bypassed."""
    nbytes = seconds = 0.0
    for path in files:
        file = DirectFile(path)
        try:
            done = transfer("disk_read", file, buffers, path.stat().st_size // _UNIT_BYTES * _UNIT_BYTES, 10.0)
        finally:
            file.close()
        nbytes, seconds = nbytes + done.nbytes, seconds + done.seconds
        if nbytes > _PROBE_BYTES:
            break
    return nbytes / seconds
