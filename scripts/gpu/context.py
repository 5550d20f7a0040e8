"""What the stages of the GPU benchmark share: model, device, budgets, and the rates measured in this run."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.model.known_shapes import SHAPES
from flexmoe.errors import UsageError
from flexmoe.system.machine import filesystem
from policies.policy import Workload
from scripts.benchmark.worker import Worker
from scripts.gpu.limit import Rates

WORKLOADS = (Workload(prompt_len=512, gen_len=256), Workload(prompt_len=77, gen_len=128))
REHEARSED = (Workload(prompt_len=24, gen_len=8),)
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
GEMM_TOKENS = [1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
#: Tokens of an expert in the products of packed weights.
PACKED_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A run of one stage.

    Args:
        model: a known shape, or a directory with a `config.json`.
        device: `cuda`, or `cpu` in a rehearsal.
        workloads: of the capped stages.
        host_bytes, disk_bytes: what weights and KV may take.
        end_s: when the timed part should be over, on the clock of `time.perf_counter`.
        scale: of the probes' buffers.
        hardware_file: the machine's rates for the planner; None: measured in this run.
        seed, each: of the configurations of `validate`, and how many of every class.
    """

    model: str
    device: str
    workloads: tuple[Workload, ...]
    host_bytes: int
    disk_bytes: int
    workdir: Path
    out: Path
    end_s: float
    scale: float
    hardware_file: Path | None = None
    seed: int = 1
    each: int = 3
    start_s: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Context:
        """From the command line.

        Raises:
            UsageError: an unknown workload.
        """
        workdir, rehearse = args.workdir.resolve(), args.rehearse
        out = (args.out or (workdir / "gpu-rehearsal" if rehearse else Path("benchmarks"))).resolve()
        for directory in (workdir, out):
            directory.mkdir(parents=True, exist_ok=True)
        in_memory = filesystem(workdir) in ("tmpfs", "ramfs")
        known = {f"{w.prompt_len}/{w.gen_len}": w for w in (REHEARSED if rehearse else WORKLOADS)}
        unknown = [name for name in args.workload or () if name not in known]
        if unknown:
            raise UsageError(f"unknown workload {unknown[0]}: choose {' or '.join(known)}")
        return cls(
            model=reduced_model(workdir / "tiny", TINY) if rehearse else "mixtral-8x7b",
            device="cpu" if rehearse else "cuda",
            workloads=tuple(known[name] for name in args.workload or known),
            host_bytes=int(45e6 if rehearse else args.host_mem * 1e9),
            disk_bytes=int(40e6 if rehearse else 0 if in_memory else args.nvme_mem * 1e9),
            workdir=workdir,
            out=out,
            end_s=time.perf_counter() + args.seconds,
            scale=0.005 if rehearse else 1.0,
            hardware_file=args.hardware,
            seed=args.seed,
            each=args.each,
        )

    @property
    def rehearse(self) -> bool:
        """Whether the numbers mean nothing."""
        return self.device == "cpu"

    @property
    def arch(self) -> ModelArch:
        """The model's shape."""
        return ModelArch.from_dir(self.model) if Path(self.model).is_dir() else ModelArch.from_name(self.model)

    def left_s(self) -> float:
        """Seconds until the stage should be over."""
        return self.end_s - time.perf_counter()

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        print(f"[{time.perf_counter() - self.start_s:6.0f} s] {text}", flush=True)

    def hardware(self) -> Hardware:
        """This machine for the planner: from the file that was given, else measured now, in a process of its own.

        Raises:
            FlexMoEError: the file cannot be used.
        """
        if self.hardware_file:
            return Hardware.load(self.hardware_file)
        path, directory = self.out / "gpu-machine.json", self.workdir / "offload"
        with Worker("scripts.gpu.probe") as worker:
            worker.ask("machine", device=self.device, directory=str(directory), path=str(path), rehearse=self.rehearse)
        self.say(f"measured for the planner: {path}")
        return Hardware.load(path)

    def measure(self) -> dict:
        """The probes of the limit, in a process of their own."""
        disk_bytes = int(6e9 * self.scale)
        with Worker("scripts.gpu.probe") as worker:
            found = {
                "copies": worker.ask("copies", device=self.device, scale=self.scale),
                "gemm": worker.ask("gemm", device=self.device, model=self.model, tokens=GEMM_TOKENS),
                "packed": worker.ask("packed", device=self.device, model=self.model, tokens=PACKED_TOKENS),
                "hbm": worker.ask("hbm", device=self.device, scale=self.scale),
                "host": worker.ask("host", device=self.device, model=self.model, scale=self.scale),
                "disk": worker.ask(
                    "disk", device=self.device, directory=str(self.workdir / "offload"), nbytes=disk_bytes
                ),
            }
        self.say(f"probes: {found}")
        return found


def rates_of(found: dict) -> Rates:
    """The rates of the limit from the probes: host memory serves copies and attention at once, so what both had
    together counts where it is more than one reader alone had."""
    host = found["host"]
    return Rates(
        pcie=found["copies"]["h2d"],
        host_dram=max(host["read"], host["attention_under_copies"] + host["copies_under_attention"]),
        gpu_flops=tuple((tokens, rate) for tokens, rate in found["gemm"]["curve"]),
        cpu_attention=host["attention"],
        nvme=found["disk"]["read"],
    )


def reduced_model(path: Path, changes: dict) -> str:
    """A directory with the config of Mixtral 8x7B and these changes; what dummy weights need."""
    config = json.loads((SHAPES / "mixtral-8x7b.json").read_text(encoding="utf-8")) | changes
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)
