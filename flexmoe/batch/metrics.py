"""What a run has measured, as `--metrics-json` has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cost_model.simulation.simulate import Simulation
from flexmoe.engine.engine import Engine
from flexmoe.job.identity import versions

# What a start that found nothing to run has to say, by kind.
_NUMBERS = (
    "elapsed_time",
    "num_requests",
    "total_num_tokens",
    "requests_per_second",
    "tokens_per_second",
    "sweeps",
    "wall_s",
    "prompt_tokens",
    "generated_tokens",
    "run_tokens",
    "computed_tokens",
    "prefill_s",
    "decode_s",
    "decode_only_tokens",
    "mean_rows_in_flight",
    "most_rows_in_flight",
    "restarts",
    "weights_stall_s",
    "prefill_tokens",
    "decode_tokens",
    "padding_fraction",
    "peak_gpu_bytes",
)
_OF_SWEEPS = (
    "rows_in_flight",
    "tokens_per_sweep",
    "generated_tokens_per_sweep",
    "prompt_tokens_per_sweep",
    "sweep_s",
)
_OF_PARTS = ("lanes", "memory", "moved_bytes", "peak_bytes", "expert_cache", "prefix_cache")
_OF_ENGINE = (
    "predicted",
    "drift",
    "asked_weight_percent",
    "achieved_weight_percent",
    "asked_cache_percent",
    "achieved_cache_percent",
    "policy",
    "workload",
    "device",
    "dtype",
)


def metrics_record(
    metrics: Mapping[str, Any],
    engine: Engine,
    rows_ok: int,
    rows_failed: int,
    rows_resumed: int = 0,
    predicted: Simulation | None = None,
    drift: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `--metrics-json`: vLLM's throughput keys, then ours.

    Args:
        rows_resumed: rows that an earlier start had finished; requests, tokens and rates are those of this one alone.
        predicted: what the cost model said of this run.
        drift: what was found to be faster or slower than measured, as `flexmoe.planning.drift.drift_record` makes it.
    """
    wall = max(metrics["wall_s"], 1e-9)
    total, rows_run = metrics["prompt_tokens"] + metrics["generated_tokens"], rows_ok + rows_failed - rows_resumed
    return {
        "elapsed_time": wall,
        "num_requests": rows_run,
        "total_num_tokens": total,
        "requests_per_second": rows_run / wall,
        "tokens_per_second": total / wall,
        "rows_ok": rows_ok,
        "rows_failed": rows_failed,
        "rows_resumed": rows_resumed,
        **metrics,
        **phases(metrics),
        "padding_fraction": padding_fraction(metrics),
        "moved_bytes": {lane: totals["bytes"] for lane, totals in metrics["lanes"].items()},
        "peak_bytes": peak_bytes(metrics, engine),
        "predicted": None if predicted is None else predicted_metrics(predicted),
        "drift": drift,
        "peak_process_bytes": peak_process_bytes(),
        "peak_gpu_bytes": peak_gpu_bytes(engine),
        "asked_weight_percent": list(engine.plan.asked_weight_percent),
        "achieved_weight_percent": list(engine.plan.allocation.placement.achieved_percent),
        "asked_cache_percent": list(engine.plan.asked_cache_percent),
        "achieved_cache_percent": list(engine.plan.achieved_cache_percent),
        "policy": asdict(engine.config.policy),
        "workload": engine.config.workload.to_json(),
        "device": str(engine.device.torch),
        "dtype": str(engine.plan.dtype),
        "versions": versions(),
    }


def finished_record(rows_ok: int, rows_failed: int, rows_resumed: int) -> dict[str, Any]:
    """The same of a start that found nothing to run: the same keys, with nothing done, and null where no engine was made."""
    rows = {"rows_ok": rows_ok, "rows_failed": rows_failed, "rows_resumed": rows_resumed}
    record: dict[str, Any] = dict.fromkeys(_NUMBERS, 0)
    record |= {name: [] for name in _OF_SWEEPS} | {name: {} for name in _OF_PARTS}
    record |= dict.fromkeys(_OF_ENGINE) | rows
    return record | {"peak_process_bytes": peak_process_bytes(), "versions": versions()}


def phases(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens and seconds of prefill and decode. With a rolling schedule they share sweeps: a sweep into which prompt tokens
    entered counts as prefill, and the tokens that other rows generated in it are decode tokens all the same."""
    return {
        "prefill_tokens": metrics["prompt_tokens"],
        "prefill_s": metrics["prefill_s"],
        "decode_tokens": metrics["generated_tokens"],
        "decode_s": metrics["decode_s"],
    }


def padding_fraction(metrics: Mapping[str, Any]) -> float:
    """Share of the positions that went through the layers which belonged to no row."""
    computed = metrics["computed_tokens"]
    return (computed - metrics["run_tokens"]) / computed if computed else 0.0


def peak_bytes(metrics: Mapping[str, Any], engine: Engine) -> dict[str, int]:
    """Most bytes held in each tier: measured where the system tells, else what was planned (and is never exceeded)."""
    planned = {tier: items["planned_bytes"] for tier, items in metrics["memory"].items()}
    if engine.device.is_cuda:
        return planned | {"gpu": peak_gpu_bytes(engine), "cpu": peak_process_bytes()}
    return planned | {"gpu+cpu": peak_process_bytes()}


def peak_gpu_bytes(engine: Engine) -> int:
    """Most bytes that torch held on the GPU; on device cpu the planned GPU tier."""
    if engine.device.is_cuda:
        return torch.cuda.max_memory_reserved(engine.device.torch)
    return engine.plan.memory.total("gpu")


def peak_process_bytes() -> int:
    """Peak resident memory of this process (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def predicted_metrics(predicted: Simulation) -> dict[str, Any]:
    """The prediction by the names that the measured values have in ``--metrics-json``."""
    return {
        "wall_s": predicted.job_s,
        "generated_tokens_per_s": predicted.tokens_per_s,
        "sweeps": predicted.sweeps,
        "lanes": {lane: {"busy_s": seconds} for lane, seconds in sorted(predicted.lanes_s.items())},
        "peak_bytes": {tier: predicted.memory.total(tier) for tier in predicted.memory.parts},
    }
