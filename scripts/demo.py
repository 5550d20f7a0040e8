"""The main job on an embedded default: make a checkpoint that does not fit its budgets, run a batch over three tiers.

``python -m scripts.demo [DIR]``: everything it writes stays in DIR (default ``demo``).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from flexmoe.run import main as run
from scripts.make_checkpoint import SIZES, make_checkpoint

ROWS = 96
COMMAND = """
    --percent 10 30 30 30 50 25 --gpu-batch-size 16 --num-gpu-batches 4 --gen-len 24
    --gpu-mem {gpu} --cpu-mem 0.15 --nvme-mem 0.25
"""


def main(argv: list[str]) -> int:
    """Run the demo; the exit code is the run's."""
    home = Path(argv[0] if argv else "demo")
    home.mkdir(parents=True, exist_ok=True)
    checkpoint = home / "checkpoint"
    if not (checkpoint / "config.json").exists():
        print("making a synthetic Mixtral checkpoint (random weights: the text will be nonsense) …", flush=True)
        make_checkpoint(checkpoint, SIZES["demo"])
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    write_requests(home / "requests.jsonl")
    # On a GPU the budget has to hold the CUDA context and torch's workspaces too.
    gpu = 2 if torch.cuda.is_available() else 0.12
    files = {
        "-i": "requests.jsonl",
        "-o": "completions.jsonl",
        "--trace": "trace.json",
        "--metrics-json": "metrics.json",
    }
    args = ["--model", str(checkpoint), "--overwrite", *COMMAND.format(gpu=gpu).split(), "--offload-dir", str(home / "offload")]
    args += [part for flag, name in files.items() for part in (flag, str(home / name))]
    print(
        f"{size / 2**20:.0f} MiB of weights, {ROWS} requests of mixed length; python -m flexmoe.run {' '.join(args)}\n",
        flush=True,
    )
    code = run(args)
    if code == 0:
        show(home)
    return code


def write_requests(path: Path) -> None:
    """Ragged requests: a few words to a few hundred tokens, text, chat and token ids."""
    rng = random.Random(0)
    words = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").split()
    lines = []
    for i in range(ROWS):
        start, length = rng.randrange(len(words) - 200), rng.choice((3, 10, 30, 80, 160))
        text = " ".join(words[start : start + length])
        limit = rng.randrange(4, 25)
        if i % 3 == 0:
            lines.append({"custom_id": f"text-{i}", "prompt": text, "max_tokens": limit})
        elif i % 3 == 1:
            body = {"messages": [{"role": "user", "content": text}], "max_completion_tokens": limit}
            lines.append({"custom_id": f"chat-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        else:
            ids = [rng.randrange(3, 4000) for _ in range(length)]
            lines.append({"custom_id": f"ids-{i}", "prompt": ids, "return_token_ids": True})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def show(home: Path) -> None:
    """A few completions, the overlap that the trace shows, and where the files are."""
    print("\nsome completions:")
    lines = (home / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:3]:
        row = json.loads(line)
        choice = row["response"]["body"]["choices"][0]
        text = choice.get("text") or choice.get("message", {}).get("content")
        print(f"  {row['custom_id']}: {text!r} ({choice['finish_reason']})")
    under = read_under_compute_percent(json.loads((home / "trace.json").read_text(encoding="utf-8")))
    print(f"\ntrace: {under:.0f} % of the disk-read time ran under compute")
    print(f"files: {', '.join(str(p) for p in sorted(home.iterdir()) if p.is_file())}")


def read_under_compute_percent(trace: dict) -> float:
    """Share of the time of all disk reads that lies inside spans of the compute lane."""
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    spans = [(names[e["tid"]], e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"]
    compute = sorted((a, b) for lane, a, b in spans if lane == "gpu")
    reads = [(a, b) for lane, a, b in spans if lane.startswith("disk_read")]
    covered = sum(max(0.0, min(b, d) - max(a, c)) for a, b in reads for c, d in compute if c < b and d > a)
    return 100 * covered / max(1e-9, sum(b - a for a, b in reads))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
