"""Outputs against transformers', memory against the plan, rows in flight against the KV capacity."""

from __future__ import annotations

import random
from pathlib import Path

from policies.common.memory_units import GIB
from scripts.benchmark import loads
from scripts.benchmark.context import Bench
from scripts.benchmark.record import Figure
from scripts.benchmark.worker import Worker

LOGITS_BOUND = 1.5
OUTSIDE_BYTES = 700 << 20
WEIGHTS_TARGET_BYTES = int(1.4 * GIB)
PLACEMENTS = ("resident", "experts on disk", [10.0, 20.0])


def check(bench: Bench) -> tuple[list[Figure], dict]:
    """float32 tokens equal transformers'; bf16 logits are as near to float32 as transformers' own bf16 logits."""
    tokens, tokens_raw = _tokens(bench)
    logits, logits_raw = _logits(bench)
    return [*tokens, *logits], {"tokens": tokens_raw, "logits": logits_raw}


def _tokens(bench: Bench) -> tuple[list[Figure], dict]:
    model = bench.checkpoint("tiny-float32", "--size", "tiny", "--dtype", "float32")
    job = loads.ragged_job(rows=16, vocab=512, seed=9, longest_prompt=120, longest_new=24)
    with Worker("scripts.benchmark.processes.peers") as peer:
        peer.ask("open", model=model)
        wanted = [
            peer.ask("generate", prompts=[prompt], new_tokens=length, tokens=True)["tokens"][0]
            for prompt, length in zip(job.prompts, job.max_tokens, strict=True)
        ]
    different = {}
    with Worker("scripts.benchmark.processes.engine") as engine:
        for weights in PLACEMENTS:
            bench.open(engine, "check", job, weights, model=model, num_gpu_batches=4)
            got = bench.run(engine, "check", job, tokens=True)["tokens"]
            engine.ask("close", name="check")
            different[str(weights)] = sum(a != b for ours, theirs in zip(got, wanted) for a, b in zip(ours, theirs))
    total = job.new_tokens * len(PLACEMENTS)
    equal = total - sum(different.values())
    bench.say(f"float32 greedy tokens equal to transformers': {equal} of {total}")
    figure = Figure(
        what=f"float32 greedy tokens equal to transformers', {job.rows} ragged rows, {len(PLACEMENTS)} placements",
        value=f"{equal} of {total}",
        beside="transformers, row by row",
        ratio=equal / total,
        target=1.0,
    )
    return [figure], {"different": different}


def _logits(bench: Bench) -> tuple[list[Figure], dict]:
    """The router makes errors heavy-tailed (near ties fall the other way): the median position is compared as well."""
    import numpy as np

    rng = random.Random(10)
    prompt = [rng.randrange(loads.FIRST_TOKEN, bench.arch.vocab_size) for _ in range(192)]
    job = loads.Job(prompts=(tuple(prompt),), max_tokens=(1,), prefill_tokens=len(prompt))
    files = {name: bench.workdir / f"logits-{name}.npy" for name in ("ours", "theirs", "float32")}
    with Worker("scripts.benchmark.processes.engine") as engine:
        bench.open(engine, "check", job, "experts on disk")
        engine.ask("logits", name="check", token_ids=prompt, path=_absolute(files["ours"]))
    for name, dtype in (("theirs", "bfloat16"), ("float32", "float32")):
        with Worker("scripts.benchmark.processes.peers") as peer:
            peer.ask("open", model=str(bench.model), dtype=dtype)
            peer.ask("logits", token_ids=prompt, path=_absolute(files[name]))
    ours, theirs, exact = (np.load(files[name]) for name in ("ours", "theirs", "float32"))
    for file in files.values():
        file.unlink()
    errors = {
        name: {
            "rms": float(np.sqrt(np.mean((got - exact) ** 2))),
            "median": float(np.median(np.abs(got - exact).max(axis=1))),
            "max": float(np.abs(got - exact).max()),
        }
        for name, got in (("ours", ours), ("theirs", theirs))
    }
    figures = []
    for measure, name in (
        ("rms", "root mean square"),
        ("median", "median over positions of the largest"),
        ("max", "largest"),
    ):
        mine, other = errors["ours"][measure], errors["theirs"][measure]
        bench.say(f"bf16 logits, {name} error against float32: {mine:.4f}, transformers' {other:.4f}")
        figures.append(
            Figure(
                what=f"bf16 logits: {name} error against float32, {len(prompt)} positions",
                value=f"{mine:.4f} (logits' root mean square {float(np.sqrt(np.mean(exact**2))):.2f})",
                beside=f"transformers' bf16 {other:.4f}",
                ratio=mine / other,
                target=LOGITS_BOUND,
                at_most=True,
            )
        )
    return figures, errors


def _absolute(path: Path) -> str:
    return str(path.resolve())


def memory(bench: Bench) -> tuple[list[Figure], dict]:
    """Peak anonymous and shared memory of a fresh process with weights 10 / 20 / 70."""
    job = loads.staggered_job(
        sweeps=10, tokens_per_sweep=600, prompt_len=64, vocab=bench.arch.vocab_size, seed=11, ragged=True
    )
    with Worker("scripts.benchmark.processes.engine") as engine:
        engine.ask("watch_memory")
        plan = bench.open(engine, "memory", job, [10.0, 20.0])["memory"]
        bench.run(engine, "memory", job)
        peak = engine.ask("peak_memory")["peak_bytes"]
    planned = plan["gpu"]["planned_bytes"] + plan["cpu"]["planned_bytes"]
    weights = sum(plan[tier].get(part, 0) for tier in ("gpu", "cpu") for part in ("weights", "slots", "staging slots"))
    bench.say(f"memory: peak {_mib(peak)}, planned {_mib(planned)} + 700 MiB; weights and slots {_mib(weights)}")
    return [
        Figure(
            what="weights 10/20/70: peak anonymous + shared resident memory",
            value=_mib(peak),
            beside=f"planned gpu + cpu {_mib(planned)}, + 700 MiB for Python and torch: "
            f"{_mib(planned + OUTSIDE_BYTES)}",
            ratio=peak / (planned + OUTSIDE_BYTES),
            target=1.0,
            at_most=True,
        ),
        Figure(
            what="weights 10/20/70: planned weights + slots",
            value=_mib(weights),
            beside="1.4 GiB",
            ratio=weights / WEIGHTS_TARGET_BYTES,
            target=1.0,
            at_most=True,
        ),
    ], {"peak_bytes": peak, "plan": plan}


def steady(bench: Bench) -> tuple[list[Figure], dict]:
    """Equal rows, ten blocks long, on a tiny model: the KV capacity alone bounds the rows in flight."""
    model = bench.checkpoint("tiny", "--size", "tiny")
    block = bench.scale.steady_rows
    prompt_len, new = 2 * block, block
    capacity = block * (prompt_len + new // 2)
    job = loads.equal_job(
        rows=10 * block, prompt_len=prompt_len, new_tokens=new, vocab=512, seed=12, prefill_tokens=prompt_len
    )
    with Worker("scripts.benchmark.processes.engine") as engine:
        bench.open(engine, "steady", job, "resident", rows=2 * block, model=model, kv_tokens=capacity)
        result = bench.run(engine, "steady", job)
    mean = loads.steady_mean(result["rows_in_flight"], new)
    bench.say(f"steady state: {mean:.1f} rows in flight of {block} that {capacity} tokens of KV allow")
    figure = Figure(
        what=f"{job.rows} equal rows of {prompt_len} + {new}: mean rows in flight in steady state",
        value=f"{mean:.1f} ({result['sweeps']} sweeps)",
        beside=f"KV capacity / (s + n/2) = {capacity} / {prompt_len + new // 2} = {block}",
        ratio=mean / block,
        target=0.9,
    )
    return [figure], {"rows_in_flight": result["rows_in_flight"], "capacity_tokens": capacity}


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MiB"
