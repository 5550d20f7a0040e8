"""The end of a run in five lines: rows, speed, time, memory, and what the time went to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cost_model.simulation.simulate import Simulation
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.job.result import JobResult
from flexmoe.planning.drift import Drift
from policies.common.memory_units import in_units

_MINUTE_S, _HOUR_S = 60.0, 3600.0
#: A lane that is busy for less of the time than this decides nothing.
_DECIDES = 0.5
#: What each lane does, and what would shorten it.
_LANES = {
    "disk_read": ("reading from the disk", "a faster drive, or more --cpu-mem or --gpu-mem to keep weights in,"),
    "disk_write": ("writing to the disk", "a faster drive, or more --cpu-mem to keep KV cache in,"),
    "h2d": ("copying to the GPU tier", "more --gpu-mem, or a faster link,"),
    "d2h": ("copying from the GPU tier", "more --gpu-mem, or a faster link,"),
    "gpu": ("computing", "a faster device, or more memory for more rows at once,"),
    "cpu": ("attention on the CPU", "more --gpu-mem to keep KV cache in, or faster host memory,"),
}


def result_lines(result: JobResult) -> list[str]:
    """What became of the rows, and where they are."""
    lines = ["this job is finished already (--overwrite does it again)"] if result.was_finished else []
    lines.append(f"rows: {result.rows_ok} ok, {result.rows_failed} failed; completions: {result.output_path}")
    return lines + ([f"failed rows: {result.error_path}"] if result.error_path else [])


def note_lines(result: JobResult) -> list[str]:
    """What the user may not expect of the answers."""
    return [] if result.note is None else [f"note: {result.note}"]


def summary_lines(metrics: Mapping[str, Any], plan: EnginePlan, predicted: Simulation | None) -> list[str]:
    """Speed, time, memory and bottleneck of what ran.

    Args:
        metrics: as `flexmoe.batch.metrics` makes them.
        predicted: what the planner expected.
    """
    return [
        _speed(metrics),
        _time(metrics, predicted),
        *_prefixes(metrics),
        *_drift(metrics),
        _memory(metrics, plan),
        bottleneck(metrics),
    ]


def bottleneck(metrics: Mapping[str, Any]) -> str:
    """The lane that was busy longest, and what would help most."""
    if not metrics["lanes"]:
        return "bottleneck: none, as nothing ran"
    wall_s = max(metrics["wall_s"], 1e-9)
    lane, busy_s = max(((lane, t["busy_s"]) for lane, t in metrics["lanes"].items()), key=lambda each: each[1])
    share = min(1.0, busy_s / wall_s)
    what, remedy = _LANES[lane]
    if share < _DECIDES:
        return (
            f"bottleneck: none of the lanes ({what} was busy longest, {100 * share:.0f} % of the time), so they wait for "
            "each other; more rows at once would help most"
        )
    return f"bottleneck: {what}, busy {100 * share:.0f} % of the time; {remedy} would help most"


def _speed(metrics: Mapping[str, Any]) -> str:
    wall_s = max(metrics["wall_s"], 1e-9)
    generated, prompt = (metrics[name] / wall_s for name in ("generated_tokens", "prompt_tokens"))
    rates = [f"{generated:.2f} generated tokens/s"] if metrics["generated_tokens"] else []
    rates.append(f"{prompt:.2f} prompt tokens/s")
    rows = f"{metrics['mean_rows_in_flight']:.0f} rows at once on average"
    return f"speed: {' and '.join(rates)}, {rows}"


def _time(metrics: Mapping[str, Any], predicted: Simulation | None) -> str:
    generated, prompt = metrics["generated_tokens"], metrics["prompt_tokens"]
    wall_s = metrics["wall_s"]
    expected = ""
    if predicted is not None:
        off = 100 * (predicted.job_s / wall_s - 1) if wall_s else 0.0
        expected = f"; predicted: {elapsed(predicted.job_s)} ({off:+.0f} %)"
    return f"time: {elapsed(wall_s)} for {generated} generated and {prompt} prompt tokens, without loading{expected}"


def _prefixes(metrics: Mapping[str, Any]) -> list[str]:
    """What rows found that others had computed, where they found anything."""
    found = metrics.get("prefix_cache")  # none where nothing ran
    if not found or not found["saved_tokens"]:
        return []
    return [
        f"prefixes: {found['saved_tokens']} of {found['needed_tokens']} tokens that rows entered with were computed for others "
        f"already, {100 * found['hit_rate']:.1f} %"
    ]


def _drift(metrics: Mapping[str, Any]) -> list[str]:
    """What the run found otherwise than it was measured, and what was to be expected with that."""
    drift, wall_s = metrics.get("drift"), metrics["wall_s"]
    if not drift:
        return []
    found, expected_s = " and ".join(str(Drift(**lane)) for lane in drift["lanes"]), drift["predicted_wall_s"]
    return [f"drift: {found}; predicted with that: {elapsed(expected_s)} ({100 * (expected_s / wall_s - 1):+.0f} %)"]


def _memory(metrics: Mapping[str, Any], plan: EnginePlan) -> str:
    tiers = []
    for tier in plan.memory.parts:
        budget = plan.budgets.get(tier)
        of = "" if budget is None else f" of {in_units(budget)}"
        tiers.append(f"{tier} {in_units(plan.memory.total(tier))}{of}")
    return f"memory: {', '.join(tiers)}; the whole process at most {in_units(metrics['peak_process_bytes'])}"


def elapsed(seconds: float) -> str:
    """``12.3 s``, ``5.2 minutes`` or ``3.10 hours``."""
    if seconds < 2 * _MINUTE_S:
        return f"{seconds:.1f} s"
    if seconds < 2 * _HOUR_S:
        return f"{seconds / _MINUTE_S:.1f} minutes"
    return f"{seconds / _HOUR_S:.2f} hours"
