"""Is the memory plan true? Runs at their planned size, and what each process held at most beside what was planned for it.

``python -m scripts.validation.memory``: drawn jobs of mixed lengths over three tiers, two models, bf16 and float32; half of the
policies are drawn, half are planned within a drawn limit. With ``--shared`` all prompts of a run begin alike. Each run is
told to keep to its planned size (``--memory-limit``) and runs under a resource limit (RLIMIT_DATA) of that size and what is
mapped without being touched, stacks of threads above all: an allocation beyond it fails, as in a container. Nothing here is
timed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch

from cost_model.hardware.hardware import Hardware
from flexmoe.probing.facts import process_bytes
from flexmoe.system.device import Device
from policies.common.memory_units import GIB, MIB
from scripts.benchmark.probes import machine, versions
from scripts.make_checkpoint import SIZES, make_checkpoint

MODELS = {
    "small": {**SIZES["demo"], "num_hidden_layers": 6, "intermediate_size": 1792, "vocab_size": 16000},
    "many": {**SIZES["qwen3-like"], "num_hidden_layers": 4},
}
#: Mapped and never touched (`flexmoe.system.memory`); and the step to which the memory of a process is rounded.
UNTOUCHED_BYTES, STEP_BYTES = 128 * MIB, 32 * MIB
ROWS, PROMPTS, COMPLETIONS = (16, 48), (8, 256), (4, 16)
#: Of a drawn limit, beside what the probe finds for a process on this machine (a plan has a fifth of a GiB more for it).
BESIDE_GIB = (0.35, 0.7)
_PLANNED = re.compile(r"^memory +(gpu|cpu): ([\d.]+) GiB", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One run: its model, its dtype, its flags, its rows as (prompt, completion) tokens, and the tokens that all prompts begin
    with before those."""

    model: str
    dtype: str
    flags: tuple[str, ...]
    rows: tuple[tuple[int, int], ...]
    shared: int

    @property
    def is_planned(self) -> bool:
        """Whether the planner chooses its policy."""
        return "--percent" not in self.flags


def main(argv: list[str] | None = None) -> int:
    """Run all; 1 where one was killed, failed or held more than was planned."""
    args = _arguments(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    for name, config in MODELS.items():
        if not (args.work / name / "config.json").exists():
            make_checkpoint(args.work / name, config)
    own = process_bytes(Device("cpu"), torch.bfloat16)
    hardware = args.work / "memory-machine.json"
    replace(Hardware.preset("cpu"), process_bytes=own, sources={}).save(hardware)  # its rates choose, and bound nothing
    rng, results = random.Random(args.seed), []
    for number in range(args.runs):
        result = _run(_draw(rng, number, args.shared, own), args.work, hardware)
        results.append(result)
        print(line(result), flush=True)
    command = f"python -m scripts.validation.memory --runs {args.runs} --shared {args.shared}"
    about = {"command": command, "machine": machine(), "versions": versions(), "seed": args.seed}
    record = {**about, "process_bytes": own, "results": results}
    met = all(r["exit_code"] == 0 and r["peak_bytes"] <= r["planned_bytes"] for r in results)
    if args.record:
        _write(args.record, record, met)
    return 0 if met else 1


def line(r: dict) -> str:
    """One run."""
    peak, planned = r["peak_bytes"], r["planned_bytes"]
    return (
        f"{r['model']:<6} {r['dtype']:<9} {'planned' if r['is_planned'] else 'drawn':<8} {r['rows']:>3} rows, {r['sweeps']:>4} sweeps: "
        f"planned {planned / GIB:.3f} GiB (process {r['process_bytes'] / GIB:.3f}), peak {peak / GIB:.3f} GiB, "
        f"{100 * peak / max(1, planned):.1f} %; exit code {r['exit_code']}, rows with an answer {r['rows_ok']}"
        + (f"; {r['saved_tokens']} of {r['needed_tokens']} tokens found" if r["shared"] else "")
    )


def _draw(rng: random.Random, number: int, shared: int, process: int) -> Drawn:
    count = rng.randint(*ROWS)
    rows = tuple((rng.randint(*rng.choice(((8, 24), PROMPTS))), rng.randint(*COMPLETIONS)) for _ in range(count))
    if number % 2:
        flags = ("--memory-limit", f"{process / GIB + rng.uniform(*BESIDE_GIB):.3f}")
    else:
        shares = [share for _ in range(3) for share in _shares(rng)]
        flags = ("--percent", *map(str, shares), "--gpu-batch-size", str(rng.choice((8, 16))), "--num-gpu-batches", "2")
    model, dtype = sorted(MODELS)[number // 2 % 2], ("bfloat16", "float32")[number // 4 % 2]
    return Drawn(model=model, dtype=dtype, flags=flags, rows=rows, shared=shared)


def _shares(rng: random.Random) -> tuple[int, int]:
    gpu = rng.choice((0, 30, 60, 100))
    return gpu, rng.choice((0, 100 - gpu, (100 - gpu) // 2))


def _run(drawn: Drawn, work: Path, hardware: Path) -> dict:
    home = work / "memory-run"
    home.mkdir(exist_ok=True)
    rng = random.Random(0)
    head = [rng.randrange(3, 4000) for _ in range(drawn.shared)]
    requests = (
        {"prompt": head + [rng.randrange(3, 4000) for _ in range(s)], "max_tokens": n, "ignore_eos": True}
        for s, n in drawn.rows
    )
    (home / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests), encoding="utf-8")
    metrics, policy = home / "metrics.json", home / "policy.json"
    metrics.unlink(missing_ok=True)
    command = [sys.executable, "-m", "flexmoe.run", "--model", str(work / drawn.model), "-i", str(home / "in.jsonl")]
    command += ["-o", str(home / "out.jsonl"), "--overwrite", "--device", "cpu", "--dtype", drawn.dtype]
    command += ["--offload-dir", str(home / "offload")]
    flags, dry = list(drawn.flags), ["--dry-run", "--hardware", str(hardware)]
    if drawn.is_planned:
        _said([*command, *flags, *dry, "--save-policy", str(policy)])
        flags = ["--policy", str(policy)]
    sizes = [float(gib) for _, gib in _PLANNED.findall(_said([*command, *flags, *dry]))]
    limit = ceil(sum(sizes) * GIB) + STEP_BYTES

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit + UNTOUCHED_BYTES, limit + UNTOUCHED_BYTES))

    told = ["--memory-limit", f"{limit / GIB:.4f}", "--metrics-json", str(metrics)]
    done = subprocess.run([*command, *flags, *told], preexec_fn=limited, capture_output=True, text=True, check=False)
    found = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    memory = found.get("memory", {"gpu": {}, "cpu": {}})
    prefixes = found.get("prefix_cache", {})
    return {
        "model": drawn.model,
        "dtype": drawn.dtype,
        "is_planned": drawn.is_planned,
        "flags": list(drawn.flags),
        "rows": len(drawn.rows),
        "shared": drawn.shared,
        "saved_tokens": int(prefixes.get("saved_tokens", 0)),
        "needed_tokens": int(prefixes.get("needed_tokens", 0)),
        "limit_bytes": limit,
        "planned_bytes": sum(memory[tier].get("planned_bytes", 0) for tier in ("gpu", "cpu")),
        "process_bytes": memory["cpu"].get("process", 0),
        "peak_bytes": found.get("peak_process_bytes", 0),
        "sweeps": found.get("sweeps", 0),
        "rows_ok": found.get("rows_ok", 0),
        "shrunk": "memory runs short" in done.stderr,
        "exit_code": done.returncode,
        "said": done.stderr.strip().splitlines()[-1:] if done.returncode else [],
    }


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def _write(path: Path, record: dict, met: bool) -> None:
    """The record as JSON, and as text beside it."""
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    results = record["results"]
    worst = max(r["peak_bytes"] / max(1, r["planned_bytes"]) for r in results)
    text = [
        "# Planned and held memory",
        "",
        f"`{record['command']}`: each run is told to keep to its planned size (`--memory-limit`) and runs under",
        "RLIMIT_DATA of that size, one step of rounding (32 MiB) and 128 MiB of stacks that nobody touches. *Planned* are the tiers in",
        "host memory and the process itself, *peak* is the most that the process was resident in (VmHWM).",
        f"Machine: {record['machine']['cpu']}, {record['machine']['cores']} cores; torch {record['versions']['torch']}. The probe finds",
        f"{record['process_bytes'] / GIB:.3f} GiB for a process beside its plan.",
        "",
        "```",
        *map(line, results),
        f"{len(results)} runs, {sum(r['exit_code'] != 0 for r in results)} failed or killed, {sum(r['shrunk'] for r in results)} had to "
        f"shrink; peak at most {100 * worst:.1f} % of the plan: target {'met' if met else 'MISSED'}",
        "```",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=Path("build"), help="where checkpoints and files go (default build)")
    p.add_argument("--seed", type=int, default=1, help="of the drawn runs (default 1)")
    p.add_argument("--runs", type=int, default=12, help="how many (default 12)")
    p.add_argument("--shared", type=int, default=0, metavar="TOKENS", help="that all prompts begin with (default 0)")
    p.add_argument("--record", type=Path, help="write the record here (.json; a .md beside it)")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
