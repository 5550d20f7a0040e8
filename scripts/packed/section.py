"""The section `packed` of the benchmark: one model in bf16 and packed by `flexmoe.quantize`, in the same jobs, in turns.

Disk-bound jobs show what fewer bytes bring, balanced ones whether reads and unpacking overlap, resident ones what unpacking
costs, and the last figure in how little memory the packed model runs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cost_model.model.weight_units import units_of
from policies.common.memory_units import GIB
from scripts.benchmark import loads
from scripts.benchmark.context import Bench
from scripts.benchmark.limit import EXPERTS_ON_DISK, measured_rounds
from scripts.benchmark.loads import Job
from scripts.benchmark.record import Figure
from scripts.benchmark.worker import Worker

BF16 = "bf16"
#: Tokens/s of each format against bf16's where the disk is the limit.
DISK_TARGETS = {"int8": 1.85, "fp8": 1.85, "int4": 3.4, "mxfp4": 3.4}
BALANCED_TARGET, RESIDENT_TARGET = 0.85, 0.9
#: Of the model in int4, beside what Python and torch take.
MEMORY_FORMAT, MEMORY_TARGET_BYTES = "int4", int(1.2 * GIB)
DISK_ROWS, RESIDENT_TOKENS, RUN_S = 16, 72, 7.0

Benches = Mapping[str, Bench]
Runs = Mapping[str, Sequence[dict]]


def packed(bench: Bench) -> tuple[list[Figure], dict]:
    """Three classes of jobs and the memory of one."""
    benches = {BF16: bench, **{name: replace(bench, model=_quantized(bench, name)) for name in DISK_TARGETS}}
    memory, memory_raw = _memory(benches[MEMORY_FORMAT])
    disk, disk_raw = _disk_bound(benches)
    balanced, balanced_raw = _balanced(benches)
    resident, resident_raw = _resident(benches)
    raw = {"disk-bound": disk_raw, "balanced": balanced_raw, "resident": resident_raw, "memory": memory_raw}
    return [*disk, *balanced, *resident, memory], raw


def _quantized(bench: Bench, name: str) -> Path:
    """The model in a format, in the work directory; made when it is not there."""
    path = bench.workdir / f"{bench.model.name}-{name}"
    if not (path / "config.json").exists():
        command = [sys.executable, "-m", "flexmoe.quantize", str(bench.model), str(path), "--format", name]
        subprocess.run(command, check=True)
    return path


def _in_turns(benches: Benches, engine: Worker, job: Job, weights: str) -> dict[str, list[dict]]:
    """Runs of a job in each format, one format after the other and again, all of them open meanwhile."""
    for name, each in benches.items():
        each.open(engine, name, job, weights)
    repeats = min(3, next(iter(benches.values())).scale.repeats)
    rounds = [{name: each.run(engine, name, job) for name, each in benches.items()} for _ in range(repeats)]
    for name in benches:
        engine.ask("close", name=name)
    return {name: [each[name] for each in rounds] for name in benches}


def _disk_bound(benches: Benches) -> tuple[list[Figure], dict]:
    bench = benches[BF16]
    job = loads.equal_job(rows=DISK_ROWS, prompt_len=4, new_tokens=12, vocab=bench.arch.vocab_size, seed=1)
    with Worker("scripts.benchmark.processes.engine") as engine:
        before = bench.probe()
        runs = _in_turns(benches, engine, job, EXPERTS_ON_DISK)
        after = bench.probe()
    read = (before["best"] + after["best"]) / 2
    figures = [
        disk_figure(name, job, runs, each.expert_bytes / read, bench.expert_bytes / each.expert_bytes)
        for name, each in benches.items()
    ]
    bench.say("disk-bound: " + "; ".join(f"{figure.what}: {figure.value}" for figure in figures))
    return figures, {"runs": runs, "before": before, "after": after}


def disk_figure(name: str, job: Job, runs: Runs, disk_s: float, fewer_bytes: float) -> Figure:
    """Tokens/s of a format beside bf16's in the same rounds.

    Args:
        runs: of every format.
        disk_s: of a sweep, at the disk's best rate.
        fewer_bytes: bf16's bytes of a sweep by those of the format.
    """
    limit = job.new_tokens / job.fewest_sweeps / disk_s
    return Figure(
        what=f"disk-bound, {name}: {job.rows} rows, all experts on disk",
        value=f"{_rate(job, runs[name]):.1f} tokens/s ({_rate(job, runs[name]) / limit:.0%} of the disk's {limit:.1f})",
        beside=f"bf16 {_rate(job, runs[BF16]):.1f} tokens/s, {fewer_bytes:.2f}x the bytes",
        ratio=speed_up(runs, name),
        target=DISK_TARGETS.get(name),
    )


def speed_up(runs: Runs, name: str) -> float:
    """How much faster than bf16: the median over the rounds."""
    pairs = zip(runs[BF16], runs[name], strict=True)
    return loads.median([plain["wall_s"] / own["wall_s"] for plain, own in pairs])


def _rate(job: Job, runs: Sequence[dict]) -> float:
    return job.new_tokens / loads.median([run["wall_s"] for run in runs])


def _balanced(benches: Benches) -> tuple[list[Figure], dict]:
    figures, raw = [], {}
    for name, each in benches.items():
        short = replace(each, scale=replace(each.scale, repeats=1, run_s=min(RUN_S, each.scale.run_s)))
        with Worker("scripts.benchmark.processes.engine") as engine:
            raw[name] = measured_rounds(short, engine, "balanced", short.calibrate(engine))
        figures.append(balanced_figure(name, raw[name]))
    return figures, raw


def balanced_figure(name: str, rounds: Sequence[dict]) -> Figure:
    """max(D, C) / T of a format's own D and C: the median of the rounds that count."""
    what, target = f"balanced, {name}: max(D, C) / T, all experts on disk", BALANCED_TARGET
    counted = [one for one in rounds if one["counts"]]
    if not counted:
        reasons = "; ".join(sorted({one["reason"] for one in rounds}))
        return Figure(
            what=what, value="-", beside=f"none of {len(rounds)} rounds counts: {reasons}", ratio=0.0, target=target
        )
    last = counted[-1]
    return Figure(
        what=what,
        value=f"T {last['wall_s']:.1f} s, {last['new_tokens'] / last['wall_s']:.1f} tokens/s",
        beside=f"D {last['disk_s']:.1f} s, C {last['compute_s']:.1f} s",
        ratio=loads.median([one["fraction"] for one in counted]),
        target=target,
    )


def _resident(benches: Benches) -> tuple[list[Figure], dict]:
    bench = benches[BF16]
    rows = RESIDENT_TOKENS * bench.arch.num_experts // bench.arch.top_k
    job = loads.equal_job(rows=rows, prompt_len=2, new_tokens=5, vocab=bench.arch.vocab_size, seed=2)
    with Worker("scripts.benchmark.processes.engine") as engine:
        runs = _in_turns(benches, engine, job, "resident")
        gemm = bench.gemm(engine, rows)
    least_s = bench.flops(job.processed_tokens, job.new_tokens) / gemm
    figures = [
        Figure(
            what=f"resident, {name}: {RESIDENT_TOKENS} tokens an expert",
            value=f"{_rate(job, each):.1f} tokens/s",
            beside=f"bf16 {_rate(job, runs[BF16]):.1f} tokens/s; {job.new_tokens / least_s:.1f} at bf16's rate of products",
            ratio=speed_up(runs, name),
            target=None if name == BF16 else RESIDENT_TARGET,
        )
        for name, each in runs.items()
    ]
    bench.say("resident: " + "; ".join(f"{figure.what}: {figure.value}" for figure in figures))
    return figures, {"runs": runs, "gemm_flops_per_s": gemm}


def _memory(bench: Bench) -> tuple[Figure, dict]:
    """The peak of a process that has all weights in memory, less what it has before it opens the model."""
    job = loads.equal_job(rows=DISK_ROWS, prompt_len=8, new_tokens=4, vocab=bench.arch.vocab_size, seed=3)
    with Worker("scripts.benchmark.processes.engine") as engine:
        engine.ask("watch_memory")
        before = engine.ask("peak_memory")["peak_bytes"]
        engine.ask("watch_memory")
        bench.open(engine, "resident", job, "resident")
        bench.run(engine, "resident", job)
        peak = engine.ask("peak_memory")["peak_bytes"]
    stored = sum(unit.stored_bytes for unit in units_of(bench.arch))
    figure = Figure(
        what=f"memory, {MEMORY_FORMAT}: peak of a process with all weights resident, less Python and torch",
        value=f"{(peak - before) / GIB:.2f} GiB",
        beside=f"{MEMORY_TARGET_BYTES / GIB:.1f} GiB; the weights are {stored / GIB:.2f} GiB, Python and torch {before / GIB:.2f} GiB",
        ratio=(peak - before) / MEMORY_TARGET_BYTES,
        target=1.0,
        at_most=True,
    )
    bench.say(f"{figure.what}: {figure.value}")
    return figure, {"before_bytes": before, "peak_bytes": peak}
