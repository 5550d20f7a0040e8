"""Steps from one policy to a neighbouring one. A step size of 1 doubles or halves; small ones end at a single unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil

from cost_model.planner.objective import with_cache
from policies.policy import SCHEDULES, Policy
from policies.workload import Workload

_DEFAULT_SLOTS = 4
#: More GPU batches than this are not tried: their dispatch alone outlasts what smaller buffers give.
MOST_BATCHES = 1024


_PAIRING = {
    *(
        f"{name} batches, {hold}"
        for name in ("more", "fewer", "larger", "smaller")
        for hold in ("shares", "gpu", "tokens")
    ),
    *("larger and fewer", "smaller and more", "more and smaller", "fewer and larger"),
    *("kv 0 to 1", "kv 1 to 0", "kv 1 to 2", "kv 2 to 1", "more cpu attention", "less cpu attention"),
    *("faster prefill", "slower prefill", "more slots", "fewer slots"),
    *("activations on the gpu", "activations in host memory", "weights on the gpu", "weights in host memory"),
}


@dataclass(frozen=True, slots=True)
class Move:
    """``apply(policy, step)`` is the neighbour, or None where there is none."""

    name: str
    apply: Callable[[Policy, float], Policy | None]

    @property
    def pairs(self) -> bool:
        """Worth trying beside another."""
        return self.name in _PAIRING

    @property
    def fewer_rows(self) -> bool:
        """Leaves fewer rows in flight."""
        return self.name.startswith(("fewer batches", "smaller batches"))


def moves(workload: Workload) -> tuple[Move, ...]:
    """All moves, those first that matter most often."""
    return tuple(
        Move(name, apply)
        for name, apply in (
            *_row_moves(workload),
            *_cache_moves(),
            *_attention_moves(),
            *_pace_moves(workload),
            *_slot_moves(),
            *_activation_moves(),
            *_weight_moves(),
            *_schedule_moves(workload),
        )
    )


def up(count: int, step: float) -> int:
    """The next larger count."""
    return max(count + 1, round(count * (1 + step)))


def down(count: int, step: float) -> int:
    """The next smaller count, at least 1."""
    return max(1, min(count - 1, round(count / (1 + step))))


def even_pace(policy: Policy, workload: Workload) -> int:
    """Prompt tokens per sweep with which all sweeps are alike; all of a static block's at once."""
    sweeps = workload.gen_len if policy.schedule == "rolling" else 1
    return max(1, ceil(policy.block_size * workload.prompt_len / sweeps))


# Rows.


def resized(policy: Policy, size: int, count: int, hold: str, workload: Workload) -> Policy | None:
    """The policy with ``count`` GPU batches of ``size`` rows, prompts entering at the same pace per row.

    Args:
        hold: where the KV of rows that come or go lives: "shares" in all tiers, "gpu" in host memory and on disk, "disk"
            on disk only; "tokens" as "shares", but as many tokens of prompts enter a sweep as before.

    Returns:
        None where that is the same policy, out of proportion, or ``hold`` is no different from "shares".
    """
    block, rows = policy.block_size, size * count
    if (size, count) == (policy.gpu_batch_size, policy.num_gpu_batches) or count > max(
        MOST_BATCHES, policy.num_gpu_batches
    ):
        return None
    if workload.num_requests and rows > 2 * workload.num_requests:
        return None
    tokens = policy.prefill_tokens if hold == "tokens" else max(1, ceil(policy.prefill_tokens / block * rows))
    changes = {"gpu_batch_size": size, "num_gpu_batches": count, "prefill_tokens": tokens}
    gpu, cpu, kept = policy.cache_gpu_percent, policy.cache_cpu_percent, block / rows
    if hold in ("shares", "tokens") or rows == block:
        return replace(policy, **changes)
    if hold == "gpu":
        if gpu == 0 or (gpu == 100 and rows < block):
            return None
        return with_cache(policy, gpu * kept, gpu + cpu - gpu * kept, **changes)
    if rows < block and gpu + cpu >= 100:
        return None
    return with_cache(policy, gpu * kept, cpu * kept, **changes)


def _row_moves(workload: Workload) -> Iterator[tuple[str, Callable]]:
    def counted(change: Callable[[int, float], int], hold: str):
        return lambda p, step: resized(p, p.gpu_batch_size, change(p.num_gpu_batches, step), hold, workload)

    def sized(change: Callable[[int, float], int], hold: str):
        return lambda p, step: resized(p, change(p.gpu_batch_size, step), p.num_gpu_batches, hold, workload)

    for hold in ("shares", "gpu", "tokens", "disk"):
        yield f"more batches, {hold}", counted(up, hold)
        yield f"fewer batches, {hold}", counted(down, hold)
        yield f"larger batches, {hold}", sized(up, hold)
        yield f"smaller batches, {hold}", sized(down, hold)

    def cut(change: Callable[[int, float], int], by_count: bool, fit: Callable[[float], int]):
        """The same rows in other batches."""

        def apply(policy: Policy, step: float) -> Policy | None:
            given = change(policy.num_gpu_batches if by_count else policy.gpu_batch_size, step)
            other = max(1, fit(policy.block_size / given))
            size, count = (other, given) if by_count else (given, other)
            return resized(policy, size, count, "shares", workload)

        return apply

    def more_in(fewer: Callable[[int], int]):
        """A few rows more, which the present cut may not allow."""

        def apply(policy: Policy, step: float) -> Policy | None:
            count = fewer(policy.num_gpu_batches)
            return resized(policy, ceil(up(policy.block_size, step) / count), count, "shares", workload)

        return apply

    yield "more rows in one batch", more_in(lambda count: 1)
    yield "more rows in half the batches", more_in(lambda count: max(1, count // 2))
    yield "larger and fewer", cut(up, False, int)
    yield "smaller and more", cut(down, False, ceil)
    yield "more and smaller", cut(up, True, int)
    yield "fewer and larger", cut(down, True, ceil)


# KV and attention.


def _cache_moves() -> Iterator[tuple[str, Callable]]:
    def shift(source: int, target: int):
        def apply(policy: Policy, step: float) -> Policy | None:
            shares = [policy.cache_gpu_percent, policy.cache_cpu_percent, 0.0]
            shares[2] = max(0.0, 100 - shares[0] - shares[1])
            moved = min(shares[source], 100 * step)
            if moved <= 0:
                return None
            shares[source] -= moved
            shares[target] += moved
            return with_cache(policy, shares[0], shares[1])

        return apply

    for source, target in ((0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)):
        yield f"kv {source} to {target}", shift(source, target)


def _attention_moves() -> Iterator[tuple[str, Callable]]:
    def to(share: Callable[[float, float], float]):
        def apply(policy: Policy, step: float) -> Policy | None:
            if not policy.cache_cpu_percent:
                return None
            return replace(
                policy, cpu_attention_percent=min(100.0, max(0.0, share(policy.cpu_attention_percent, step)))
            )

        return apply

    yield "all cpu attention", to(lambda share, step: 100.0)
    yield "no cpu attention", to(lambda share, step: 0.0)
    yield "more cpu attention", to(lambda share, step: share + 50 * step)
    yield "less cpu attention", to(lambda share, step: share - 50 * step)


# Pace, slots, activations, schedule.


def _pace_moves(workload: Workload) -> Iterator[tuple[str, Callable]]:
    def pieces(more: int):
        """The fewest tokens with which a prompt enters in one piece less, or more."""

        def apply(policy: Policy, step: float) -> Policy | None:
            count = ceil(workload.prompt_len / policy.prefill_tokens) + more
            return replace(policy, prefill_tokens=ceil(workload.prompt_len / count)) if count > 0 else None

        return apply

    yield "faster prefill", lambda p, step: replace(p, prefill_tokens=up(p.prefill_tokens, step))
    yield "slower prefill", lambda p, step: replace(p, prefill_tokens=down(p.prefill_tokens, step))
    yield "even pace", lambda p, step: replace(p, prefill_tokens=even_pace(p, workload))
    yield "prompts in fewer pieces", pieces(-1)
    yield "prompts in more pieces", pieces(1)
    yield "all at once", lambda p, step: replace(p, prefill_tokens=p.block_size * workload.prompt_len)


def _slot_moves() -> Iterator[tuple[str, Callable]]:
    def more(policy: Policy, step: float) -> Policy:
        return replace(policy, weight_slots=up(policy.weight_slots or _DEFAULT_SLOTS, step))

    def fewer(policy: Policy, step: float) -> Policy:
        return replace(policy, weight_slots=max(2, down(policy.weight_slots or _DEFAULT_SLOTS, step)))

    yield "more slots", more
    yield "fewer slots", fewer
    yield "own slots", lambda p, step: replace(p, weight_slots=None) if p.weight_slots else None


def _activation_moves() -> Iterator[tuple[str, Callable]]:
    def to(gpu: float, cpu: float):
        return lambda p, step: replace(p, act_gpu_percent=gpu, act_cpu_percent=cpu)

    def down_by(policy: Policy, step: float) -> Policy:
        gpu = max(0.0, policy.act_gpu_percent - 100 * step)
        return replace(policy, act_gpu_percent=gpu, act_cpu_percent=100 - gpu)

    def up_by(policy: Policy, step: float) -> Policy:
        gpu = min(100.0, policy.act_gpu_percent + 100 * step)
        return replace(policy, act_gpu_percent=gpu, act_cpu_percent=min(policy.act_cpu_percent, 100 - gpu))

    yield "activations on the gpu", to(100.0, 0.0)
    yield "activations in host memory", to(0.0, 100.0)
    yield "fewer activations on the gpu", down_by
    yield "more activations on the gpu", up_by


def _weight_moves() -> Iterator[tuple[str, Callable]]:
    """Between the two tiers that are one memory on device cpu; elsewhere the fastest tiers are filled anyway."""

    def to(gpu: bool):
        def apply(policy: Policy, step: float) -> Policy | None:
            held = policy.w_gpu_percent + policy.w_cpu_percent
            there = policy.w_gpu_percent if gpu else policy.w_cpu_percent
            return None if there == held else replace(policy, w_gpu_percent=held * gpu, w_cpu_percent=held * (not gpu))

        return apply

    yield "weights on the gpu", to(True)
    yield "weights in host memory", to(False)


def _schedule_moves(workload: Workload) -> Iterator[tuple[str, Callable]]:
    def other(policy: Policy) -> Policy:
        return replace(policy, schedule=SCHEDULES[1 - SCHEDULES.index(policy.schedule)])

    def at_its_pace(policy: Policy, step: float) -> Policy:
        changed = other(policy)
        return replace(changed, prefill_tokens=even_pace(changed, workload))

    yield "other schedule", lambda p, step: other(p)
    yield "other schedule at its pace", at_its_pace
