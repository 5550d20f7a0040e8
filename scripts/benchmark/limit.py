"""FlexMoE against max(D, C): three classes of jobs with all experts on disk, and tokens/s against rows in flight."""

from __future__ import annotations

from scripts.benchmark import loads
from scripts.benchmark.context import Bench
from scripts.benchmark.record import Figure
from scripts.benchmark.worker import Worker

TARGETS = {"disk-bound": 0.90, "balanced": 0.85, "compute-bound": 0.90}
#: Of experts that are moved in groups.
SMALL_EXPERTS_TARGET = 0.85
RESIDENT_TARGET = 0.70
LARGEST_FRACTION = 1.03
EXPERTS_ON_DISK = "experts on disk"


def limit(bench: Bench) -> tuple[list[Figure], dict]:
    """Pairs of probes around a run, in each class; the job is sized anew for every pair, as disks drift."""
    figures, raw = [], {}
    with Worker("scripts.benchmark.engine") as engine:
        compute = bench.calibrate(engine)
        for kind in bench.scale.classes:
            pairs = measured_pairs(bench, engine, kind, compute)
            raw[kind] = {"pairs": pairs, "bare": _bare(bench, kind, pairs)}
            figures += _figures(kind, raw[kind], SMALL_EXPERTS_TARGET if bench.has_small_experts else TARGETS[kind])
    return figures, raw


def measured_pairs(bench: Bench, engine: Worker, kind: str, compute: loads.Compute) -> list[dict]:
    """Repeat until enough pairs count; those that do not are kept, with the reason."""
    pairs: list[dict] = []
    disk_rate = bench.probe()["best"]
    while sum(pair["counts"] for pair in pairs) < bench.scale.repeats and len(pairs) < 3 * bench.scale.repeats:
        job, pair = _pair(bench, engine, kind, disk_rate, compute, seed=len(pairs))
        pairs.append(pair)
        disk_rate = pair["after"]["best"]
        if "compute_s" in pair:
            compute = compute.corrected(job, pair["compute_s"])
        bench.say(f"{kind}: {_describe(pair)}")
    return pairs


def _pair(
    bench: Bench, engine: Worker, kind: str, disk_rate: float, compute: loads.Compute, seed: int
) -> tuple[loads.Job, dict]:
    """Probe, run, probe, and the same job with everything resident."""
    for _ in range(3):  # the disk may have drifted out of the class while the model was loaded
        sweep_s = bench.expert_bytes / disk_rate
        job = loads.size_job(
            kind, disk_s=sweep_s, compute=compute, run_s=bench.scale.run_s, vocab=bench.arch.vocab_size, seed=seed
        )
        bench.open(engine, "disk", job, EXPERTS_ON_DISK)
        before = bench.probe()
        disk_rate = before["best"]
        expected_s = bench.expert_bytes * job.fewest_sweeps / disk_rate
        if loads.in_class(kind, expected_s, compute.seconds(job)):
            break
        engine.ask("close", name="disk")
    else:
        bench.open(engine, "disk", job, EXPERTS_ON_DISK)
        before = bench.probe()
    result = bench.run(engine, "disk", job)
    after = bench.probe()
    engine.ask("close", name="disk")
    return job, _judge(bench, engine, kind, job, {"before": before, "after": after, **result})


def _judge(bench: Bench, engine: Worker, kind: str, job: loads.Job, pair: dict) -> dict:
    rate = (pair["before"]["best"] + pair["after"]["best"]) / 2
    pair |= {
        "rows": job.rows,
        "new_tokens": job.new_tokens,
        "processed_tokens": job.processed_tokens,
        "fewest_sweeps": job.fewest_sweeps,
        "disk_s": min(bench.expert_bytes * job.fewest_sweeps, pair["disk_bytes"]) / rate,
        "counts": False,
    }
    if not loads.probes_agree(pair["before"]["best"], pair["after"]["best"]):
        return pair | {"reason": "the probes differ by more than 20 %"}
    pair["compute_s"] = bench.resident_run(engine, job)["wall_s"]
    pair["gemm_flops_per_s"] = bench.gemm(engine, job.processed_tokens / job.fewest_sweeps)
    pair["of_gemm"] = bench.flops(job.processed_tokens, job.new_tokens) / pair["gemm_flops_per_s"] / pair["compute_s"]
    pair["fraction"] = loads.limit_fraction(pair["disk_s"], pair["compute_s"], pair["wall_s"])
    if not loads.in_class(kind, pair["disk_s"], pair["compute_s"]):
        return pair | {"reason": "D/C drifted out of the class"}
    if pair["fraction"] > LARGEST_FRACTION:
        return pair | {"reason": "it ran faster than its limit, so the machine was not the same for both"}
    return pair | {"counts": True}


def _describe(pair: dict) -> str:
    rates = f"disk {pair['before']['best'] / 1e9:.2f} then {pair['after']['best'] / 1e9:.2f} GB/s"
    run = (
        f"T {pair['wall_s']:.1f} s, {pair['sweeps']} sweeps (fewest {pair['fewest_sweeps']}), D {pair['disk_s']:.1f} s"
    )
    if "compute_s" in pair:
        run += f", C {pair['compute_s']:.1f} s ({pair['of_gemm']:.0%} of the GEMM rate)"
        run += f", limit reached {pair['fraction']:.1%}"
    return f"{run}, {rates}" + ("" if pair["counts"] else f"; does not count: {pair['reason']}")


def _bare(bench: Bench, kind: str, pairs: list[dict]) -> dict | None:
    """The loop without an engine, at the D and C of the last pair."""
    counted = [pair for pair in pairs if pair["counts"]]
    if not counted:
        return None
    last, arch = counted[-1], bench.arch
    with Worker("scripts.benchmark.bare") as bare:
        before = bench.probe()
        result = bare.ask(
            "run",
            paths=bench.shards,
            hidden=arch.hidden,
            ffn=arch.ffn,
            units=arch.num_layers * arch.num_experts,
            sweeps=last["fewest_sweeps"],
            threads=before["threads"],
            compute_s=last["compute_s"],
            calibrate_s=bench.scale.gemm_s,
        )
        after = bench.probe()
    rate = (before["best"] + after["best"]) / 2
    result |= {"before": before, "after": after, "disk_s": result["disk_bytes"] / rate}
    result["fraction"] = loads.limit_fraction(result["disk_s"], result["compute_s"], result["wall_s"])
    bench.say(
        f"{kind}, bare loop: T {result['wall_s']:.1f} s, D {result['disk_s']:.1f} s, C {result['compute_s']:.1f} s, "
        f"limit reached {result['fraction']:.1%}"
    )
    return result


def _figures(kind: str, raw: dict, target: float) -> list[Figure]:
    counted = [pair for pair in raw["pairs"] if pair["counts"]]
    if not counted:
        reasons = {pair["reason"] for pair in raw["pairs"]}
        nothing = f"none of {len(raw['pairs'])} pairs counts: {', '.join(sorted(reasons))}"
        return [Figure(what=f"{kind}, all experts on disk", value="-", beside=nothing, ratio=0.0, target=target)]
    disk_s, compute_s, wall_s, fraction, of_gemm = (
        loads.median([pair[key] for pair in counted])
        for key in ("disk_s", "compute_s", "wall_s", "fraction", "of_gemm")
    )
    ratios = [pair["disk_s"] / pair["compute_s"] for pair in counted]
    tokens = loads.median([pair["new_tokens"] / pair["wall_s"] for pair in counted])
    processed = loads.median([pair["processed_tokens"] / pair["wall_s"] for pair in counted])
    bare = raw["bare"]
    fractions = ", ".join(f"{pair['fraction']:.1%}" for pair in counted)
    return [
        Figure(
            what=f"{kind}, all experts on disk: max(D, C) / T, median of {len(counted)} ({fractions})",
            value=f"T {wall_s:.1f} s; {processed:.0f} tokens/s through the layers, {tokens:.1f} generated tokens/s",
            beside=f"D {disk_s:.1f} s, C {compute_s:.1f} s, D/C {min(ratios):.2f}-{max(ratios):.2f}; "
            f"a bare loop reaches {bare['fraction']:.1%} at D {bare['disk_s']:.1f} s, C {bare['compute_s']:.1f} s",
            ratio=fraction,
            target=target,
        ),
        Figure(
            what=f"{kind}: C against FLOPs / GEMM rate at that token count, median",
            value=f"C {compute_s:.1f} s",
            beside=f"GEMM {loads.median([p['gemm_flops_per_s'] for p in counted]) / 1e12:.3f} TFLOP/s",
            ratio=of_gemm,
            target=RESIDENT_TARGET,
        ),
    ]


def rows(bench: Bench) -> tuple[list[Figure], dict]:
    """Tokens/s against rows in flight: all experts on disk, equal short rows that start together."""
    points = []
    with Worker("scripts.benchmark.engine") as engine:
        for count in bench.scale.sizes:
            job = loads.equal_job(rows=count, prompt_len=8, new_tokens=8, vocab=bench.arch.vocab_size, seed=count)
            for _ in range(2):
                bench.open(engine, "disk", job, EXPERTS_ON_DISK)
                before = bench.probe()
                result = bench.run(engine, "disk", job)
                after = bench.probe()
                engine.ask("close", name="disk")
                if loads.probes_agree(before["best"], after["best"]):
                    break
            disk_s = bench.expert_bytes * job.fewest_sweeps * 2 / (before["best"] + after["best"])
            compute_s = bench.resident_run(engine, job)["wall_s"]
            points.append(
                {
                    "rows": count,
                    "tokens_per_s": job.new_tokens / result["wall_s"],
                    "wall_s": result["wall_s"],
                    "disk_s": disk_s,
                    "compute_s": compute_s,
                    "limit": job.new_tokens / max(disk_s, compute_s),
                    "read_bytes": result["disk_bytes"],
                    "before": before,
                    "after": after,
                }
            )
            bench.say(f"{count} rows: {points[-1]['tokens_per_s']:.2f} tokens/s, limit {points[-1]['limit']:.2f}")
    _plot(bench, points)
    return [_row_figure(point) for point in points], {"points": points}


def _row_figure(point: dict) -> Figure:
    return Figure(
        what=f"{point['rows']} rows in flight, 8 + 8 tokens, all at once, experts on disk",
        value=f"{point['tokens_per_s']:.2f} generated tokens/s",
        beside=f"limit {point['limit']:.2f} (D {point['disk_s']:.1f} s, C {point['compute_s']:.1f} s)",
        ratio=point["tokens_per_s"] / point["limit"],
    )


def _plot(bench: Bench, points: list[dict]) -> None:
    try:
        import matplotlib
    except ImportError:
        bench.say("matplotlib is not installed: no plot (pip install 'flexmoe[plot]', then --section rows)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = [point["rows"] for point in points]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.loglog(counts, [point["limit"] for point in points], "--", color="gray", label="limit max(D, C)")
    axes.loglog(counts, [point["tokens_per_s"] for point in points], "o-", label="FlexMoE")
    axes.set_xlabel("rows in flight")
    axes.set_ylabel("generated tokens/s, prefill included")
    axes.set_title("All experts on disk, 8 + 8 tokens")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(bench.plot, dpi=120)
    bench.say(f"plot: {bench.plot}")
