"""The main job on an embedded default: make a checkpoint that does not fit its budgets, plan for this machine, run a
batch over three tiers, and say how right the plan was.

``python -m scripts.demo [DIR]``: everything it writes stays in DIR (default ``demo``), except the rates of this machine:
they are measured once, in about a minute, and kept in the user's cache for every later plan.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from cost_model.simulation.simulate import Simulation, simulate
from flexmoe.cli.run import main as run
from flexmoe.models.loader import compute_dtype, load_model
from flexmoe.planning.forecast import Forecaster
from flexmoe.probing.cache import cache_path
from flexmoe.system.device import Device
from policies.common.memory_units import GIB
from policies.policy import Policy, Workload
from scripts.make_checkpoint import SIZES, make_checkpoint
from scripts.support.corpus import corpus_words
from scripts.support.demo_report import compared, planned, put_beside, under_compute_percent

ROWS, GEN_LEN = 96, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A checkpoint size, and budgets in GiB of which no two hold it."""

    device: str
    size: str
    gpu_mem: float
    cpu_mem: float
    nvme_mem: float

    @classmethod
    def of(cls, device: Device) -> Setting:
        """On a GPU all is larger, and the budget has to hold the CUDA context and its kernels too."""
        if not device.is_cuda:
            return cls(device="cpu", size="demo", gpu_mem=0.12, cpu_mem=0.15, nvme_mem=0.25)
        whole = 1 << 50
        context = (whole - device.room(whole)) / GIB
        return cls(device="cuda", size="bench", gpu_mem=round(context + 1.2, 2), cpu_mem=1.0, nvme_mem=2.5)

    @property
    def budgets(self) -> dict[str, float]:
        """By the names of the flags."""
        return {"gpu_mem": self.gpu_mem, "cpu_mem": self.cpu_mem, "nvme_mem": self.nvme_mem}


def main(argv: list[str]) -> int:
    """Run the demo; the exit code is the run's."""
    home, device = Path(argv[0] if argv else "demo"), Device("auto")
    setting = Setting.of(device)
    checkpoint = home / f"checkpoint-{setting.size}"
    home.mkdir(parents=True, exist_ok=True)
    if not (checkpoint / "config.json").exists():
        print("making a synthetic Mixtral checkpoint (random weights: the text will be nonsense) …", flush=True)
        make_checkpoint(checkpoint, SIZES[setting.size])
    write_requests(home / "requests.jsonl")
    args = command(setting, checkpoint, home)
    print(introduction(setting, checkpoint, device, home), f"\npython -m flexmoe.run {' '.join(args)}\n", flush=True)
    code = run(args)
    if code == 0:
        show(setting, checkpoint, home)
    return code


def command(setting: Setting, checkpoint: Path, home: Path) -> list[str]:
    """The arguments of ``python -m flexmoe.run``."""
    files = {
        "-i": "requests.jsonl",
        "-o": "completions.jsonl",
        "--trace": "trace.json",
        "--metrics-json": "metrics.json",
        "--offload-dir": "offload",
    }
    args = [
        "--model",
        str(checkpoint),
        "--overwrite",
        "--policy",
        "auto",
        "--gen-len",
        str(GEN_LEN),
        "--device",
        setting.device,
    ]
    args += [part for name, gib in setting.budgets.items() for part in (f"--{name.replace('_', '-')}", f"{gib:g}")]
    return args + [part for flag, name in files.items() for part in (flag, str(home / name))]


def introduction(setting: Setting, checkpoint: Path, device: Device, home: Path) -> str:
    """What will happen, in a few lines."""
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    role = "of GPU memory, its context included" if device.is_cuda else "of memory in a GPU's role (there is none)"
    kept = cache_path(device, (home / "offload").expanduser().absolute())
    how = "are known from an earlier run" if kept.exists() else "are measured first: about a minute, once"
    lines = (
        f"A model of {size / GIB:.2f} GiB may take {setting.gpu_mem:g} GiB {role},",
        f"{setting.cpu_mem:g} GiB of host memory and {setting.nvme_mem:g} GiB of disk. It does not fit the first two together, so",
        "weights and KV cache have to be spread over all three. --policy auto finds out how:",
        f"the rates of this machine {how} (kept in {kept});",
        f"then the fastest policy for the {ROWS} requests is planned, which takes seconds, and run.",
    )
    return "\n".join(lines)


def write_requests(path: Path) -> None:
    """Ragged requests: a few words to a few hundred tokens, text, chat and token ids."""
    rng = random.Random(0)
    words = corpus_words()
    written = []
    for i in range(ROWS):
        start, length = rng.randrange(len(words) - 200), rng.choice((3, 10, 30, 80, 160))
        text = " ".join(words[start : start + length])
        limit = rng.randrange(4, 25)
        if i % 3 == 0:
            written.append({"custom_id": f"text-{i}", "prompt": text, "max_tokens": limit})
        elif i % 3 == 1:
            body = {"messages": [{"role": "user", "content": text}], "max_completion_tokens": limit}
            written.append({"custom_id": f"chat-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        else:
            ids = [rng.randrange(3, 4000) for _ in range(length)]
            written.append({"custom_id": f"ids-{i}", "prompt": ids, "return_token_ids": True})
    path.write_text("".join(json.dumps(line) + "\n" for line in written), encoding="utf-8")


def show(setting: Setting, checkpoint: Path, home: Path) -> None:
    """A few completions, what was planned, what was predicted beside what was measured, and where the files are."""
    print("\nsome completions:")
    for line in (home / "completions.jsonl").read_text(encoding="utf-8").splitlines()[:3]:
        row = json.loads(line)
        choice = row["response"]["body"]["choices"][0]
        text = choice.get("text") or choice.get("message", {}).get("content")
        print(f"  {row['custom_id']}: {text!r} ({choice['finish_reason']})")
    metrics = json.loads((home / "metrics.json").read_text(encoding="utf-8"))
    predicted = forecast(setting, checkpoint, home, metrics)
    trace = home / "trace.json"
    under = under_compute_percent(json.loads(trace.read_text(encoding="utf-8")))
    print("", *planned(metrics, setting.budgets), "", *compared(metrics, predicted), sep="\n")
    print(f"\n{under:.0f} % of the time of the disk reads lay under computation")
    predicted.write_chrome_trace(home / "predicted-trace.json")
    put_beside(trace, home / "predicted-trace.json")
    print(f"{trace} shows both, what ran above what was predicted: open it in https://ui.perfetto.dev")
    print(f"files: {', '.join(str(p) for p in sorted(home.iterdir()) if p.is_file())}")


def forecast(setting: Setting, checkpoint: Path, home: Path, metrics: dict) -> Simulation:
    """What the run predicted before it started, with the operations of every sweep."""
    model, job = load_model(str(checkpoint)), Workload(**metrics["workload"])
    planner = Forecaster.of_machine(
        model.arch,
        job,
        compute_dtype("auto", model, Device(setting.device).torch),
        hardware="auto",
        device=setting.device,
        directory=home / "offload",
        budgets=setting.budgets,
    )
    return simulate(
        planner.arch,
        planner.hardware,
        job,
        Policy(**metrics["policy"]),
        dtype_bytes=planner.dtype_bytes,
        keep_trace_sweeps=metrics["sweeps"],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
