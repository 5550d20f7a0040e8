"""What a validation prints and writes: predicted beside measured, per lane and whole, and the summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scripts.validation.looks import TOKENS

MEAN_TARGET, WORST_TARGET = 0.08, 0.20
_LANES = ("gpu", "cpu", "h2d", "d2h", "disk_read", "disk_write")


def lines(result: dict) -> list[str]:
    """One configuration: what it is, its whole-job times, and its lanes' busy seconds (predicted/measured)."""
    p, m = result["policy"], result["median"]
    shares = "/".join(f"{p[k]:.0f}" for k in p if k.endswith("_percent") and k != "cpu_attention_percent")
    disk, cores = m["disk_bytes_per_s"] / 1e9, " ".join(f"{speed:.2f}" for speed in m["cores_against_probe"])
    return [
        f"{result['name']:<12} {result['model']:<6} {p['gpu_batch_size']} x {p['num_gpu_batches']} {p['schedule']}, {shares}, "
        f"CPU attention {p['cpu_attention_percent']:.0f}, prefill {p['prefill_tokens']}, {result['rows']} rows of "
        f"{result['prompt_len']} + {result['gen_len']}",
        f"{'':<13}predicted {m['predicted_s']:.2f} s, measured {m['measured_s']:.2f} s: {100 * result['error']:+.1f} % "
        f"({100 * result['error_as_probed']:+.1f} % as probed); sweeps {m['sweeps'][1]:.0f}/{m['sweeps'][0]}; "
        f"disk {disk:.2f} GB/s, memory {m['memory_against_probe']:.2f} and cores {cores} of the probe's; runs "
        + " ".join(f"{r['measured_s']:.2f}{'' if r['clean'] else ' (disturbed)'}" for r in result["runs"]),
        f"{'':<13}" + ", ".join(f"{lane} {m['lanes_s'][lane][1]:.2f}/{m['lanes_s'][lane][0]:.2f} s" for lane in _LANES),
    ]


def summary(results: Sequence[dict]) -> dict:
    """Errors of whole-job time over all configurations and by kind."""
    errors = [abs(r["error"]) for r in results]
    mean, worst = sum(errors) / len(errors), max(errors)
    kinds = {}
    for kind in dict.fromkeys(r["kind"] for r in results):
        of_kind = [r["error"] for r in results if r["kind"] == kind]
        kinds[kind] = {
            "runs": len(of_kind),
            "mean_abs": sum(map(abs, of_kind)) / len(of_kind),
            "bias": sum(of_kind) / len(of_kind),
        }
    text = [
        f"{len(results)} configurations: mean absolute error of whole-job time {100 * mean:.1f} % (target "
        f"{100 * MEAN_TARGET:.0f}), worst {100 * worst:.1f} % (target {100 * WORST_TARGET:.0f})",
        *(
            f"  {name}: {c['runs']} configurations, mean {100 * c['mean_abs']:.1f} %, bias {100 * c['bias']:+.1f} %"
            for name, c in kinds.items()
        ),
    ]
    probed = [abs(r["error_as_probed"]) for r in results]
    text.append(
        f"  for the machine as probed, before its drift: mean {100 * sum(probed) / len(probed):.1f} %, worst "
        f"{100 * max(probed):.1f} %"
    )
    met = mean <= MEAN_TARGET and worst <= WORST_TARGET
    return {"mean_abs_error": mean, "worst_abs_error": worst, "kinds": kinds, "met": met, "text": "\n".join(text)}


def write(path: Path, record: dict) -> None:
    """The record as JSON, and as text to read beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = [
        "# Predicted against measured",
        "",
        "`python -m scripts.validate_cost_model`; seconds are predicted/measured, for the speeds found between the sweeps. Those of",
        f"cores are of products of {', '.join(map(str, TOKENS))} tokens. The disk is read with O_DIRECT (page cache bypassed).",
        f"Machine: {record['machine']['cpu']}, {record['machine']['cores']} cores; torch {record['versions']['torch']}.",
        "",
        "```",
        *(line for result in record["results"] for line in lines(result)),
        *(f"{name}: {found['text']}" for name, found in record["summaries"].items()),
        "```",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")
