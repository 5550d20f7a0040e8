"""FlexMoE against accelerate's disk offload: as many weights resident on both sides, cached pages dropped for both."""

from __future__ import annotations

import shutil

from scripts.benchmark import loads
from scripts.benchmark.compare import fastest_experts, ragged_load
from scripts.benchmark.context import Bench
from scripts.benchmark.loads import Job
from scripts.benchmark.record import Figure
from scripts.benchmark.worker import Worker

FEW_STEPS = 4
#: Our tokens/s against accelerate's.
BALANCED_TARGET, RAGGED_TARGET = 2.2, 4.0


def offload(bench: Bench) -> tuple[list[Figure], dict]:
    """The balanced point with the same rows in flight, and the ragged load at the peer's best batch."""
    folder = bench.workdir / "accelerate"
    shutil.rmtree(folder, ignore_errors=True)
    drop = (str(bench.model), str(folder))
    with Worker("scripts.benchmark.processes.engine") as engine, Worker("scripts.benchmark.processes.peers") as peer:
        resident = bench.scale.resident_bytes
        loaded = peer.ask("open", model=str(bench.model), resident_bytes=resident, offload_dir=str(folder))
        experts = fastest_experts(bench, peer, drop)
        balanced, balanced_raw = _balanced(bench, engine, peer, drop)
        ragged, ragged_raw = _ragged(bench, engine, peer, drop)
    shutil.rmtree(folder, ignore_errors=True)
    raw = {"peer": loaded, "experts": experts, "balanced": balanced_raw, "ragged": ragged_raw}
    return [balanced, ragged], raw


def _balanced(bench: Bench, engine: Worker, peer: Worker, drop: tuple[str, ...]) -> tuple[Figure, dict]:
    """A job as in the limit section's balanced class, for the smaller disk tier; its prompts are equal: no padding."""
    compute = bench.calibrate(engine)
    opened = bench.open(engine, "few", ragged_load(bench), bench.scale.resident_bytes)
    disk_bytes = opened["memory"]["disk"]["weights"]
    engine.ask("close", name="few")
    first = bench.probe()
    job = loads.size_job(
        "balanced",
        disk_s=disk_bytes / first["best"],
        compute=compute,
        run_s=bench.scale.run_s,
        vocab=bench.arch.vocab_size,
        seed=6,
        ragged=False,
    )
    bench.open(engine, "few", job, bench.scale.resident_bytes)
    ours, theirs = [], []
    for _ in range(bench.scale.repeats):
        before = bench.probe()
        run = bench.run(engine, "few", job, drop=drop)
        after = bench.probe()
        disk_s = disk_bytes * job.fewest_sweeps * 2 / (before["best"] + after["best"])
        ours.append(run | {"disk_s": disk_s, "before": before, "after": after})
        theirs.append(_batch(peer, job.prompts, job.fewest_sweeps, drop))
        bench.say(
            f"balanced: FlexMoE {run['wall_s']:.1f} s, D {disk_s:.1f} s, {run['sweeps']} sweeps; accelerate {theirs[-1]:.1f} s"
        )
    engine.ask("close", name="few")
    compute_s = bench.resident_run(engine, job)["wall_s"]
    return _balanced_figure(bench, job, ours, theirs, compute_s), {
        "ours": ours,
        "theirs_s": theirs,
        "compute_s": compute_s,
        "rows": job.rows,
        "new_tokens": job.new_tokens,
        "steps": job.fewest_sweeps,
        "prompt_tokens": job.prompt_tokens,
    }


def _balanced_figure(bench: Bench, job: Job, ours: list[dict], theirs: list[float], compute_s: float) -> Figure:
    ours_s, disk_s = (loads.median([run[key] for run in ours]) for key in ("wall_s", "disk_s"))
    made, theirs_s = job.rows * job.fewest_sweeps, loads.median(theirs)
    return Figure(
        what=f"balanced, {bench.scale.resident_bytes / 2**30:.2g} GiB resident, {job.rows} rows in flight, "
        f"{job.fewest_sweeps} steps each side; medians of {len(ours)} in turns",
        value=f"{ours_s:.1f} s, {job.new_tokens / ours_s:.1f} useful tokens/s; limit max(D {disk_s:.1f} s, C "
        f"{compute_s:.1f} s), {loads.limit_fraction(disk_s, compute_s, ours_s):.1%} reached",
        beside=f"accelerate {theirs_s:.1f} s, {job.new_tokens / theirs_s:.1f} useful tokens/s "
        f"({made / theirs_s:.1f} with those that nobody asked for)",
        ratio=loads.median([their_s / run["wall_s"] for their_s, run in zip(theirs, ours)]),
        target=BALANCED_TARGET,
    )


def _ragged(bench: Bench, engine: Worker, peer: Worker, drop: tuple[str, ...]) -> tuple[Figure, dict]:
    job = ragged_load(bench)
    opened = bench.open(engine, "few", job, bench.scale.resident_bytes)
    before = bench.probe()
    ours = bench.run(engine, "few", job, drop=drop)
    after = bench.probe()
    engine.ask("close", name="few")
    disk_bytes = opened["memory"]["disk"]["weights"]
    disk_s = disk_bytes * job.fewest_sweeps * 2 / (before["best"] + after["best"])
    limit_s = max(disk_s, bench.flops(job.processed_tokens, job.new_tokens) / bench.gemm(engine, job.prefill_tokens))
    bench.say(f"ragged: FlexMoE {ours['wall_s']:.1f} s in {ours['sweeps']} sweeps; limit {limit_s:.1f} s")
    theirs = _project(bench, peer, job, drop)
    best = min(theirs["projected_s"], key=theirs["projected_s"].__getitem__)
    how, theirs_s = "projected", theirs["projected_s"][best]
    if bench.full_peers:
        how, theirs_s = "measured in full", _all_batches(bench, peer, job, int(best), drop)
    sizes = ", ".join(f"{size}: {seconds:.0f} s" for size, seconds in theirs["projected_s"].items())
    figure = Figure(
        what=f"{job.rows} ragged prompts, {bench.scale.resident_bytes / 2**30:.2g} GiB resident; accelerate at its "
        "best batch",
        value=f"{ours['wall_s']:.1f} s, {job.new_tokens / ours['wall_s']:.1f} useful tokens/s; max(D {disk_s:.1f} s, "
        f"FLOPs / GEMM rate) = {limit_s:.1f} s",
        beside=f"accelerate {theirs_s:.0f} s, {job.new_tokens / theirs_s:.1f} useful tokens/s, batches of {best} by "
        f"length, {how} ({sizes}; from prefills of two sizes and {FEW_STEPS} steps of each batch size, scaled by "
        "padded tokens and steps)",
        ratio=theirs_s / ours["wall_s"],
        target=RAGGED_TARGET,
    )
    return figure, {"ours": ours, "before": before, "after": after, "limit_s": limit_s, "accelerate": theirs}


def _project(bench: Bench, peer: Worker, job: Job, drop: tuple[str, ...]) -> dict:
    """Seconds of the whole load for each batch size, from a few measured batches.

    A prefill is a line in its padded tokens: its reads and its products. Steps are measured at a short context, which
    is to the peer's favour.
    """
    vocab, scale = bench.arch.vocab_size, bench.scale
    largest, middle = max(scale.peer_batches), scale.peer_batches[1]
    long_job = loads.equal_job(rows=middle, prompt_len=scale.ragged_prompt, new_tokens=1, vocab=vocab, seed=7)
    short_len = max(4, scale.ragged_prompt // 32)
    short_job = loads.equal_job(rows=largest, prompt_len=short_len, new_tokens=1, vocab=vocab, seed=8)
    long_s = _batch(peer, long_job.prompts, 1, drop)
    prefills_s, steps_s = {}, {}
    for size in scale.peer_batches:
        prompts = short_job.prompts[:size]
        prefills_s[size] = _batch(peer, prompts, 1, drop)
        steps_s[size] = (_batch(peer, prompts, 1 + FEW_STEPS, drop) - prefills_s[size]) / FEW_STEPS
    fixed_s, token_s = loads.line_through(
        (short_job.prompt_tokens, prefills_s[largest]), (long_job.prompt_tokens, long_s)
    )
    projected = {
        str(size): sum(
            fixed_s + token_s * loads.padded_tokens(job, rows) + steps_s[size] * loads.batch_steps(job, rows)
            for rows in loads.batches(job, size, by_length=True)
        )
        for size in scale.peer_batches
    }
    bench.say(f"ragged: accelerate projected at {', '.join(f'{size}: {s:.0f} s' for size, s in projected.items())}")
    return {
        "projected_s": projected,
        "steps_s": steps_s,
        "prefills_s": prefills_s,
        "long_prefill_s": long_s,
        "prefill_fixed_s": fixed_s,
        "prefill_token_s": token_s,
    }


def _all_batches(bench: Bench, peer: Worker, job: Job, size: int, drop: tuple[str, ...]) -> float:
    total_s = 0.0
    for rows in loads.batches(job, size, by_length=True):
        total_s += _batch(peer, [job.prompts[i] for i in rows], loads.batch_steps(job, rows) + 1, drop)
        bench.say(f"ragged: accelerate {total_s:.0f} s so far")
    return total_s


def _batch(peer: Worker, prompts, new_tokens: int, drop: tuple[str, ...]) -> float:
    return peer.ask("generate", prompts=prompts, new_tokens=new_tokens, drop=drop)["wall_s"]
