"""Steps from one policy to a neighbouring one. A step size of 1 doubles, halves, or shifts all; small ones end at a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum, auto
from itertools import product
from math import ceil
from typing import Any

from policies.policy import SCHEDULES, Policy
from policies.workload import Workload

#: More GPU batches than this are not tried: their dispatch alone outlasts what smaller buffers give.
MOST_BATCHES = 1024
#: Slots of a policy that leaves them to the runtime, about; and the fewest.
_DEFAULT_SLOTS, _LEAST_SLOTS = 4, 2
#: What a simpler policy leaves on disk, as a part of the KV that was there.
_LEFT_ON_DISK = (0.0, 0.25, 0.5, 0.75)
_FEWER_ROWS_STEP = 0.1
_GPU, _CPU, _DISK = range(3)

#: (policy, step) to the neighbour, or None where there is none.
Move = Callable[[Policy, float], "Policy | None"]
_Change = Callable[[int, float], int]


class Held(Enum):
    """What stays when rows come or go; prompts enter at the same pace per row, but for `SHARES_AND_PACE`."""

    SHARES = auto()
    GPU_ROWS = auto()
    SHARES_AND_PACE = auto()
    GPU_AND_HOST_ROWS = auto()


def moves(workload: Workload) -> tuple[Move, ...]:
    """All moves, those first that matter most often."""
    shifts = ((_GPU, _CPU), (_CPU, _GPU), (_CPU, _DISK), (_DISK, _CPU))
    return (
        *_row_moves(workload, _up, _down),
        *cut_moves(workload),
        *(_shifted("cache", *shift) for shift in shifts),
        *(_attended(change) for change in (100, -100, 50, -50)),
        *_pace_moves(workload),
        *(_with_slots(change) for change in (_up, _down)),
        _kv_for_slots,
        *(_shifted("act", *shift) for shift in shifts[:2]),
        # Elsewhere than on device cpu, where both tiers are one memory, the fastest tiers are filled anyway.
        *(_shifted("w", *shift) for shift in shifts[:2]),
        lambda p, step: replace(p, schedule=SCHEDULES[1 - SCHEDULES.index(p.schedule)]),
        _at_even_pace(workload),
    )


def as_one_or_two(policy: Policy, step: float) -> Policy | None:
    """The block as two half-blocks, or as one again."""
    return replace(policy, half_blocks=3 - policy.half_blocks) if policy.num_gpu_batches > 1 else None


def simpler(policy: Policy, workload: Workload) -> Iterator[Policy]:
    """Policies that do with less: less KV on disk, one way of attention, activations on the GPU, a block as one, fewer rows."""
    yield from _off_disk(policy, workload)
    cpu = policy.cache_cpu_percent
    if not cpu and policy.cpu_attention_percent:
        yield replace(policy, cpu_attention_percent=0.0)
    if cpu and policy.cpu_attention_percent not in (0.0, 100.0):
        yield replace(policy, cpu_attention_percent=100.0)
        yield replace(policy, cpu_attention_percent=0.0)
    if policy.act_gpu_percent < 100:
        yield replace(policy, act_gpu_percent=100.0, act_cpu_percent=0.0)
    if policy.half_blocks > 1:
        yield replace(policy, half_blocks=1)
    if policy.weight_slots is not None:
        yield replace(policy, weight_slots=None)
    for move in _row_moves(workload, _down):
        fewer = move(policy, _FEWER_ROWS_STEP)
        if fewer is not None and fewer.block_size < policy.block_size:
            yield fewer


def _off_disk(policy: Policy, workload: Workload) -> Iterator[Policy]:
    """Less and less of the disk's KV in host memory, where it does not wear a drive; or without the rows that it is of.

    As many rows as before are attended on the CPU, or as large a share.
    """
    gpu, cpu = policy.cache_gpu_percent, policy.cache_cpu_percent
    on_disk = 100.0 - gpu - cpu
    if on_disk < 1e-6:
        return
    for left in _LEFT_ON_DISK:
        on_host = min(100.0 - gpu, cpu + (1 - left) * on_disk)
        same_rows = round(policy.cpu_attention_percent * cpu / on_host, 1)
        for attended in dict.fromkeys((policy.cpu_attention_percent, same_rows)):
            yield replace(policy, cache_cpu_percent=on_host, cpu_attention_percent=attended)
    kept = 1 - on_disk / 100
    size = round(policy.gpu_batch_size * kept)
    fewer = resized(policy, size, policy.num_gpu_batches, Held.SHARES, workload) if size else None
    if fewer is not None:
        yield with_shares(fewer, "cache", gpu / kept, 100 - gpu / kept)


def with_shares(policy: Policy, stem: str, gpu_percent: float, cpu_percent: float, **changes: Any) -> Policy:
    """The policy with other shares of the weights (stem "w"), the KV ("cache") or the activations ("act").

    They are cut to what a policy may hold.
    """
    gpu = min(100.0, max(0.0, gpu_percent))
    shares: dict[str, Any] = {
        f"{stem}_gpu_percent": gpu,
        f"{stem}_cpu_percent": min(100.0 - gpu, max(0.0, cpu_percent)),
    }
    return replace(policy, **shares, **changes)


def _up(count: int, step: float) -> int:
    """The next larger count."""
    return max(count + 1, round(count * (1 + step)))


def _down(count: int, step: float) -> int:
    """The next smaller count, at least 1."""
    return max(1, min(count - 1, round(count / (1 + step))))


# Rows.


def resized(policy: Policy, size: int, count: int, held: Held, workload: Workload) -> Policy | None:
    """The policy with ``count`` GPU batches of ``size`` rows.

    Returns:
        None where that is the same policy, out of proportion, or ``held`` is no different from the shares.
    """
    block, rows = policy.block_size, size * count
    if (size, count) == (policy.gpu_batch_size, policy.num_gpu_batches):
        return None
    if count > max(MOST_BATCHES, policy.num_gpu_batches) or rows > 2 * (workload.num_requests or rows):
        return None
    pace = policy.prefill_tokens if held is Held.SHARES_AND_PACE else ceil(policy.prefill_tokens / block * rows)
    other = replace(in_batches(policy, size, count), prefill_tokens=max(1, pace))
    gpu, cpu, kept = policy.cache_gpu_percent, policy.cache_cpu_percent, block / rows
    if held in (Held.SHARES, Held.SHARES_AND_PACE) or rows == block:
        return other
    if held is Held.GPU_ROWS:
        alike = gpu == 0 or (gpu == 100 and rows < block)
        return None if alike else with_shares(other, "cache", gpu * kept, gpu + cpu - gpu * kept)
    alike = rows < block and gpu + cpu >= 100
    return None if alike else with_shares(other, "cache", gpu * kept, cpu * kept)


def in_batches(policy: Policy, size: int, count: int) -> Policy:
    """The policy with ``count`` GPU batches of ``size`` rows, whatever else that asks for; a single one marches as one."""
    halves = policy.half_blocks if count > 1 else 1
    return replace(policy, gpu_batch_size=size, num_gpu_batches=count, half_blocks=halves)


def _row_moves(workload: Workload, *changes: _Change) -> Iterator[Move]:
    """Other numbers of GPU batches, and batches of other sizes."""

    def counted(change: _Change, held: Held) -> Move:
        return lambda p, step: resized(p, p.gpu_batch_size, change(p.num_gpu_batches, step), held, workload)

    def sized(change: _Change, held: Held) -> Move:
        return lambda p, step: resized(p, change(p.gpu_batch_size, step), p.num_gpu_batches, held, workload)

    for held, batches, change in product(Held, (counted, sized), changes):
        yield batches(change, held)


def cut_moves(workload: Workload) -> Iterator[Move]:
    """A few more rows in one batch or in half as many; and about the same rows in larger, smaller, more or fewer batches."""

    def more_in(part: float) -> Move:
        def apply(policy: Policy, step: float) -> Policy | None:
            count = max(1, int(policy.num_gpu_batches * part))
            return resized(policy, ceil(_up(policy.block_size, step) / count), count, Held.SHARES, workload)

        return apply

    def sized(change: _Change, fit: Callable[[float], int]) -> Move:
        def apply(policy: Policy, step: float) -> Policy | None:
            size = change(policy.gpu_batch_size, step)
            return resized(policy, size, max(1, fit(policy.block_size / size)), Held.SHARES, workload)

        return apply

    def counted(change: _Change, fit: Callable[[float], int]) -> Move:
        def apply(policy: Policy, step: float) -> Policy | None:
            count = change(policy.num_gpu_batches, step)
            return resized(policy, max(1, fit(policy.block_size / count)), count, Held.SHARES, workload)

        return apply

    yield from (more_in(0.0), more_in(0.5))
    for cut in (sized, counted):
        yield from (cut(_up, int), cut(_down, ceil))


# The rest.


def _shifted(stem: str, source: int, target: int) -> Move:
    """A share moves from one tier to another."""

    def apply(policy: Policy, step: float) -> Policy | None:
        gpu, cpu = getattr(policy, f"{stem}_gpu_percent"), getattr(policy, f"{stem}_cpu_percent")
        shares = [gpu, cpu, max(0.0, 100 - gpu - cpu)]
        moved = min(shares[source], 100 * step)
        if moved <= 0:
            return None
        shares[source] -= moved
        shares[target] += moved
        return with_shares(policy, stem, shares[_GPU], shares[_CPU])

    return apply


def _attended(change: float) -> Move:
    """A larger or smaller part of the host's KV attended on the CPU; a change of 100 is all or nothing, whatever the step."""

    def apply(policy: Policy, step: float) -> Policy | None:
        if not policy.cache_cpu_percent:
            return None
        by = change if abs(change) == 100 else change * step
        return replace(policy, cpu_attention_percent=min(100.0, max(0.0, policy.cpu_attention_percent + by)))

    return apply


def _with_slots(change: _Change) -> Move:
    return lambda p, step: replace(p, weight_slots=max(_LEAST_SLOTS, change(p.weight_slots or _DEFAULT_SLOTS, step)))


def _kv_for_slots(policy: Policy, step: float) -> Policy | None:
    """Fewer slots, and more KV on the GPU in their place: fitting the policy leaves there what has room."""
    if (policy.weight_slots or _DEFAULT_SLOTS) <= _LEAST_SLOTS:
        return None
    return _shifted("cache", _CPU, _GPU)(replace(policy, weight_slots=_LEAST_SLOTS), step)


def _at_even_pace(workload: Workload) -> Move:
    """Prompt tokens per sweep with which all sweeps are alike; all of a static block's at once."""

    def apply(policy: Policy, step: float) -> Policy | None:
        sweeps = workload.gen_len if policy.schedule == "rolling" else 1
        return replace(policy, prefill_tokens=max(1, ceil(policy.block_size * workload.prompt_len / sweeps)))

    return apply


def _pace_moves(workload: Workload) -> Iterator[Move]:
    """More or fewer prompt tokens per sweep; those with which a prompt enters in one piece less or more; all at once."""

    def pieces(more: int) -> Move:
        def apply(policy: Policy, step: float) -> Policy | None:
            count = ceil(workload.prompt_len / policy.prefill_tokens) + more
            return replace(policy, prefill_tokens=ceil(workload.prompt_len / count)) if count > 0 else None

        return apply

    yield lambda p, step: replace(p, prefill_tokens=_up(p.prefill_tokens, step))
    yield lambda p, step: replace(p, prefill_tokens=_down(p.prefill_tokens, step))
    yield pieces(-1)
    yield pieces(1)
    yield lambda p, step: replace(p, prefill_tokens=p.block_size * workload.prompt_len)
