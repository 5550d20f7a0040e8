"""Random planning problems: machines around the presets, known and synthetic models, short and long jobs."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from cost_model import Hardware, ModelArch, Workload
from cost_model.hardware.gemm_rates import GemmRates

_MODELS = ("mixtral-8x7b", "mixtral-8x22b", "phi-3.5-moe", "qwen3-30b-a3b", "qwen3-235b-a22b")
_GPU_RATES = (
    "memory_bytes_per_s",
    "h2d_bytes_per_s",
    "d2h_bytes_per_s",
    "kv_load_bytes_per_s",
    "kv_store_bytes_per_s",
    "attention_bytes_per_s",
    "attention_flops_per_s",
    "op_s",
)
_HOST_RATES = (
    "host_bytes_per_s",
    "disk_read_bytes_per_s",
    "disk_write_bytes_per_s",
    "cpu_attention_bytes_per_s",
    "cpu_attention_flops_per_s",
    "row_s",
    "sweep_s",
    "kv_block_read_s",
    "kv_block_core_s",
    "kv_block_write_s",
    "disk_latency_s",
    "disk_busy_latency_s",
    "handoff_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomProblem:
    """One problem. The same seed gives the same one."""

    seed: int
    arch: ModelArch
    hardware: Hardware
    workload: Workload

    def __str__(self) -> str:
        job, budgets = self.workload, self.hardware.budgets()
        sizes = " ".join(f"{name} {size / 2**30:.3g}" for name, size in budgets.items() if size is not None)
        rows = f" x {job.num_requests}" if job.num_requests else ""
        model = f"{self.arch.name} {self.arch.total_bytes / 2**30:.3g} GiB"
        return f"{self.hardware.name} ({sizes} GiB), {model}, {job.prompt_len}/{job.gen_len}{rows}"


def random_problem(seed: int) -> RandomProblem:
    """Capacities, rates and lengths are log-uniform; small models get small machines, so that memory binds."""
    rng = random.Random(seed)
    preset = Hardware.preset(rng.choice(Hardware.preset_names()))
    known = rng.random() < 0.7
    kept = random.Random(f"reads beside computation {seed}").uniform(0.0, 1.0)
    arch = ModelArch.from_name(rng.choice(_MODELS)) if known else _synthetic(rng)
    return RandomProblem(
        seed=seed,
        arch=arch,
        hardware=replace(
            _machine(rng, preset, 1.0 if known else min(1.0, 2 * arch.total_bytes / 9e10)),
            disk_read_beside_compute=1.0 if kept < 0.5 else kept,
        ),
        workload=Workload(
            prompt_len=int(log_uniform(rng, 16, 4096)),
            gen_len=int(log_uniform(rng, 8, 1024)),
            num_requests=int(log_uniform(rng, 50, 50_000)) if rng.random() < 0.4 else None,
        ),
    )


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    """A number whose logarithm is uniform."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _around(rng: random.Random, value: float, factor: float) -> float:
    return value * log_uniform(rng, 1 / factor, factor)


def _synthetic(rng: random.Random) -> ModelArch:
    hidden = rng.choice((256, 512, 1024, 2048))
    heads = hidden // 64
    experts = rng.choice((4, 8, 16, 64))
    return replace(
        ModelArch.from_name("mixtral-8x7b"),
        name="synthetic",
        hidden=hidden,
        num_layers=rng.choice((4, 8, 16, 24)),
        ffn=rng.choice((hidden // 2, 2 * hidden, 7 * hidden // 2)),
        num_experts=experts,
        top_k=rng.choice((1, 2, min(4, experts))),
        num_heads=heads,
        num_kv_heads=rng.choice([count for count in (1, 2, 4, 8) if heads % count == 0]),
        head_dim=64,
        vocab_size=rng.choice((1000, 32_000, 100_000)),
    )


def _machine(rng: random.Random, preset: Hardware, size: float) -> Hardware:
    gpu = preset.gpu
    host_bytes = int(_around(rng, preset.host_memory_bytes, 2.5) * size)
    rates = {name: _around(rng, getattr(gpu, name), 2) for name in _GPU_RATES}
    for direction in ("h2d", "d2h"):
        rates[f"{direction}_duplex_bytes_per_s"] = rates[f"{direction}_bytes_per_s"] * rng.uniform(0.5, 1)
    speed = _around(rng, 1, 2)
    gpu = replace(
        gpu,
        memory_bytes=int(_around(rng, gpu.memory_bytes, 2) * size) if preset.device == "cuda" else host_bytes,
        reserved_bytes=int(gpu.reserved_bytes * size),
        experts={number: _faster(curve, speed) for number, curve in gpu.experts.items()},
        dense={number: _faster(curve, speed) for number, curve in gpu.dense.items()},
        grouped_experts={number: _faster(curve, speed) for number, curve in gpu.grouped_experts.items()},
        **rates,
    )
    return replace(
        preset,
        name=f"{preset.name}-{rng.randrange(10**6)}",
        gpus=(gpu,),
        host_memory_bytes=host_bytes,
        process_bytes=int(preset.process_bytes * size),
        disk_bytes=0 if rng.random() < 0.1 else int(_around(rng, preset.disk_bytes, 4) * size),
        cores=rng.choice((4, 8, 16, 32, 64)),
        **{name: _around(rng, getattr(preset, name), 2.5) for name in _HOST_RATES},
    )


def _faster(curve: GemmRates, factor: float) -> GemmRates:
    return replace(curve, flops_per_s=tuple(tuple(rate * factor for rate in row) for row in curve.flops_per_s))
