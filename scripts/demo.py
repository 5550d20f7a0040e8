"""The main job on an embedded default: a model that does not fit its budgets, a plan for this machine, a batch over three
tiers; then what it answered, and how right the plan was.

``python -m scripts.demo [DIR] [--synthetic]``: everything it writes stays in DIR (default ``demo``), except two things in the
user's cache: the rates of this machine, measured once in one to seven minutes, and the file that the model is made of.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from cost_model.simulation.simulate import Simulation, simulate
from flexmoe.cli.run import main as run
from flexmoe.errors import FlexMoEError
from flexmoe.models.loader import compute_dtype, load_model
from flexmoe.planning.forecast import Forecaster
from flexmoe.probing.cache import cache_path
from flexmoe.system.device import Device
from flexmoe.system.memory import process_bytes
from policies.common.memory_units import GIB
from policies.policy import Policy, Workload
from scripts.demonstration.models import DemoModel, choose
from scripts.demonstration.report import answers, compared, planned, put_beside, under_compute_percent

SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model on a device, and the directory of the demo's files.

    Args:
        budgets: GiB by the names of the flags; on CUDA that of the GPU includes the context, and that of the CPU the process.
    """

    model: DemoModel
    checkpoint: Path
    home: Path
    device: Device
    budgets: dict[str, float]

    @classmethod
    def of(cls, model: DemoModel, checkpoint: Path, home: Path, device: Device) -> Setting:
        """With the model's budgets."""
        whole = 8 * GIB
        context = (whole - device.room(whole)) / GIB if device.is_cuda else 0
        gpu_mem = round(context + model.gpu_mem, 2)
        own = process_bytes() / GIB if device.is_cuda else 0  # there the budget is that of the whole process
        budgets = {"gpu_mem": gpu_mem, "cpu_mem": round(own + model.cpu_mem, 2), "nvme_mem": model.nvme_mem}
        return cls(model=model, checkpoint=checkpoint, home=home, device=device, budgets=budgets)

    @classmethod
    def chosen(cls, args: argparse.Namespace) -> Setting:
        """What the flags of `demo_parser` ask for; the model is downloaded or made where it is not there.

        Raises:
            FlexMoEError: it can be neither.
        """
        device = Device("auto")
        model, checkpoint = choose(args.home, on_cuda=device.is_cuda, real=not args.synthetic)
        return cls.of(model, checkpoint, args.home, device)

    @property
    def rates(self) -> Path:
        """The file in which those of this machine are kept."""
        return cache_path(self.device, (self.home / "offload").expanduser().absolute())

    @property
    def flags(self) -> list[str]:
        """Those of the policy and of the machine."""
        budgets = [part for name, gib in self.budgets.items() for part in (f"--{name.replace('_', '-')}", f"{gib:g}")]
        return ["--policy", "auto", "--device", self.device.kind, *budgets]


def demo_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Flags that all demos have."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("home", metavar="DIR", nargs="?", type=Path, default=Path("demo"), help="default: demo")
    parser.add_argument("--synthetic", action="store_true", help="random weights, and no download")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit code is the run's."""
    args = demo_parser("python -m scripts.demo", "A model over three tiers.").parse_args(argv)
    try:
        setting = Setting.chosen(args)
    except FlexMoEError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    lines = (json.dumps(request) + "\n" for request in setting.model.requests())
    (args.home / "requests.jsonl").write_text("".join(lines), encoding="utf-8")
    flags = command(setting)
    print(introduction(setting), f"\n\npython -m flexmoe.run {' '.join(flags)}\n", sep="", flush=True)
    code = run(flags)
    if code == 0:
        show(setting)
    return code


def command(setting: Setting) -> list[str]:
    """The arguments of ``python -m flexmoe.run``."""
    files = {
        "-i": "requests.jsonl",
        "-o": "completions.jsonl",
        "--trace": "trace.json",
        "--metrics-json": "metrics.json",
        "--offload-dir": "offload",
    }
    args = ["--model", str(setting.checkpoint), "--overwrite", *setting.flags]
    return args + [part for flag, name in files.items() for part in (flag, str(setting.home / name))]


def introduction(setting: Setting) -> str:
    """What will happen, in a few lines."""
    size = sum(f.stat().st_size for f in setting.checkpoint.glob("*.safetensors"))
    role = (
        "of GPU memory, its context included" if setting.device.is_cuda else "of memory in a GPU's role (there is none)"
    )
    kept = setting.rates
    how = "are known from an earlier run" if kept.exists() else "are measured first: one to seven minutes, once"
    gpu_mem, cpu_mem, nvme_mem = setting.budgets.values()
    paragraphs = (
        setting.model.about,
        f"Its weights are {size / GIB:.2f} GiB. They may take {gpu_mem:g} GiB {role}, {cpu_mem:g} GiB of host memory and "
        f"{nvme_mem:g} GiB of disk. They do not fit the first two together, so weights and KV cache have to be spread over all "
        "three. --policy auto finds out how:",
        f"- the rates of this machine {how} (kept in {kept});",
        f"- then the fastest policy for the {len(setting.model.requests())} requests is planned, which takes seconds, and run.",
    )
    wrapper = textwrap.TextWrapper(100, break_on_hyphens=False, break_long_words=False)
    lines = []
    for text in paragraphs:
        wrapper.subsequent_indent = "  " if text.startswith("- ") else ""
        lines += wrapper.wrap(text)
    return "\n".join(lines)


def show(setting: Setting) -> None:
    """A few completions, what was planned, what was predicted beside what was measured, and where the files are."""
    home = setting.home
    completions = [json.loads(line) for line in (home / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    print("", *answers(setting.model.requests()[:SHOWN], completions), sep="\n")
    metrics = json.loads((home / "metrics.json").read_text(encoding="utf-8"))
    predicted = forecast(setting, metrics)
    trace = home / "trace.json"
    under = under_compute_percent(json.loads(trace.read_text(encoding="utf-8")))
    print("", *planned(metrics, setting.budgets), "", *compared(metrics, predicted), sep="\n")
    print(f"\n{under:.0f} % of the time of the disk reads lay under computation")
    predicted.write_chrome_trace(home / "predicted-trace.json")
    put_beside(trace, home / "predicted-trace.json")
    print(f"{trace} shows both, what ran above what was predicted: open it in https://ui.perfetto.dev")
    print(f"files: {', '.join(str(p) for p in sorted(home.iterdir()) if p.is_file())}")


def forecast(setting: Setting, metrics: dict) -> Simulation:
    """What the run predicted before it started, with the operations of every sweep: by the rates that it had, even if it found them
    changed and the next run measures again."""
    model, job = load_model(str(setting.checkpoint)), Workload(**metrics["workload"])
    planner = Forecaster.of_machine(
        model.arch,
        job,
        compute_dtype("auto", model, setting.device.torch),
        hardware=setting.rates if setting.rates.exists() else "auto",
        device=setting.device.kind,
        directory=setting.home / "offload",
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
    sys.exit(main())
