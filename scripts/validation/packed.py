"""The set of packed weights: four formats, each with its weights on the disk, over all tiers, and resident; many rows and few.

Two of the twelve keep their KV cache as int8.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from policies.admission.order import WINDOW_BLOCKS, longest_first
from policies.policy import SCHEDULES, WEIGHT_FORMATS
from policies.workload import Workload
from scripts.validation.configs import Configuration, drawn_policy
from scripts.validation.jobs import LONG_SECONDS, suits

#: Percents of the weights (GPU, CPU), at least and at most; the rest is on the disk.
PLACEMENTS = {"disk": ((0, 0), (0, 0)), "tiers": ((15, 40), (15, 40)), "resident": ((100, 100), (0, 0))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Requests at least and at most, rows of a GPU batch, and most new tokens."""

    requests: tuple[int, int]
    batches: tuple[int, ...]
    new_tokens: tuple[int, int]


MANY = Rows(requests=(24, 96), batches=(8, 16), new_tokens=(4, 24))
FEW = Rows(requests=(2, 6), batches=(1, 2), new_tokens=(8, 128))
#: Where KV is compressed, by format and placement.
INT8_KV = {("int8", "resident"), ("mxfp4", "tiers")}


def draw_packed(
    archs: Mapping[str, ModelArch],
    hardware: Hardware,
    seed: int,
    *,
    seconds: tuple[float, float] = LONG_SECONDS,
    turns: int = 2000,
) -> list[Configuration]:
    """A configuration of every format and placement, few rows and many in turn.

    Fewer where ``turns`` draws find none that fits the machine and takes so long.

    Args:
        archs: packed shapes; the name ends in ``-`` and the format.
        seconds: shortest and longest time that a run may be predicted to take.
    """
    found = []
    for number, format in enumerate(WEIGHT_FORMATS):
        models = [name for name in archs if name.endswith(f"-{format}")]
        for at, placement in enumerate(PLACEMENTS):
            rng = random.Random(f"{seed} {format} {placement}")
            rows, schedule = (MANY, FEW)[(number + at) % 2], SCHEDULES[(number // 2 + at) % 2]
            for _ in range(turns):
                candidate = _drawn(rng, rng.choice(models), format, placement, rows, schedule)
                if suits(archs[candidate.model], hardware, candidate, seconds):
                    found.append(candidate)
                    break
    return found


def _drawn(rng: random.Random, model: str, format: str, placement: str, kind: Rows, schedule: str) -> Configuration:
    (least, most), (shortest, longest) = kind.requests, kind.new_tokens
    rows = [
        (rng.randint(16, 96), rng.randint(shortest, longest))
        for _ in range(round(least * (most / least) ** rng.random()))
    ]
    batch = rng.choice(kind.batches)
    count = max(1, round(len(rows) / batch * rng.choice((0.5, 1))))
    gpu, cpu = (rng.randint(*bounds) for bounds in PLACEMENTS[placement])
    policy = replace(
        drawn_policy(rng, Workload.of_lengths(rows), batch, count, schedule),
        w_gpu_percent=gpu,
        w_cpu_percent=cpu,
        compress_cache=(format, placement) in INT8_KV,
    )
    waiting = tuple(longest_first(rows, sum, WINDOW_BLOCKS * policy.block_size))
    return Configuration(name=f"{format}-{placement}", model=model, kind=format, policy=policy, rows=waiting)
