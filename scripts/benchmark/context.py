"""What all sections share: the model, the scale of the run, disk probes and the FLOPs of a job."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from policies.common.memory_units import GIB
from scripts.benchmark import loads
from scripts.benchmark.loads import Job
from scripts.benchmark.probes import disk_rate
from scripts.benchmark.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How long things run. Quick numbers say that the benchmark works, nothing about speed."""

    repeats: int = 5
    run_s: float = 8.0
    probe_bytes: int = 1000 << 20
    gemm_s: float = 0.8
    sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 2048)
    prompt_rows: int = 64
    ragged_rows: int = 256
    ragged_prompt: int = 512
    ragged_new: int = 64
    peer_batches: tuple[int, ...] = (16, 64, 256)
    resident_bytes: int = GIB
    steady_rows: int = 128
    classes: tuple[str, ...] = tuple(loads.CLASSES)


QUICK = Scale(
    repeats=1,
    run_s=2.0,
    probe_bytes=200 << 20,
    gemm_s=0.2,
    sizes=(1, 8),
    prompt_rows=8,
    ragged_rows=16,
    ragged_prompt=32,
    ragged_new=8,
    peer_batches=(4, 8, 16),
    resident_bytes=120 << 20,
    steady_rows=64,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """A run of the benchmark.

    Args:
        model: the checkpoint directory.
        workdir: where further checkpoints and offload files go.
        plot: where the plot goes.
        scale: how long things run.
        full_peers: measure the slow peers in full where they are projected otherwise.
    """

    model: Path
    workdir: Path
    plot: Path
    scale: Scale
    full_peers: bool
    start_s: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        print(f"[{time.perf_counter() - self.start_s:6.0f} s] {text}", flush=True)

    @property
    def arch(self) -> ModelArch:
        """The model's shape."""
        return ModelArch.from_dir(self.model)

    @property
    def shards(self) -> list[str]:
        """The checkpoint's weight files."""
        return sorted(str(path) for path in self.model.glob("*.safetensors"))

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of all experts."""
        return sum(unit.stored_bytes for unit in units_of(self.arch) if unit.kind == "expert")

    @property
    def offload(self) -> str:
        """Where FlexMoE's disk tier writes, should it write."""
        return str(self.workdir / "offload")

    def probe(self) -> dict:
        """The best O_DIRECT rate on the shards, now."""
        return disk_rate(self.shards, self.scale.probe_bytes)

    def tokens_per_expert(self, tokens: float) -> int:
        """Mean tokens that one expert gets of a sweep's tokens."""
        return max(1, round(tokens * self.arch.top_k / self.arch.num_experts))

    def flops(self, processed_tokens: int, new_tokens: int) -> int:
        """FLOPs of the linear layers: every token passes the layers, only a token that samples passes the head."""
        head = 2 * self.arch.embed_params
        return processed_tokens * (self.arch.flops_per_token - head) + new_tokens * head

    def gemm(self, engine: Worker, tokens: float) -> float:
        """FLOP/s of the experts' products when a sweep carries `tokens` tokens, measured in the engine's process."""
        per_expert = self.tokens_per_expert(tokens)
        return engine.ask(
            "gemm", tokens=per_expert, hidden=self.arch.hidden, ffn=self.arch.ffn, seconds=self.scale.gemm_s
        )["rate"]

    def open(self, engine: Worker, name: str, job: Job, weights, *, rows: int = 0, **options) -> dict:
        """Open an `LLM` that holds the whole job in flight, or `rows` of it."""
        mean = [max(1, job.prompt_tokens // job.rows), max(1, job.new_tokens // job.rows)]
        options = {"kv_tokens": job.kv_tokens, "model": str(self.model), "offload_dir": self.offload} | options
        return engine.ask(
            "open",
            name=name,
            weights=weights,
            rows=rows or job.rows,
            prefill_tokens=job.prefill_tokens,
            lengths=mean,
            **options,
        )

    def run(self, engine: Worker, name: str, job: Job, **options) -> dict:
        """Run the job on an open `LLM`."""
        return engine.ask("generate", name=name, prompts=job.prompts, max_tokens=job.max_tokens, **options)

    def turns(self, engine: Worker, job: Job, disk: dict, look_bytes: int = 256 << 20) -> dict:
        """The job on the open models `disk` and `resident`, sweep by sweep in turns, and the disk's rate around each sweep.

        Args:
            disk: an answer of `probe`; the looks at the disk read as its best combination did.
        """
        return engine.ask(
            "turns",
            prompts=job.prompts,
            max_tokens=job.max_tokens,
            paths=self.shards,
            threads=disk["threads"],
            piece_bytes=disk["piece_bytes"],
            look_bytes=look_bytes,
        )

    def ask_products(
        self, engine: Worker, name: str, job: Job, share: float, seconds: float
    ) -> list[tuple[int, float, float]]:
        """The job on an open `LLM`, with the products of an expert timed behind each sweep: `with_products`.

        Args:
            share: of a sweep's tokens that an expert gets.
            seconds: how long products are timed.
        """
        asked = {"prompts": job.prompts, "max_tokens": job.max_tokens, "share": share, "seconds": seconds}
        return engine.ask("products", name=name, **asked)["sweeps"]

    def resident_run(self, engine: Worker, job: Job) -> dict:
        """C: the job with everything resident."""
        self.open(engine, "resident", job, "resident")
        result = self.run(engine, "resident", job)
        engine.ask("close", name="resident")
        return result

    def calibrate(self, engine: Worker) -> loads.Compute:
        """What a resident sweep takes, from two short jobs: enough to size the jobs that are measured."""
        points = []
        for tokens in (96, 768):
            job = loads.staggered_job(
                sweeps=3,
                tokens_per_sweep=tokens,
                prompt_len=tokens // 8,
                vocab=self.arch.vocab_size,
                seed=0,
                ragged=True,
            )
            points.append((job.processed_tokens / 3, self.resident_run(engine, job)["wall_s"] / 3))
        fixed_s, token_s = loads.line_through(*points)
        self.say(f"calibration: a resident sweep takes {fixed_s:.3f} s and {1e3 * token_s:.3f} ms a token")
        return loads.Compute(tuple(points))

    def checkpoint(self, name: str, *options: str) -> str:
        """A further checkpoint in the work directory, made when it is not there."""
        path = self.workdir / name
        make_checkpoint(path, *options)
        return str(path)


def make_checkpoint(path: Path, *options: str) -> None:
    """Run `scripts.make_checkpoint` in a process of its own, unless the checkpoint is there."""
    if not (path / "config.json").exists():
        subprocess.run([sys.executable, "-m", "scripts.make_checkpoint", str(path), *options], check=True)
