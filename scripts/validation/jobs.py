"""The set of mixed lengths: jobs as they come, of eight kinds, with nothing fitted on them.

Requests wait as in a run, the longest of each window first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.simulation.simulate import simulate
from cost_model.timing.evaluate import evaluate
from policies import Policy, Workload
from policies.admission.order import WINDOW_BLOCKS, longest_first
from policies.common.errors import InfeasibleError
from policies.policy import SCHEDULES
from scripts.validation.configs import Configuration, drawn_policy, rows_of_samples

#: Tokens of the first turns of MT-Bench in SmolLM2's chat template, in the order of the questions.
MT_BENCH = (
    *(53, 78, 87, 70, 52, 60, 62, 61, 72, 126, 64, 85, 101, 120, 138, 90, 106, 71, 68, 83),
    *(68, 66, 52, 49, 243, 106, 53, 49, 82, 170, 65, 81, 99, 52, 106, 54, 50, 60, 100, 59),
    *(56, 47, 57, 227, 52, 59, 53, 71, 63, 48, 210, 233, 402, 245, 188, 286, 243, 380, 196, 373),
    *(54, 73, 70, 48, 85, 69, 92, 68, 61, 49, 58, 44, 56, 86, 51, 49, 42, 44, 42, 47),
)
#: The name of the model with real weights.
REAL_WEIGHTS = "real"
#: Seconds that a run may be predicted to take: most kinds, and those whose rows generate long on two cores.
SECONDS, LONG_SECONDS = (3.0, 12.0), (3.0, 40.0)
#: What the first of a kind has at least of its weights outside the compute device, by tier; the others are as they are drawn.
OFFLOADED = {"cpu": 30.0, "disk": 30.0}

Row = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of job.

    Args:
        row: draws (prompt tokens, generated tokens) of a request, given the most new tokens.
        new_tokens: the most of a job, of one after the other.
        requests: how many at least and at most.
        batches: rows of a GPU batch, one of these.
        real: whether the model with real weights runs it.
        samples: completions of each request.
        seconds: shortest and longest time that a run may be predicted to take.
    """

    row: Callable[[random.Random, int], Row]
    new_tokens: tuple[int, ...]
    requests: tuple[int, int] = (8, 160)
    batches: tuple[int, ...] = (4, 8, 16)
    real: bool = False
    samples: int = 1
    seconds: tuple[float, float] = SECONDS


def _mt_bench(rng: random.Random, most: int) -> Row:
    return rng.choice(MT_BENCH), rng.randint(1, most)


def _zipf(rng: random.Random, most: int) -> Row:
    """Lengths whose density falls with their square, so that a few are twenty times the usual ones."""
    return min(512, int(24 / (1 - rng.random()))), min(most, int(8 / (1 - rng.random())))


def _bimodal(rng: random.Random, most: int) -> Row:
    if rng.random() < 0.85:
        return rng.randint(16, 48), rng.randint(1, 12)
    return rng.randint(256, 512), rng.randint(most // 2, most)


def _long_prompt(rng: random.Random, most: int) -> Row:
    return rng.randint(32, 512), rng.randint(most // 4, most)


KINDS: Mapping[str, Kind] = {
    "mt-bench": Kind(row=_mt_bench, new_tokens=(512, 128), requests=(4, 64), seconds=LONG_SECONDS),
    "zipf": Kind(row=_zipf, new_tokens=(256,)),
    "bimodal": Kind(row=_bimodal, new_tokens=(200, 64)),
    "few": Kind(row=_mt_bench, new_tokens=(128, 32), requests=(1, 6), batches=(1, 2, 4)),
    "scoring": Kind(row=_long_prompt, new_tokens=(0,)),
    "samples": Kind(row=_long_prompt, new_tokens=(48, 16), requests=(4, 24), samples=6, seconds=LONG_SECONDS),
    "real": Kind(row=_mt_bench, new_tokens=(64, 16), real=True, seconds=LONG_SECONDS),
    "real-few": Kind(row=_mt_bench, new_tokens=(64, 16), requests=(1, 6), batches=(1, 2, 4), real=True),
}


def draw_jobs(
    archs: Mapping[str, ModelArch],
    hardware: Hardware,
    seed: int,
    each: int,
    *,
    seconds: tuple[float, float] | None = None,
    turns: int = 2000,
) -> list[Configuration]:
    """``each`` configurations of every kind, the schedules in turn; the first has weights in host memory, the second on disk.

    Fewer where ``turns`` draws find none that fits the machine and takes so long.

    Args:
        archs: models by name; `REAL_WEIGHTS` is the name of the one with real weights.
        seconds: shortest and longest time that a run may be predicted to take, instead of the kind's.
        turns: draws of each configuration at most.
    """
    found = []
    for at, (name, kind) in enumerate(KINDS.items()):
        models = [model for model in archs if (model == REAL_WEIGHTS) == kind.real]
        for number in range(each):
            rng = random.Random(f"{seed} {name} {number}")
            tier = list(OFFLOADED)[number] if number < len(OFFLOADED) else None
            new_tokens = kind.new_tokens[number % len(kind.new_tokens)]
            about = {"name": f"{name}-{number + 1}", "kind": name, "samples": kind.samples}
            for policy, rows in islice(_drawn(rng, kind, new_tokens, SCHEDULES[(at + number) % 2]), turns):
                model = rng.choice(models)
                candidate = Configuration(model=model, policy=policy, rows=rows, **about)
                if _has_offloaded(policy, tier) and _suits(archs[model], hardware, candidate, seconds or kind.seconds):
                    found.append(candidate)
                    break
    return found


def _drawn(
    rng: random.Random, kind: Kind, new_tokens: int, schedule: str
) -> Iterator[tuple[Policy, tuple[tuple[int, int], ...]]]:
    """Policies and the rows of jobs, without end."""
    least, most = kind.requests
    while True:
        rows = [kind.row(rng, new_tokens) for _ in range(round(least * (most / least) ** rng.random()))]
        batch = rng.choice(kind.batches)
        count = max(1, round(len(rows) * kind.samples / batch * rng.choice((0.25, 0.5, 1))))
        mean = Workload.of_lengths(rows_of_samples(rows, kind.samples))
        policy = drawn_policy(rng, mean, batch, count, schedule)
        yield policy, tuple(longest_first(rows, sum, WINDOW_BLOCKS * policy.block_size))


def _has_offloaded(policy: Policy, tier: str | None) -> bool:
    placed = {"cpu": policy.w_cpu_percent, "disk": 100 - policy.w_gpu_percent - policy.w_cpu_percent}
    return tier is None or placed[tier] >= OFFLOADED[tier]


def _suits(arch: ModelArch, hardware: Hardware, c: Configuration, seconds: tuple[float, float]) -> bool:
    """Whether it fits the machine, and takes as long as it should. Closed forms are quick, and rough here."""
    workload = c.workload
    try:
        rough_s = evaluate(arch, hardware, workload, c.policy).wall_s
        if not seconds[0] / 4 <= rough_s <= 4 * seconds[1]:
            return False
        return seconds[0] <= simulate(arch, hardware, workload, c.policy, rows=c.waiting).job_s <= seconds[1]
    except InfeasibleError:
        return False
