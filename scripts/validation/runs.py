"""Measured runs of a configuration: the engine as users run it, with looks at the machine between its sweeps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from flexmoe import LLM, EngineRequest
from flexmoe.system.device import Device
from scripts.support.reads import read_when_quiet
from scripts.support.stolen import Stolen, most_stolen, stolen_by_reads, wait_for_calm
from scripts.validation.configs import Configuration
from scripts.validation.looks import Looks, Stretch, looks_at

_CALM_S = 30.0  # the longest wait for a calm machine before a run
_STRETCH_S = 1.5  # of sweeps, before the next look


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run took; ``lanes_s`` are the seconds in which a lane was at work.

    ``stretches`` are its sweeps with the looks around them, ``stolen`` is the share of the cores' time that went to other
    machines, and ``most_stolen`` the most that a run without disturbance may have lost; ``cache_experts`` are those that device memory beyond the policy's holds.
    """

    wall_s: float
    sweeps: int
    lanes_s: dict[str, float]
    stretches: tuple[Stretch, ...]
    stolen: float
    most_stolen: float
    cache_experts: int


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


def measure(c: Configuration, subject: Subject, hardware: Hardware, work: Path, most: int) -> Iterator[Run]:
    """Run the job up to ``most`` times on one loaded engine.

    Args:
        hardware: what the probe found.
    """
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
    requests = c.requests(_prompts(c, subject))
    try:
        with looks_at(Device(subject.device), hardware, subject.arch, subject.disk_files) as looks:
            for _ in range(most):
                yield _run(llm, requests, looks, work)
    finally:
        llm.close()


def _prompts(c: Configuration, subject: Subject) -> Iterator[Sequence[int]]:
    rng, text = random.Random(0), subject.text
    for s, _ in c.rows:
        start = rng.randrange(max(1, len(text) - s))
        yield text[start : start + s] if text else [rng.randrange(subject.arch.vocab_size) for _ in range(s)]


def _run(llm: LLM, requests: list[EngineRequest], looks: Looks, work: Path) -> Run:
    wait_for_calm(_CALM_S)
    by_reads = stolen_by_reads(work)
    before, stretches, stolen = llm.metrics(), _Stretches(llm, looks), Stolen()
    for output in llm.stream(requests, on_sweep=stretches.swept):
        if output.error:
            raise RuntimeError(output.error)
    share, after = stolen.share(), llm.metrics()
    lanes = {lane: t["busy_s"] - before["lanes"].get(lane, {}).get("busy_s", 0.0) for lane, t in after["lanes"].items()}
    wall_s = after["wall_s"] - before["wall_s"]
    return Run(
        wall_s=wall_s,
        sweeps=after["sweeps"] - before["sweeps"],
        lanes_s=lanes,
        stretches=stretches.ended(),
        stolen=share,
        most_stolen=most_stolen(by_reads, lanes.get("disk_read", 0.0), wall_s),
        cache_experts=llm.engine.plan.allocation.cache_experts,
    )


class _Stretches:
    """Cuts a run into stretches as it goes; looks lie between sweeps, where the engine's clock stands."""

    def __init__(self, llm: LLM, looks: Looks) -> None:
        self._llm, self._looks, self._found = llm, looks, list[Stretch]()
        self._wall_s, self._before = _wall_s(llm), looks.look()

    def swept(self) -> None:
        """After a sweep."""
        if _wall_s(self._llm) - self._wall_s >= _STRETCH_S:
            self._cut()

    def ended(self) -> tuple[Stretch, ...]:
        """All of them, after the last sweep."""
        if _wall_s(self._llm) > self._wall_s:
            self._cut()
        return tuple(self._found)

    def _cut(self) -> None:
        read_when_quiet(self._llm)
        wall_s, after = _wall_s(self._llm), self._looks.look()
        self._found.append(Stretch(before=self._before, after=after, wall_s=wall_s - self._wall_s))
        self._wall_s, self._before = wall_s, after


def _wall_s(llm: LLM) -> float:
    """Seconds of all sweeps so far."""
    return llm.metrics()["wall_s"]
