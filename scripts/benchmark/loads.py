"""The jobs of the benchmark and the arithmetic of its limits. Pure: no torch, no files, no clock.

A limit is max(D, C): D = disk-tier bytes · fewest sweeps / disk rate, C = the same job with everything resident. Of the bytes
those count that are read: in sweeps of few tokens no token reaches some of the experts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cost_model.memory.allocation import PAGE_TOKENS

FIRST_TOKEN = 3  # below are <pad>, <s> and </s>
CLASSES = {"disk-bound": (2.0, None), "balanced": (0.8, 1.25), "compute-bound": (None, 0.5)}
AIM = {"disk-bound": 2.5, "balanced": 1.0, "compute-bound": 0.4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Prompts with their lengths to generate, and the prompt tokens that should enter a sweep.

    Args:
        prompts: token ids of each row.
        max_tokens: tokens to generate for each row; every row generates exactly that many.
        prefill_tokens: pace of admission.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]
    prefill_tokens: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.prompts)

    @property
    def new_tokens(self) -> int:
        """Tokens that the job asks for: the denominator of every rate here."""
        return sum(self.max_tokens)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def processed_tokens(self) -> int:
        """Tokens that pass through the layers: a row's last token is generated, but never fed back."""
        return self.prompt_tokens + self.new_tokens - self.rows

    @property
    def fewest_sweeps(self) -> int:
        """No schedule needs fewer: a row makes at most one token a sweep."""
        return max(self.max_tokens)

    @property
    def kv_tokens(self) -> int:
        """KV capacity in which all rows fit at once."""
        lengths = (len(p) + m for p, m in zip(self.prompts, self.max_tokens, strict=True))
        return sum(-(-length // PAGE_TOKENS) * PAGE_TOKENS for length in lengths)

    def subset(self, rows: Sequence[int]) -> Job:
        """The job of only these rows, in this order."""
        return Job(
            prompts=tuple(self.prompts[i] for i in rows),
            max_tokens=tuple(self.max_tokens[i] for i in rows),
            prefill_tokens=self.prefill_tokens,
        )


def staggered_job(*, sweeps: int, tokens_per_sweep: int, prompt_len: int, vocab: int, seed: int, ragged: bool) -> Job:
    """Rows whose lengths descend from `sweeps` to 1, each group entering one sweep after the last, all ending together.

    Every group of rows with one length holds the same number of prompt tokens, which is also the pace, so group k
    enters in sweep k and every sweep carries nearly `tokens_per_sweep` tokens.

    Args:
        prompt_len: mean prompt length wished for; the real one follows from whole rows.
        ragged: prompts of a group differ by up to a factor of three; otherwise they are equal within one token.
    """
    rng = random.Random(seed)
    group = max(1, round(tokens_per_sweep / (prompt_len + (sweeps - 1) / 2)))
    prefill_tokens = max(group, round(tokens_per_sweep - group * (sweeps - 1) / 2))
    prompts, max_tokens = [], []
    for length in range(sweeps, 0, -1):
        weights = [rng.uniform(0.5, 1.5) if ragged else 1.0 for _ in range(group)]
        prompts += [_prompt(rng, size, vocab) for size in split(prefill_tokens, weights)]
        max_tokens += [length] * group
    return Job(prompts=tuple(prompts), max_tokens=tuple(max_tokens), prefill_tokens=prefill_tokens)


def ragged_job(*, rows: int, vocab: int, seed: int, longest_prompt: int = 512, longest_new: int = 64) -> Job:
    """Prompts of 8 to `longest_prompt` tokens and 1 to `longest_new` new ones, in no order."""
    rng = random.Random(seed)
    prompts = tuple(_prompt(rng, rng.randint(8, longest_prompt), vocab) for _ in range(rows))
    max_tokens = tuple(rng.randint(1, longest_new) for _ in range(rows))
    pace = -(-sum(map(len, prompts)) // max(max_tokens))
    return Job(prompts=prompts, max_tokens=max_tokens, prefill_tokens=max(pace, longest_prompt))


def equal_job(*, rows: int, prompt_len: int, new_tokens: int, vocab: int, seed: int, prefill_tokens: int = 0) -> Job:
    """Equal rows; without `prefill_tokens` they all enter at once."""
    rng = random.Random(seed)
    prompts = tuple(_prompt(rng, prompt_len, vocab) for _ in range(rows))
    pace = prefill_tokens or rows * prompt_len
    return Job(prompts=prompts, max_tokens=(new_tokens,) * rows, prefill_tokens=pace)


def split(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers of at least 1, near the weights' shares, that sum to `total`."""
    if total < len(weights):
        raise ValueError(f"{total} cannot be split into {len(weights)} numbers of at least 1")
    spare, sizes, given, reached = total - len(weights), [], 0, 0.0
    for weight in weights:
        reached += weight
        upto = round(spare * reached / sum(weights))
        sizes.append(1 + upto - given)
        given = upto
    return sizes


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds of a sweep when everything is resident, by its tokens: straight lines between measured points.

    A sweep of few tokens and one of many are bound by different things, so one line is not enough.

    Args:
        points: tokens of a sweep and its seconds, two or more.
    """

    points: tuple[tuple[float, float], ...]

    def seconds(self, job: Job) -> float:
        """C as predicted."""
        tokens = job.processed_tokens / job.fewest_sweeps
        fixed_s, token_s = self._line(lambda point: point[0] >= tokens)
        return job.fewest_sweeps * (fixed_s + token_s * tokens)

    def tokens(self, sweep_s: float) -> float:
        """Tokens of a sweep that takes so long; below 0 where no sweep is so short."""
        fixed_s, token_s = self._line(lambda point: point[1] >= sweep_s)
        return (sweep_s - fixed_s) / token_s

    def corrected(self, job: Job, measured_s: float) -> Compute:
        """With what a job really took, instead of what was known of sweeps that are alike."""
        tokens, sweep_s = job.processed_tokens / job.fewest_sweeps, measured_s / job.fewest_sweeps
        others = [p for p in self.points if not 0.7 < p[0] / tokens < 1.4 and (p[0] < tokens) == (p[1] < sweep_s)]
        if others:
            return Compute((*others, (tokens, sweep_s)))
        factor = measured_s / self.seconds(job)
        return Compute(tuple((n, factor * s) for n, s in self.points))

    def _line(self, reaches: Callable[[tuple[float, float]], bool]) -> tuple[float, float]:
        """Between the first point that reaches what is asked and the one before it."""
        points = sorted(self.points)
        at = next((i for i, point in enumerate(points) if reaches(point)), len(points) - 1)
        return line_through(*points[max(0, at - 1) :][:2])


def size_job(
    kind: str, *, disk_s: float, compute: Compute, run_s: float, vocab: int, seed: int, ragged: bool = True
) -> Job:
    """A staggered job of the class `kind`.

    Args:
        disk_s: seconds that one sweep's disk reads take.
        compute: what the compute side takes.
        run_s: about how long the job should run; the sweeps follow.
    """
    compute_s = disk_s / AIM[kind]
    sweeps = min(48, max(5, round(run_s / max(disk_s, compute_s))))
    tokens = max(8, round(compute.tokens(compute_s)))
    prompt_len = min(256, max(4, tokens // 8))
    return staggered_job(
        sweeps=sweeps, tokens_per_sweep=tokens, prompt_len=prompt_len, vocab=vocab, seed=seed, ragged=ragged
    )


def in_class(kind: str, disk_s: float, compute_s: float) -> bool:
    """Whether D/C lies where the class wants it."""
    low, high = CLASSES[kind]
    ratio = disk_s / compute_s
    return (low is None or ratio >= low) and (high is None or ratio <= high)


def probes_agree(before: float, after: float) -> bool:
    """Whether two rates differ by at most 20 % of the smaller one."""
    return max(before, after) <= 1.2 * min(before, after)


def limit_fraction(disk_s: float, compute_s: float, wall_s: float) -> float:
    """max(D, C) / T: 1 is a job that takes no longer than its slower side."""
    return max(disk_s, compute_s) / wall_s


def batches(job: Job, size: int, *, by_length: bool) -> list[list[int]]:
    """Row numbers cut into batches, in file order or with prompts sorted by length, longest first."""
    order = list(range(job.rows))
    if by_length:
        order.sort(key=lambda i: (-len(job.prompts[i]), -job.max_tokens[i]))
    return [order[i : i + size] for i in range(0, job.rows, size)]


def padded_tokens(job: Job, rows: Sequence[int]) -> int:
    """Prompt tokens of a batch that is padded to its longest prompt."""
    return len(rows) * max(len(job.prompts[i]) for i in rows)


def batch_steps(job: Job, rows: Sequence[int]) -> int:
    """Decode steps of a batch that runs to its longest row, after the prefill that makes the first token."""
    return max(job.max_tokens[i] for i in rows) - 1


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` numbers below `count`, evenly spread from the middle of each part: a stated sample of batches."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def line_through(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """(intercept, slope) of the line through two points: cost = fixed + each · tokens.

    Where noise makes either negative, the line through the origin that is below neither point.
    """
    (x0, y0), (x1, y1) = first, second
    slope = (y1 - y0) / (x1 - x0)
    if slope <= 0 or y0 - slope * x0 < 0:
        return 0.0, max(y0 / x0, y1 / x1)
    return y0 - slope * x0, slope


def steady_mean(rows_in_flight: Sequence[int], new_tokens: int) -> float:
    """Mean rows in flight between the fill (two lives of a row) and the drain (the last life).

    Raises:
        ValueError: the job was too short to have a steady state.
    """
    steady = rows_in_flight[2 * new_tokens : len(rows_in_flight) - new_tokens]
    if not steady:
        raise ValueError(f"{len(rows_in_flight)} sweeps of rows that live {new_tokens} hold no steady state")
    return sum(steady) / len(steady)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _prompt(rng: random.Random, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN, vocab) for _ in range(length))
