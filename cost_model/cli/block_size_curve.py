"""The chosen policy with other block sizes: what more rows would give, and where memory ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cost_model.timing.evaluate import Prediction, fits
from policies.policy import Policy

_POINTS_PER_OCTAVE = 4
_OCTAVES_BEYOND = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """``rows`` in flight, what is expected of them, and whether memory holds them."""

    rows: int
    prediction: Prediction
    fits: bool


def with_rows(policy: Policy, rows: int) -> Policy:
    """The policy with about so many rows in flight (whole GPU batches), prompts entering at the same pace."""
    size = min(policy.gpu_batch_size, rows)
    number = max(1, round(rows / size))
    pace = policy.prefill_tokens / policy.block_size
    return replace(
        policy, gpu_batch_size=size, num_gpu_batches=number, prefill_tokens=max(1, round(pace * size * number))
    )


def block_sizes(policy: Policy) -> list[int]:
    """Rows in flight to look at, the policy's own among them, rising."""
    rows, found = policy.block_size, []
    step = 2 ** (1 / _POINTS_PER_OCTAVE)
    for power in range(-round(20 * _POINTS_PER_OCTAVE), _OCTAVES_BEYOND * _POINTS_PER_OCTAVE + 1):
        size = round(rows * step**power)
        if size >= 1:
            found.append(with_rows(policy, size).block_size)
    return sorted({*found, rows})


def curve(policy: Policy, predict: Callable[[Policy], Prediction]) -> list[Point]:
    """Points of `block_sizes`.

    Args:
        predict: judges a policy with its memory ignored.
    """
    points = []
    for rows in block_sizes(policy):
        prediction = predict(policy if rows == policy.block_size else with_rows(policy, rows))
        points.append(Point(rows=rows, prediction=prediction, fits=fits(prediction.memory, prediction.budgets)))
    return points


def wall(policy: Policy, predict: Callable[[Policy], Prediction]) -> int | None:
    """The most rows, in whole GPU batches of the policy's size, that memory holds with the policy's shares.

    None: not even one batch fits, or memory is no limit within the range of `block_sizes`.
    """

    def holds(batches: int) -> bool:
        prediction = predict(with_rows(policy, batches * policy.gpu_batch_size))
        return fits(prediction.memory, prediction.budgets)

    low, high = 0, policy.num_gpu_batches * 2**_OCTAVES_BEYOND
    if holds(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low * policy.gpu_batch_size or None
