"""Jobs whose rows differ in length, as they are met: chats, mostly short answers with some long ones, a few rows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

from policies.workload import Workload
from scripts.optimality.random_machines import log_uniform

#: How many tokens a row generates, by what the job is like.
_GENERATED: Mapping[str, Callable[[random.Random, float], int]] = {
    "uniform": lambda rng, mean: rng.randint(1, max(1, round(2 * mean))),
    "two kinds": lambda rng, mean: 1 if rng.random() < 0.8 else max(2, round(4 * mean)),
    "zipf": lambda rng, mean: round(mean / 4 / max(1e-3, rng.random())),
    "log-normal": lambda rng, mean: round(mean * math.exp(rng.gauss(0, 1))),
}
_LONGEST = 2048
_FEW, _MANY = 4, 3000


def mixed_job(rng: random.Random) -> Workload:
    """A job with an end; prompts are log-normal, and rows, prompts and completions of any scale."""
    rows = int(log_uniform(rng, _FEW, _MANY))
    prompt, generated = log_uniform(rng, 8, 1024), log_uniform(rng, 2, 256)
    draw = _GENERATED[rng.choice(sorted(_GENERATED))]
    return Workload.of_lengths(
        (
            max(1, min(4 * _LONGEST, round(prompt * math.exp(rng.gauss(0, 0.6))))),
            max(1, min(_LONGEST, draw(rng, generated))),
        )
        for _ in range(rows)
    )
