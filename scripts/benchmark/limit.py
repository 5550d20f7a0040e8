"""FlexMoE against max(D, C): three classes of jobs with all experts on disk, and tokens/s against rows in flight."""

from __future__ import annotations

from scripts.benchmark import loads
from scripts.benchmark.context import Bench
from scripts.benchmark.record import Figure
from scripts.benchmark.worker import Worker
from scripts.support.stolen import Stolen, most_stolen, stolen_by_reads, wait_for_calm

TARGETS = {"disk-bound": 0.97, "balanced": 0.90, "compute-bound": 0.95}
RESIDENT_TARGET = 0.75
LARGEST_FRACTION = 1.03
#: The longest wait for a calm machine before a round.
CALM_S = 30.0
EXPERTS_ON_DISK = "experts on disk"


def limit(bench: Bench) -> tuple[list[Figure], dict]:
    """Rounds of a run beside its two limits, in each class; the job is sized anew for every round, as machines drift."""
    figures, raw = [], {}
    with Worker("scripts.benchmark.processes.engine") as engine:
        compute = bench.calibrate(engine)
        for kind in bench.scale.classes:
            rounds = measured_rounds(bench, engine, kind, compute)
            raw[kind] = {"rounds": rounds, "bare": _bare(bench, kind, rounds)}
            figures += _figures(kind, raw[kind], TARGETS[kind])
    return figures, raw


def measured_rounds(bench: Bench, engine: Worker, kind: str, compute: loads.Compute) -> list[dict]:
    """Repeat until enough rounds count; those that do not are kept, with the reason."""
    rounds: list[dict] = []
    disk = bench.probe()
    rate = disk["best"]
    while sum(one["counts"] for one in rounds) < bench.scale.repeats and len(rounds) < 3 * bench.scale.repeats:
        sweep_s = bench.expert_bytes / rate
        job = loads.size_job(
            kind,
            disk_s=sweep_s,
            compute=compute,
            run_s=bench.scale.run_s,
            vocab=bench.arch.vocab_size,
            seed=len(rounds),
        )
        one = _judged(bench, engine, kind, job, _round(bench, engine, job, disk))
        rounds.append(one)
        rate, compute = one["read_bytes"] / one["disk_s"], compute.corrected(job, one["compute_s"])
        bench.say(f"{kind}: {_describe(one)}")
    return rounds


def _round(bench: Bench, engine: Worker, job: loads.Job, disk: dict) -> dict:
    """The run, its resident twin and the disk in turns; D has the bytes that were read while the run's seconds counted."""
    bench.open(engine, "disk", job, EXPERTS_ON_DISK)
    bench.open(engine, "resident", job, "resident")
    wait_for_calm(CALM_S)
    by_reads, stolen = stolen_by_reads(bench.workdir), Stolen()
    sweeps = bench.turns(engine, job, disk)
    share = stolen.share()
    for name in ("disk", "resident"):
        engine.ask("close", name=name)
    reads = list(zip(sweeps["read_bytes"], sweeps["disk_rates"], strict=True))
    return {
        "wall_s": sum(sweeps["streamed_s"]),
        "compute_s": sum(sweeps["resident_s"]),
        "disk_s": sum(min(bench.expert_bytes, read) / rate for read, rate in reads),
        "read_bytes": sum(min(bench.expert_bytes, read) for read, _ in reads),
        "stolen": share,
        "stolen_by_reads": by_reads,
        "sweeps": sweeps,
    }


def _judged(bench: Bench, engine: Worker, kind: str, job: loads.Job, one: dict) -> dict:
    one = one | {
        "rows": job.rows,
        "new_tokens": job.new_tokens,
        "processed_tokens": job.processed_tokens,
        "fewest_sweeps": job.fewest_sweeps,
        "gemm_flops_per_s": bench.gemm(engine, job.processed_tokens / job.fewest_sweeps),
        "fraction": loads.limit_fraction(one["disk_s"], one["compute_s"], one["wall_s"]),
    }
    flops = bench.flops(job.processed_tokens, job.new_tokens)
    one["of_gemm"] = flops / one["gemm_flops_per_s"] / one["compute_s"]
    one["reason"] = why_not(kind, one)
    return one | {"counts": not one["reason"]}


def why_not(kind: str, one: dict) -> str:
    """Why a round says nothing; empty where it does."""
    if one["stolen"] > most_stolen(one["stolen_by_reads"], one["disk_s"], one["wall_s"]):
        return f"{one['stolen']:.0%} of the cores' time went to other machines"
    if not loads.in_class(kind, one["disk_s"], one["compute_s"]):
        return "D/C drifted out of the class"
    if one["fraction"] > LARGEST_FRACTION:
        return "it ran faster than its limit, so the machine was not the same for both"
    return ""


def _describe(one: dict) -> str:
    return (
        f"T {one['wall_s']:.1f} s, {len(one['sweeps']['streamed_s'])} sweeps (fewest {one['fewest_sweeps']}), "
        f"D {one['disk_s']:.1f} s at {one['read_bytes'] / one['disk_s'] / 1e9:.2f} GB/s, "
        f"C {one['compute_s']:.1f} s ({one['of_gemm']:.0%} of the GEMM rate), limit reached {one['fraction']:.1%}"
        + (f"; does not count: {one['reason']}" if one["reason"] else "")
    )


def _bare(bench: Bench, kind: str, rounds: list[dict]) -> dict | None:
    """The loop without an engine, at the D and C of the last round."""
    counted = [one for one in rounds if one["counts"]]
    if not counted:
        return None
    last, arch = counted[-1], bench.arch
    with Worker("scripts.benchmark.processes.bare") as bare:
        before = bench.probe()
        result = bare.ask(
            "run",
            paths=bench.shards,
            hidden=arch.hidden,
            ffn=arch.ffn,
            expert_bytes=bench.expert_bytes // (arch.num_layers * arch.num_experts),
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
    counted = [one for one in raw["rounds"] if one["counts"]]
    if not counted:
        reasons = {one["reason"] for one in raw["rounds"]}
        nothing = f"none of {len(raw['rounds'])} rounds counts: {', '.join(sorted(reasons))}"
        return [Figure(what=f"{kind}, all experts on disk", value="-", beside=nothing, ratio=0.0, target=target)]
    disk_s, compute_s, wall_s, fraction, of_gemm = (
        loads.median([one[key] for one in counted]) for key in ("disk_s", "compute_s", "wall_s", "fraction", "of_gemm")
    )
    ratios = [one["disk_s"] / one["compute_s"] for one in counted]
    tokens = loads.median([one["new_tokens"] / one["wall_s"] for one in counted])
    processed = loads.median([one["processed_tokens"] / one["wall_s"] for one in counted])
    bare = raw["bare"]
    fractions = ", ".join(f"{one['fraction']:.1%}" for one in counted)
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
            beside=f"GEMM {loads.median([one['gemm_flops_per_s'] for one in counted]) / 1e12:.3f} TFLOP/s",
            ratio=of_gemm,
            target=RESIDENT_TARGET,
        ),
    ]


def rows(bench: Bench) -> tuple[list[Figure], dict]:
    """Tokens/s against rows in flight: all experts on disk, equal short rows that start together."""
    points = []
    with Worker("scripts.benchmark.processes.engine") as engine:
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
