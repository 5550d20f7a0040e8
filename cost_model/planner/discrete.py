"""What is discrete: the choices that the linear programme is solved for, coarse first, then around the best ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from cost_model.memory.allocation import residency
from cost_model.model.weight_units import unit_slack_bytes
from cost_model.planner.constraints import Choice, Fixed
from cost_model.planner.lp import Programme, Relaxed
from cost_model.planner.moves import MOST_BATCHES
from cost_model.timing.problem import Problem
from cost_model.timing.sweep_load import MODES
from policies.common.checks import PERCENT_TOLERANCE
from policies.policy import SCHEDULES, Policy

#: Rows of a GPU batch; with less effort than this, the middle one alone.
_SIZES, _MIDDLE_SIZE, _THOROUGH = (4, 64, 1024), (64,), 0.1
_REFINED = 5
_NEAR = (0.25, 0.5, 2, 4)
#: Block sizes of a finite job: all rows at once, half of them, and so on; and how far one may grow in its programme.
_HALVINGS = (0, 1, 2, 3, 5, 7)
_BRACKET = 1.2
#: Fewer slots than this are what the runtime takes by itself.
_OWN_SLOTS = 4.5


class Choices:
    """The programmes of all discrete choices that are worth one.

    Args:
        problem, fixed: what is planned, and what the user has decided.
    """

    def __init__(self, problem: Problem, fixed: Fixed):
        self.problem, self.fixed, self.programmes = problem, fixed, 0
        workload = problem.workload
        wanted = [workload.num_requests] if workload.num_requests else []
        if problem.kv_tokens:
            wanted.append(max(1, problem.kv_tokens // (workload.prompt_len + workload.gen_len // 2 + 8)))
        self.max_rows = min(wanted, default=None)

    def run(self, effort: float = 1.0) -> list[Relaxed]:
        """All choices, coarse; then the best ones at their own block size, and at neighbouring GPU batch sizes."""
        sizes = _SIZES if effort >= _THOROUGH else _MIDDLE_SIZE
        coarse = _best([found for family in self._families() for found in self._family(*family, sizes)])
        coarse = _best([*coarse, *self._in_halves(coarse)])
        refined = [
            self.solve(choice)
            for found in coarse[: ceil(_REFINED * min(1, effort))]
            for choice in self.around(self._own(found))
        ]
        return _best([*coarse, *filter(None, refined)])

    def _in_halves(self, coarse: list[Relaxed]) -> list[Relaxed]:
        """The best of each kind once more, marching as two half-blocks."""
        if not halves_may_pay(self.problem, self.fixed):
            return []
        kinds = {(found.choice.schedule, found.choice.modes): found.choice for found in reversed(coarse)}
        return [found for choice in kinds.values() if (found := self.solve(replace(choice, half_blocks=2)))]

    def solve(self, choice: Choice) -> Relaxed | None:
        """The optimum of one choice; None where nothing fits."""
        self.programmes += 1
        return Programme(self.problem, choice, self.fixed).solve()

    def bracket(self, choice: Choice, rows: float) -> Choice:
        """The choice at a nominal block size. That of a finite job may not grow far: how often it is filled is given by it."""
        rows = max(1.0, min(rows, self.max_rows or rows))
        if self.problem.workload.num_requests is None or self.max_rows is None:
            return replace(choice, rows=rows, most_rows=self.max_rows)
        return replace(choice, rows=rows, most_rows=min(self.max_rows, _BRACKET * rows))

    def _families(self) -> Iterator[tuple[str, float]]:
        """(schedule, sweeps in which a block fills). An endless rolling job is filled once, so only its pace counts."""
        sweeps = self.problem.workload.gen_len
        for schedule in SCHEDULES if self.fixed.schedule is None else (self.fixed.schedule,):
            fills = {1.0, max(1.0, sweeps / 5)}
            if schedule == "rolling":
                finite = self.problem.workload.num_requests is not None
                fills = {float(sweeps)} | ({max(1.0, sweeps / 5)} if finite else set())
            for fill in sorted(fills):
                yield schedule, fill

    def _family(self, schedule: str, fill: float, sizes: tuple[int, ...]) -> list[Relaxed]:
        fixed, rows = self.fixed, self.max_rows or 1000
        if fixed.gpu_batch_size and fixed.num_gpu_batches:
            rows = fixed.gpu_batch_size * fixed.num_gpu_batches
        act_gpu = fixed.act_gpu_percent if fixed.act_gpu_percent is not None else 100.0 - (fixed.act_cpu_percent or 0.0)
        template = Choice(
            schedule=schedule,
            fill_sweeps=fill,
            gpu_batch_size=fixed.gpu_batch_size or 64,
            modes=("gpu", "fetch", "cpu", "disk"),
            rows=rows,
            act_percents=(act_gpu, fixed.act_cpu_percent or 0.0),
            overlap=fixed.overlap,
            pin_weight=fixed.pin_weight,
            compress_cache=fixed.compress_cache,
            half_blocks=fixed.half_blocks or 1,
        )
        tried = []
        for streams, modes in self._placements():
            near = self._nominal(replace(template, streams=streams))
            own = [size for size in sizes if size * MOST_BATCHES >= near.rows] or _SIZES[-1:]
            if fixed.gpu_batch_size:
                own = [fixed.gpu_batch_size]
            tried += [self.solve(replace(near, modes=m, gpu_batch_size=size)) for m in modes for size in own]
        return [found for found in tried if found]

    def _nominal(self, template: Choice) -> Choice:
        """The template at the block size that suits it: the programme's own, or of a finite job the best bracket's."""
        if self.problem.workload.num_requests is None:
            found = self.solve(self.bracket(template, template.rows))
            return self.bracket(template, found.block_size if found else min(template.rows, 16))
        tried = [self.bracket(template, template.rows / 2**power) for power in _HALVINGS]
        solved = [found for found in map(self.solve, tried) if found]
        best = max(solved, key=lambda found: found.tokens_per_s, default=None)
        return self.bracket(template, best.block_size if best else min(template.rows, 16))

    def _placements(self) -> Iterator[tuple[bool, list[tuple[str, ...]]]]:
        """(weights may live outside the GPU, modes) that are worth programmes of their own, as each has its own buffers."""
        fixed, hardware = self.fixed, self.problem.hardware
        if fixed.cache_gpu_percent is None and fixed.cache_cpu_percent is None:
            found = [("gpu", "cpu"), ("fetch", "cpu"), ("gpu", "fetch"), ("gpu", "fetch", "cpu")]
            if hardware.disk_bytes:
                found += [("fetch", "disk"), ("gpu", "cpu", "disk")]
        else:
            found = [("gpu", "fetch", "cpu", "disk"), ("gpu", "cpu", "disk"), ("gpu", "fetch", "disk")]
        yield True, found
        units = residency(self.problem.arch)
        resident = self.problem.arch.computed_bytes(units.prefix_bytes[-1], self.problem.dtype_bytes)
        resident += len(units.order) * unit_slack_bytes(self.problem.arch)
        budgets = [size for name, size in hardware.budgets().items() if "gpu" in name and size is not None]
        if resident < min(budgets, default=0):
            yield False, found[:2]

    def around(self, choice: Choice) -> Iterator[Choice]:
        """The choice, and the same with other GPU batch sizes."""
        yield choice
        if not self.fixed.gpu_batch_size:
            for factor in _NEAR:
                yield replace(choice, gpu_batch_size=max(1, round(choice.gpu_batch_size * factor)))

    def _own(self, found: Relaxed) -> Choice:
        """The choice at the block size that came out, without disk weights where none were used."""
        at = self.bracket(found.choice, found.block_size)
        used = found.weight_bytes["disk"] >= 1e-6 * sum(found.weight_bytes.values())
        return at if used or not at.streams else replace(at, disk_weights=False)


def halves_may_pay(problem: Problem, fixed: Fixed) -> bool:
    """Whether two half-blocks are worth a look: the user leaves them open, and lanes do not share the cores."""
    return fixed.half_blocks is None and fixed.overlap and problem.hardware.device != "cpu"


def choice_of(policy: Policy, problem: Problem) -> Choice:
    """What a policy has chosen of what is discrete."""
    placed = residency(problem.arch, policy.expert_order).place(policy.w_gpu_percent, policy.w_cpu_percent)
    on_host = policy.cache_cpu_percent > 0
    used = {
        "gpu": policy.cache_gpu_percent > 0,
        "fetch": on_host and policy.cpu_attention_percent < 100,
        "disk": policy.cache_gpu_percent + policy.cache_cpu_percent < 100 - PERCENT_TOLERANCE,
        "cpu": on_host and policy.cpu_attention_percent > 0,
    }
    return Choice(
        schedule=policy.schedule,
        fill_sweeps=policy.block_size * problem.workload.prompt_len / policy.prefill_tokens,
        gpu_batch_size=policy.gpu_batch_size,
        modes=tuple(mode for mode in MODES if used[mode]),
        rows=policy.block_size,
        streams=placed.count_of("gpu") < len(placed.residency.order),
        disk_weights=placed.count_of("disk") > 0,
        act_percents=(policy.act_gpu_percent, policy.act_cpu_percent),
        overlap=policy.overlap,
        pin_weight=policy.pin_weight,
        compress_cache=policy.compress_cache,
        half_blocks=policy.half_blocks,
    )


def _best(found: list[Relaxed]) -> list[Relaxed]:
    return sorted(found, key=lambda relaxed: -relaxed.tokens_per_s)


def rounded(relaxed: Relaxed, problem: Problem, fixed: Fixed) -> Policy:
    """The policy that is nearest to an optimum. Its bytes may be a little too many: `Objective.fitted` sees to that."""
    choice, rows, block = relaxed.choice, relaxed.rows, relaxed.block_size
    size = min(choice.gpu_batch_size, max(1, round(block)))
    count = fixed.num_gpu_batches or max(1, round(block / size))
    on_host = rows.get("fetch", 0.0) + rows.get("cpu", 0.0)
    weights = relaxed.weight_bytes
    w_gpu, w_cpu = _percents(weights["gpu"], weights["cpu"], sum(weights.values()))
    cache_gpu, cache_cpu = _percents(rows.get("gpu", 0.0), on_host, block)
    return fixed.applied(
        Policy(
            gpu_batch_size=size,
            num_gpu_batches=count,
            w_gpu_percent=w_gpu,
            w_cpu_percent=w_cpu,
            cache_gpu_percent=cache_gpu,
            cache_cpu_percent=cache_cpu,
            act_gpu_percent=choice.act_percents[0],
            act_cpu_percent=choice.act_percents[1],
            prefill_tokens=max(1, ceil(size * count * problem.workload.prompt_len / choice.fill_sweeps)),
            cpu_attention_percent=min(100.0, 100 * rows.get("cpu", 0.0) / on_host) if on_host else 0.0,
            schedule=choice.schedule,
            weight_slots=max(2, round(relaxed.slots)) if relaxed.slots > _OWN_SLOTS else None,
            half_blocks=choice.half_blocks if count > 1 else 1,
        )
    )


def _percents(gpu: float, cpu: float, total: float) -> tuple[float, float]:
    share = min(100.0, 100 * gpu / total)
    return share, min(100 - share, 100 * cpu / total)
