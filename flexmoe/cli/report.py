"""What a run tells: the lines a person reads, and the JSON of `--metrics-json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from flexmoe.engine.engine import Engine
from flexmoe.errors import StorageError
from flexmoe.job.versions import versions
from policies.common.memory_units import GIB

# What a start that found nothing to run has to say, by kind.
_NUMBERS = (
    "elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second", "sweeps", "wall_s",
    "prompt_tokens", "generated_tokens", "run_tokens", "computed_tokens", "prefill_s", "decode_s", "decode_only_tokens",
    "mean_rows_in_flight", "most_rows_in_flight", "restarts", "weights_stall_s", "prefill_tokens", "decode_tokens",
    "padding_fraction", "peak_gpu_bytes",
)  # fmt: skip
_OF_SWEEPS = (
    "rows_in_flight", "tokens_per_sweep", "generated_tokens_per_sweep", "prompt_tokens_per_sweep", "sweep_s",
)  # fmt: skip
_OF_PARTS = ("lanes", "memory", "moved_bytes", "peak_bytes", "expert_cache")
_OF_ENGINE = ("predicted", "achieved_weight_percent", "policy", "workload", "device", "dtype")


def lane_lines(metrics: dict) -> list[str]:
    """Bytes of every lane with the rate over the run and while busy (busy time adds up the lane's workers)."""
    wall = max(metrics["wall_s"], 1e-9)
    lines = []
    for lane, t in sorted(metrics["lanes"].items()):
        moved = ""
        if t["bytes"]:
            busy = t["bytes"] / 1e9 / max(t["busy_s"], 1e-9)
            moved = f"{t['bytes'] / 1e9:.3f} GB, {t['bytes'] / 1e9 / wall:.2f} GB/s over the run, {busy:.2f} GB/s a worker; "
        lines.append(f"lane {lane:>10}: {moved}busy {t['busy_s']:.2f} s in {wall:.2f} s")
    return lines


def throughput_lines(metrics: dict) -> list[str]:
    """Tokens per second with the denominator named."""
    wall = max(metrics["wall_s"], 1e-9)
    generated, prompt = metrics["generated_tokens"], metrics["prompt_tokens"]
    return [
        f"end to end: {generated / wall:.2f} generated token/s = {generated} tokens / {wall:.2f} s (prefill and decode; "
        f"loading excluded), {prompt / wall:.2f} prompt token/s",
        f"sweeps: {metrics['sweeps']}, rows in flight: mean {metrics['mean_rows_in_flight']:.1f}, "
        f"most {metrics['most_rows_in_flight']}",
    ]


def cache_lines(metrics: dict) -> list[str]:
    """What the expert cache did, where experts came on demand."""
    cache = metrics["expert_cache"]
    if not cache["on_demand_sweeps"]:
        return []
    return [
        f"experts on demand in {cache['on_demand_sweeps']} of {metrics['sweeps']} sweeps: {cache['lookups']} asked for, "
        f"{100 * cache['hit_rate']:.1f} % at hand ({cache['policy']}, room for {cache['experts']}), {cache['loads']} loads of "
        f"{1e3 * cache['mean_load_s']:.1f} ms, {cache['evictions']} evictions"
    ]


def flexllmgen_lines(metrics: dict, engine: Engine, rows: int, gen_len: int, cut_gen_len: int | None) -> list[str]:
    """FlexLLMGen's summary of a benchmark.

    Sweeps in which prompt tokens entered count as prefill (with the rolling schedule other rows decode in them), the
    others as decode. With ``cut_gen_len`` the decode latency is projected to ``gen_len`` tokens from those that ran.
    """
    prefill_s, decode_s = metrics["prefill_s"], metrics["decode_s"]
    decode_rate = metrics["decode_only_tokens"] / decode_s if decode_s else 0.0
    note = ""
    if cut_gen_len:
        decode_s *= (gen_len - 1) / max(1, cut_gen_len - 1)
        note = " (projected)"
    total_s = max(prefill_s + decode_s, 1e-9)
    memory = metrics["memory"].values()
    cache = sum(tier.get("kv", 0) for tier in memory)
    hidden = sum(tier.get("activations", 0) for tier in memory)
    return [
        f"model size: {engine.model.arch.total_bytes / GIB:.3f} GB\tcache size: {cache / GIB:.3f} GB\t"
        f"hidden size (prefill): {hidden / GIB:.3f} GB",
        f"peak gpu mem: {peak_gpu_bytes(engine) / GIB:.3f} GB",
        f"prefill latency: {prefill_s:.3f} s\tprefill throughput: {metrics['prompt_tokens'] / max(prefill_s, 1e-9):.3f} token/s",
        f"decode latency: {decode_s:.3f} s{note}\tdecode throughput: {decode_rate:.3f} token/s{note}",
        f"total latency: {total_s:.3f} s{note}\ttotal throughput: {rows * gen_len / total_s:.3f} token/s{note}",
    ]


def peak_gpu_bytes(engine: Engine) -> int:
    """Most bytes that torch held on the GPU; on device cpu the planned GPU tier."""
    if engine.device.is_cuda:
        import torch

        return torch.cuda.max_memory_reserved(engine.device.torch)
    return engine.plan.memory.total("gpu")


def peak_process_bytes() -> int:
    """Peak resident memory of this process (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def metrics_record(
    metrics: dict,
    engine: Engine,
    rows_ok: int,
    rows_failed: int,
    rows_resumed: int = 0,
    predicted: Mapping | None = None,
) -> dict:
    """The content of `--metrics-json`: vLLM's throughput keys, then ours.

    Args:
        rows_resumed: rows that an earlier start had finished; requests, tokens and rates are those of this one alone.
        predicted: what a planner said of this run, by the names of the measured values.
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
        "predicted": predicted and dict(predicted),
        "peak_process_bytes": peak_process_bytes(),
        "peak_gpu_bytes": peak_gpu_bytes(engine),
        "achieved_weight_percent": list(engine.plan.allocation.placement.achieved_percent),
        "policy": asdict(engine.config.policy),
        "workload": engine.config.workload.to_json(),
        "device": str(engine.device.torch),
        "dtype": str(engine.plan.dtype),
        "versions": versions(),
    }


def finished_record(rows_ok: int, rows_failed: int, rows_resumed: int) -> dict:
    """The same of a start that found nothing to run: the same keys, with nothing done, and null where no engine was made."""
    rows = {"rows_ok": rows_ok, "rows_failed": rows_failed, "rows_resumed": rows_resumed}
    record = dict.fromkeys(_NUMBERS, 0) | {name: [] for name in _OF_SWEEPS} | {name: {} for name in _OF_PARTS}
    record |= dict.fromkeys(_OF_ENGINE) | rows
    return record | {"peak_process_bytes": peak_process_bytes(), "versions": versions()}


def phases(metrics: dict) -> dict:
    """Tokens and seconds of prefill and decode. With a rolling schedule they share sweeps: a sweep into which prompt tokens
    entered counts as prefill, and the tokens that other rows generated in it are decode tokens all the same."""
    return {
        "prefill_tokens": metrics["prompt_tokens"],
        "prefill_s": metrics["prefill_s"],
        "decode_tokens": metrics["generated_tokens"],
        "decode_s": metrics["decode_s"],
    }


def padding_fraction(metrics: dict) -> float:
    """Share of the positions that went through the layers which belonged to no row."""
    computed = metrics["computed_tokens"]
    return (computed - metrics["run_tokens"]) / computed if computed else 0.0


def peak_bytes(metrics: dict, engine: Engine) -> dict[str, int]:
    """Most bytes held in each tier: measured where the system tells, else what was planned (and is never exceeded)."""
    planned = {tier: items["planned_bytes"] for tier, items in metrics["memory"].items()}
    if engine.device.is_cuda:
        return planned | {"gpu": peak_gpu_bytes(engine), "cpu": peak_process_bytes()}
    return planned | {"gpu+cpu": peak_process_bytes()}


def write_json(path: Path, record: dict) -> None:
    """Write a JSON file under its final name only when it is complete.

    Raises:
        StorageError: the directory cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {e.strerror}") from e
