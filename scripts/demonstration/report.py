"""What the demo tells after its run: some answers, where things live and why, the prediction beside the run, both traces in one."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from cost_model.simulation.simulate import Simulation
from policies.common.memory_units import GIB, MIB

TIERS = {"gpu": "gpu_mem", "cpu": "cpu_mem", "disk": "nvme_mem"}
#: Lanes that are busy for less do not show.
LEAST_S = 0.005
MEASURED, PREDICTED = 1, 2


def answers(requests: Sequence[Mapping], completions: Sequence[Mapping]) -> list[str]:
    """Requests as they were asked, each with what came of it."""
    found = {row["custom_id"]: row["response"]["body"]["choices"][0] for row in completions}
    lines = []
    for request in requests:
        choice = found[request["custom_id"]]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        more = " […]" if choice["finish_reason"] == "length" else ""
        lines += [*_paragraph("Q: ", _asked(request)), *_paragraph("A: ", text.strip() + more), ""]
    return [*lines, f"{len(requests)} of {len(completions)} answers. […]: cut at the request's max_tokens"]


def _asked(request: Mapping) -> str:
    body = request.get("body", request)
    prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return textwrap.shorten(prompt, 200, placeholder=" …") if isinstance(prompt, str) else f"({len(prompt)} token ids)"


def _paragraph(mark: str, text: str) -> list[str]:
    """Lines of at most 100 characters, with those of the text kept."""
    lines = [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, 97) or [""]]
    return [f"{' ' * len(mark) if i else mark}{line}".rstrip() for i, line in enumerate(lines)]


def planned(metrics: Mapping, budgets: Mapping[str, float]) -> list[str]:
    """Bytes of every tier, and why all three are used.

    Args:
        metrics: the content of `--metrics-json`.
        budgets: GiB by flag.
    """
    memory = metrics["memory"]
    on_cuda = metrics["device"].startswith("cuda")
    role = " (allowed on the gpu: with CUDA's context)" if on_cuda else " (gpu: RAM in that role)"
    process = memory["cpu"].get("process", 0)
    rows = [f"planned, in MiB{role}", _row("", "weights", "KV cache", "buffers", "all", "allowed")]
    for tier, flag in TIERS.items():
        weights, kv = (memory[tier].get(item, 0) for item in ("weights", "kv"))
        total = memory[tier]["planned_bytes"] - (0 if on_cuda else memory[tier].get("process", 0))
        sizes = (weights, kv, total - weights - kv, total, budgets[flag] * GIB)
        rows.append(_row(tier, *(f"{size / MIB:.1f}" for size in sizes)))
    weights, kv = (sum(memory[tier].get(item, 0) for tier in TIERS) for item in ("weights", "kv"))
    parts = f"{weights / MIB:.0f} MiB of weights, {kv / MIB:.0f} MiB of KV cache and the buffers"
    read = f"{memory['disk'].get('weights', 0) / MIB:.0f} MiB of weights"
    return [
        *rows,
        f"the process itself takes {process / MIB:.0f} MiB, {'which the cpu row includes' if on_cuda else 'beside that'};",
        f"{parts} are more than gpu and cpu may take together:",
        f"the disk holds the rest, and every sweep reads {read} from it, beside the computation.",
        f"Up to {metrics['most_rows_in_flight']} rows share a sweep.",
    ]


def compared(metrics: Mapping, predicted: Simulation) -> list[str]:
    """Predicted and measured seconds: of the whole job, and in which each lane was at work."""
    measured_s = metrics["wall_s"]
    off = 100 * (predicted.job_s / measured_s - 1)
    rows = [
        _row("seconds", "predicted", "measured"),
        _row("whole job", f"{predicted.job_s:.2f}", f"{measured_s:.2f}") + f"   the prediction is off by {off:+.1f} %",
    ]
    for lane, predicted_s in predicted.lanes_s.items():
        busy_s = metrics["lanes"].get(lane, {}).get("busy_s", 0.0)
        if max(predicted_s, busy_s) >= LEAST_S:
            rows.append(_row(f"  {lane}", f"{predicted_s:.2f}", f"{busy_s:.2f}"))
    return [
        *rows,
        "(its rates were measured once: a machine that is busier or idler by now is slower or faster than predicted)",
    ]


def _row(name: str, *cells: str) -> str:
    return f"  {name:<12}" + "".join(f"{cell:>11}" for cell in cells)


def under_compute_percent(trace: Mapping) -> float:
    """Share of the time of all disk reads that lies inside spans of the compute lane."""
    spans = _spans(trace)
    compute = sorted((a, b) for lane, a, b in spans if lane == "gpu")
    reads = [(a, b) for lane, a, b in spans if lane.startswith("disk_read")]
    covered = sum(max(0.0, min(b, d) - max(a, c)) for a, b in reads for c, d in compute if c < b and d > a)
    return 100 * covered / max(1e-9, sum(b - a for a, b in reads))


def put_beside(measured: Path, predicted: Path) -> None:
    """Put the tracks of a predicted Chrome trace below those of the measured one, into its file.

    Both begin to compute at the same time.
    """
    above, below = (json.loads(path.read_text(encoding="utf-8")) for path in (measured, predicted))
    shift = _first_compute(above) - _first_compute(below)
    events = [_process(MEASURED, "measured"), _process(PREDICTED, "predicted")]
    events += [event | {"pid": MEASURED} for event in above["traceEvents"]]
    for event in below["traceEvents"]:
        moved = {"ts": event["ts"] + shift} if "ts" in event else {}
        events.append(event | {"pid": PREDICTED} | moved)
    measured.write_text(json.dumps(above | {"traceEvents": events}), encoding="utf-8")


def _process(pid: int, name: str) -> dict:
    return {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}


def _first_compute(trace: Mapping) -> float:
    return min((start for lane, start, _ in _spans(trace) if lane == "gpu"), default=0.0)


def _spans(trace: Mapping) -> list[tuple[str, float, float]]:
    """(lane, start, end) of every span, in microseconds."""
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    return [(names[e["tid"]], e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"]
