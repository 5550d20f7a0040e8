"""Candidates that know nothing of the planner: a grid, random policies, and climbs by single units, judged by `evaluate`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, product

from cost_model.memory.allocation import residency
from cost_model.timing.evaluate import evaluate
from policies.common.errors import InfeasibleError
from policies.policy import Policy
from scripts.optimality.random_machines import RandomProblem, log_uniform

_HALVINGS = 6
_DEFAULT_SLOTS = 4

#: (policy, stride) to its neighbour; None where that is out of range.
Move = Callable[[Policy, int], "Policy | None"]


class Rivals:
    """Rivals of one problem's planned policy.

    Attributes:
        judged: policies that fit and were judged.
        refused: policies that did not fit.
    """

    def __init__(self, problem: RandomProblem):
        self.problem = problem
        self.judged = self.refused = 0
        self._known: dict[Policy, float] = {}
        self._rng = random.Random(problem.seed + 1)
        self._moves = tuple(self._unit_moves())

    def tokens_per_s(self, policy: Policy) -> float:
        """What `evaluate` predicts; 0 where the policy does not fit."""
        if policy not in self._known:
            p = self.problem
            try:
                self._known[policy] = evaluate(p.arch, p.hardware, p.workload, policy).tokens_per_s
                self.judged += 1
            except InfeasibleError:
                self._known[policy] = 0.0
                self.refused += 1
        return self._known[policy]

    def candidates(self, count: int) -> list[Policy]:
        """At least so many policies that fit, fewer only where nearly nothing does; from the grid and at random."""
        grid = list(self._grid())
        self._rng.shuffle(grid)
        found = dict.fromkeys(islice(filter(self.tokens_per_s, grid), count // 2))
        for _ in range(20 * count):
            if len(found) >= count:
                break
            policy = self._fitting(self._random())
            if policy is not None:
                found[policy] = None
        return list(found)

    def any_fitting(self, tries: int = 20) -> Policy | None:
        """A random policy that fits; None where so many tries find none."""
        return next(filter(None, (self._fitting(self._random()) for _ in range(tries))), None)

    def best(self, count: int) -> list[Policy]:
        """The best of all that were judged."""
        return sorted(self._known, key=self._known.__getitem__, reverse=True)[:count]

    def climb(self, policy: Policy, most: int) -> Policy:
        """The end of a climb by single units, each direction taken in doubling strides while it helps.

        Args:
            most: judgements to stop after.
        """
        best, last = policy, self.judged + self.refused + most
        while self.judged + self.refused < last:
            start = best
            for move in self._moves:
                stride = 1
                while self.judged + self.refused < last:
                    moved = move(best, stride)
                    if moved is None or self.tokens_per_s(moved) <= self.tokens_per_s(best):
                        break
                    best, stride = moved, 2 * stride
            if best == start:
                break
        return best

    # Candidates.

    def _grid(self) -> Iterator[Policy]:
        weights = [(0, 100), (0, 50), (0, 0), (10, 90), (30, 70), (30, 0), (60, 40), (100, 0)]
        caches = [
            (100, 0, 0),
            (0, 100, 0),
            (0, 100, 100),
            (50, 50, 0),
            (50, 50, 100),
            (20, 80, 100),
            (0, 50, 100),
            (0, 0, 0),
        ]
        for size, count in product((1, 4, 16, 64, 256, 1024), (1, 2, 6, 20, 60)):
            for (w_gpu, w_cpu), (c_gpu, c_cpu, attended) in product(weights, caches):
                for schedule in ("rolling", "static"):
                    yield self._policy(size, count, (w_gpu, w_cpu), (c_gpu, c_cpu), attended, schedule)

    def _policy(self, size: int, count: int, weights, cache, attended: float, schedule: str, **rest) -> Policy:
        job = self.problem.workload
        return Policy.from_percent(
            (*weights, *cache, *rest.pop("act", (100, 0))),
            gpu_batch_size=size,
            num_gpu_batches=count,
            prompt_len=job.prompt_len,
            gen_len=job.gen_len,
            schedule=schedule,
            cpu_attention_percent=attended,
            **rest,
        )

    def _random(self) -> Policy:
        rng, job = self._rng, self.problem.workload
        size, count = (int(log_uniform(rng, 1, most)) for most in (2048, 256))
        schedule = rng.choice(("rolling", "rolling", "static"))
        pace = size * count * job.prompt_len / (job.gen_len if schedule == "rolling" else 1)
        if rng.random() < 0.5:
            pace *= math.exp(rng.uniform(-3, 3))
        return self._policy(
            size,
            count,
            self._shares(),
            self._shares(),
            rng.choice((0, 0, 100, 100, rng.uniform(0, 100))),
            schedule,
            act=self._shares() if rng.random() < 0.2 else (100, 0),
            prefill_tokens=max(1, math.ceil(pace)),
            weight_slots=None if rng.random() < 0.6 else int(log_uniform(rng, 2, 64)),
        )

    def _shares(self) -> tuple[float, float]:
        rng = self._rng
        first = rng.choice((0.0, 0.0, 100.0, rng.uniform(0, 100), rng.uniform(0, 100)))
        if not self.problem.hardware.disk_bytes:
            return first, 100.0 - first
        return first, rng.choice((100.0 - first, 100.0 - first, 0.0, rng.uniform(0, 100.0 - first)))

    def _fitting(self, policy: Policy) -> Policy | None:
        """The policy, with fewer rows and then fewer fast weights until it fits."""
        for _ in range(_HALVINGS):
            for gpu, cpu in ((1, 1), (0.5, 1), (0.1, 1), (0, 1), (0, 0.5), (0, 0)):
                w_gpu = policy.w_gpu_percent * gpu
                w_cpu = policy.w_cpu_percent * cpu if self.problem.hardware.disk_bytes else 100.0 - w_gpu
                lighter = replace(policy, w_gpu_percent=w_gpu, w_cpu_percent=w_cpu)
                if self.tokens_per_s(lighter):
                    return lighter
            size, count = policy.gpu_batch_size, policy.num_gpu_batches
            if size * count == 1:
                return None
            smaller = {"num_gpu_batches": -(-count // 3)} if count > 1 else {"gpu_batch_size": -(-size // 3)}
            policy = replace(policy, prefill_tokens=-(-policy.prefill_tokens // 3), **smaller)
        return None

    # Single units.

    def _unit_moves(self) -> Iterator[Move]:
        """Every direction: the neighbour ``stride`` units away, or None where that is out of range."""
        for gpu, cpu in ((1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)):
            yield partial(self._more_units, gpu, cpu)
        for pair in ("cache", "act"):
            for gpu, cpu in ((1, -1), (-1, 1), (0, 1), (0, -1), (1, 0), (-1, 0)):
                yield partial(_shifted, pair, gpu, cpu)
        for name, sign, paced in product(("gpu_batch_size", "num_gpu_batches"), (1, -1), (False, True)):
            yield partial(_resized, name, sign, paced)
        for tokens in (1, -1, self.problem.workload.prompt_len, -self.problem.workload.prompt_len):
            yield partial(_moved, "prefill_tokens", tokens, (1, math.inf))
        for sign in (1, -1):
            yield partial(_moved, "cpu_attention_percent", sign, (0, 100))
        for sign in (1, -1):
            yield partial(_with_slots, sign)
        yield lambda policy, stride: replace(policy, weight_slots=None)
        yield lambda policy, stride: replace(policy, half_blocks=3 - policy.half_blocks)
        yield lambda policy, stride: replace(policy, schedule="static" if policy.schedule == "rolling" else "rolling")

    def _more_units(self, gpu: int, cpu: int, policy: Policy, stride: int) -> Policy | None:
        units = residency(self.problem.arch.grouped(policy.experts_per_unit), policy.expert_order)
        placed, before = units.place(policy.w_gpu_percent, policy.w_cpu_percent), units.prefix_bytes
        gpu_end, cpu_end = placed.gpu_end + gpu * stride, placed.cpu_end + cpu * stride
        if not 0 <= gpu_end <= cpu_end < len(before):
            return None
        w_gpu, both = (100 * before[end] / before[-1] for end in (gpu_end, cpu_end))
        return replace(policy, w_gpu_percent=w_gpu, w_cpu_percent=min(both, 100) - w_gpu)


def _shifted(pair: str, gpu: int, cpu: int, policy: Policy, stride: int) -> Policy | None:
    """KV by rows, hidden states by GPU batches."""
    step = 100 * stride / (policy.block_size if pair == "cache" else policy.num_gpu_batches)
    names = f"{pair}_gpu_percent", f"{pair}_cpu_percent"
    shares = [getattr(policy, name) + change * step for name, change in zip(names, (gpu, cpu))]
    if min(shares) < -1e-9 or sum(shares) > 100 + 1e-9:
        return None
    first = min(100.0, max(0.0, shares[0]))
    return replace(policy, **{names[0]: first, names[1]: min(max(0.0, shares[1]), 100.0 - first)})


def _resized(name: str, sign: int, paced: bool, policy: Policy, stride: int) -> Policy | None:
    """``paced``: prompts enter as fast per row as before."""
    count = getattr(policy, name) + sign * stride
    if count < 1:
        return None
    tokens = math.ceil(policy.prefill_tokens * count / getattr(policy, name)) if paced else policy.prefill_tokens
    return replace(policy, **{name: count}, prefill_tokens=max(1, tokens))


def _moved(name: str, step: int, bounds: tuple[float, float], policy: Policy, stride: int) -> Policy | None:
    wanted = getattr(policy, name) + step * stride
    return replace(policy, **{name: wanted}) if bounds[0] <= wanted <= bounds[1] else None


def _with_slots(sign: int, policy: Policy, stride: int) -> Policy:
    return replace(policy, weight_slots=max(2, (policy.weight_slots or _DEFAULT_SLOTS) + sign * stride))
