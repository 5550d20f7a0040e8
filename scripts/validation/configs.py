"""Configurations that the cost model is held against, and the set of even lengths: classes by what bounds them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.timing.evaluate import Prediction, evaluate
from cost_model.timing.job_rows import shuffled_rows
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.preflight.lengths import Lengths, RowLength
from policies import Policy, Workload
from policies.common.errors import InfeasibleError
from policies.policy import SCHEDULES

#: By device. What takes this many times the seconds of anything else bounds a run; else it is balanced.
CLASSES = {"cpu": ("disk", "compute", "balanced"), "cuda": ("disk", "link", "compute", "balanced")}
FACTOR = 1.6
GPU_BATCHES, BLOCKS, PROMPTS, COMPLETIONS = (4, 8, 16, 32, 64), (16, 512), (16, 512), (8, 64)
#: Of jobs that compute little: rows of a block, and lengths.
FEW_ROWS, SHORT_PROMPTS, SHORT_COMPLETIONS = (2, 4, 8, 12, 16), (8, 64), (4, 32)
LEAN_TURNS = 1000
#: Seconds that a run may be predicted to take; shorter ones measure noise.
SECONDS = (2.0, 10.0)
#: The rows are drawn to fit any model's context.
_CONTEXT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One run.

    Args:
        name, model: its name, and its model's.
        kind: what its errors are added up by: what bounds it, or the kind of the job.
        policy: how it runs.
        rows: (prompt tokens, generated tokens) of the requests in the order in which they wait; prompts of which nothing is
            generated are scored.
        samples: completions of each request.
    """

    name: str
    model: str
    kind: str
    policy: Policy
    rows: tuple[tuple[int, int], ...]
    samples: int = 1

    def requests(self, prompts: Iterable[Sequence[int]] | None = None) -> list[EngineRequest]:
        """What the engine gets.

        Args:
            prompts: token ids of each request; default: some ids, for the lengths alone.
        """
        ids = ((0,) * s for s, _ in self.rows) if prompts is None else prompts
        drawn = {"n": self.samples, "temperature": 1.0} if self.samples > 1 else {}
        return [
            EngineRequest(
                request_id=str(at),
                prompt_token_ids=tuple(prompt),
                params=SamplingParams(max_tokens=n, ignore_eos=True, **drawn)
                if n
                else SamplingParams(max_tokens=0, prompt_logprobs=0),
            )
            for at, (prompt, (_, n)) in enumerate(zip(ids, self.rows, strict=True))
        ]

    @property
    def workload(self) -> Workload:
        """The job as a run measures it before it starts."""
        lengths = Lengths(len(self.rows))
        for at, request in enumerate(self.requests()):
            lengths[at] = RowLength.of([request], _CONTEXT)
        return lengths.measured(_CONTEXT).workload

    @property
    def waiting(self) -> list[tuple[int, int]]:
        """The rows as `simulate` takes them."""
        return rows_of_samples(self.rows, self.samples)

    def to_json(self) -> dict:
        """For the record; the rows by their means."""
        w = self.workload
        job = {"rows": w.num_requests, "prompt_len": w.prompt_len, "gen_len": w.gen_len, "longest_row": w.longest_row}
        return {"name": self.name, "model": self.model, "kind": self.kind, "policy": asdict(self.policy), **job}


def rows_of_samples(requests: Iterable[tuple[int, int]], samples: int) -> list[tuple[int, int]]:
    """A row for each sample; a prompt that is scored takes the sweep that computes it, as one that gets a token."""
    return [(s, n) if n else (max(1, s - 1), 1) for s, n in requests for _ in range(samples)]


def draw(
    archs: dict[str, ModelArch],
    hardware: Hardware,
    seed: int,
    each: int,
    *,
    seconds: tuple[float, float] = SECONDS,
    turns: int = 100_000,
) -> list[Configuration]:
    """``each`` configurations of every class, the models in turn; fewer of a class that ``turns`` draws do not fill.

    Once the jobs that computing bounds are found, those that compute little are drawn for a while, as on slow cores few of the
    others are bound by anything else.

    Args:
        seconds: shortest and longest time that a run may be predicted to take.
    """
    classes = CLASSES[hardware.device]
    rng, found, missing, lean = random.Random(seed), [], Counter(dict.fromkeys(classes, each)), 0
    for turn in range(turns):
        if not +missing:
            break
        model = sorted(archs)[turn % len(archs)]
        is_lean = missing["compute"] <= 0 and lean < LEAN_TURNS
        lean += is_lean
        policy, rows = _lean_candidate(rng) if is_lean else _candidate(rng)
        try:
            prediction = evaluate(archs[model], hardware, Workload.of_lengths(rows), policy)
        except InfeasibleError:
            continue
        bound = classify(prediction, hardware.device)
        if missing[bound] > 0 and seconds[0] <= prediction.wall_s <= seconds[1]:
            missing[bound] -= 1
            name = f"{bound}-{each - missing[bound]}"
            found.append(Configuration(name=name, model=model, kind=bound, policy=policy, rows=rows))
    return sorted(found, key=lambda c: (classes.index(c.kind), c.name))


def classify(prediction: Prediction, device: str) -> str:
    """By the lanes' seconds; on device cpu the compute lanes share the cores, and the link is no matter of its own."""
    lanes = prediction.lanes_s
    work_s = {"disk": lanes["disk_read"] + lanes["disk_write"], "compute": lanes["gpu"] + lanes["cpu"]}
    if device == "cuda":
        work_s |= {"link": max(lanes["h2d"], lanes["d2h"]), "compute": max(lanes["gpu"], lanes["cpu"])}
    first, second = sorted(work_s, key=work_s.__getitem__, reverse=True)[:2]
    return first if work_s[first] > FACTOR * work_s[second] else "balanced"


def _candidate(rng: random.Random) -> tuple[Policy, tuple[tuple[int, int], ...]]:
    batch = rng.choice(GPU_BATCHES)
    blocks = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 32) if BLOCKS[0] <= n * batch <= BLOCKS[1]]
    count = rng.choice(blocks)
    prompt, completion = _log_uniform(rng, *PROMPTS), _log_uniform(rng, *COMPLETIONS)
    ragged = rng.random() < 0.5
    number = max(1, round(batch * count * rng.choice((0.75, 1, 1.5, 2.5))))
    mean = Workload.of_lengths(_row(rng, prompt, completion) if ragged else (prompt, completion) for _ in range(number))
    rows = tuple(islice(shuffled_rows(mean, seed=0), number))
    return drawn_policy(rng, mean, batch, count), rows


def _lean_candidate(rng: random.Random) -> tuple[Policy, tuple[tuple[int, int], ...]]:
    """Few short rows, and most of the weights on the disk."""
    rows = rng.choice(FEW_ROWS)
    count = rng.choice([n for n in (1, 2, 3, 4) if n <= rows])
    prompt, completion = _log_uniform(rng, *SHORT_PROMPTS), _log_uniform(rng, *SHORT_COMPLETIONS)
    number = round(rows * rng.choice((1, 1.5, 2.5)))
    mean = Workload.of_lengths(_row(rng, prompt, completion) for _ in range(number))
    policy = drawn_policy(rng, mean, -(-rows // count), count)
    policy = replace(policy, w_gpu_percent=rng.choice((0.0, 0.0, 20.0)), w_cpu_percent=rng.choice((0.0, 0.0, 30.0)))
    return policy, tuple(islice(shuffled_rows(mean, seed=0), number))


def drawn_policy(
    rng: random.Random, workload: Workload, gpu_batch_size: int, num_gpu_batches: int, schedule: str | None = None
) -> Policy:
    """A policy with random shares, whatever its bytes.

    Args:
        schedule: default: drawn, too.
    """
    return Policy.from_percent(
        (*_shares(rng), *_shares(rng), *_shares(rng)),
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        schedule=schedule or rng.choice(SCHEDULES),
        prefill_tokens=rng.choice((None, None, 256, 1024)),
        cpu_attention_percent=rng.choice((0, 50, 100)),
    )


def _row(rng: random.Random, prompt: int, completion: int) -> tuple[int, int]:
    length = min(PROMPTS[1], max(PROMPTS[0], round(prompt * rng.uniform(0.4, 1.6))))
    return length, min(COMPLETIONS[1], max(COMPLETIONS[0], round(completion * rng.uniform(0.4, 1.6))))


def _shares(rng: random.Random) -> tuple[int, int]:
    """(GPU, CPU) percents, corners more often than chance would have them."""
    gpu = rng.choice((0, 0, 20, 50, 80, 100, rng.randrange(101)))
    return gpu, rng.choice((0, 100 - gpu, rng.randrange(101 - gpu)))


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(low * (high / low) ** rng.random())
