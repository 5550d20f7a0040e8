"""Seconds of the sweeps of a job: each one replayed, or the closed form corrected by replays of sweeps like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from cost_model.model.weight_units import expert_units
from cost_model.simulation.job_sweeps import JobSweeps, as_load
from cost_model.simulation.replay import Replayer
from cost_model.timing.op_costs import Costs
from cost_model.timing.sweep_bounds import SweepForm, SweepTime, sweep_time
from cost_model.timing.sweep_load import SweepLoad
from policies.schedule import LANES

#: Groups of like sweeps that the closed form is computed for, as narrow as that allows: GPU batches that they may have
#: together, and groups.
_GROUPED_BATCHES, _FEWEST_GROUPS, _MOST_GROUPS = 25_000, 60, 500
_NARROWEST = 0.02
#: Knots: groups that are replayed too, as many as have so many operations together.
FEWEST_KNOTS, _MOST_KNOTS = 2, 12
_KNOT_OPS = 70_000
#: GPU batches of a sweep that is replayed as a knot; more are merged, as all but the first and the last are alike.
KNOT_BATCHES = 24
#: Between sweeps of which one has its experts on demand: beyond any distance in size.
_FAR = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTimes:
    """Seconds of each sweep, and ``[sweeps, lanes]`` seconds in which each of `LANES` is at work."""

    seconds: np.ndarray
    lanes_s: np.ndarray


def operations(costs: Costs, gpu_batches: float) -> float:
    """About as many operations has a sweep."""
    return costs.arch.num_layers * (2 * expert_units(costs.arch) + 5 * gpu_batches)


def replayed_times(costs: Costs, gpu_batch_size: int, sweeps: JobSweeps) -> SweepTimes:
    """Every sweep that was followed, replayed one after the other."""
    loads = [sweeps.load(at) for at in range(len(sweeps.logits))]
    replayed = Replayer(costs, gpu_batch_size).replay(loads)
    return SweepTimes(
        seconds=np.array(replayed.sweep_s),
        lanes_s=np.array([[lanes[lane] for lane in LANES] for lanes in replayed.lanes_s]),
    )


def like_times(costs: Costs, gpu_batch_size: int, sweeps: JobSweeps) -> SweepTimes:
    """Of every group of like sweeps the closed form, corrected."""
    batches = max(1.0, float(sweeps.rows.max()) / gpu_batch_size)
    loads, group_of = _groups(sweeps, int(min(_MOST_GROUPS, max(_FEWEST_GROUPS, _GROUPED_BATCHES / batches))))
    recurs = np.bincount(group_of, weights=sweeps.recurs, minlength=len(loads))
    times = corrected_times(costs, gpu_batch_size, loads, recurs)
    return SweepTimes(seconds=times.seconds[group_of], lanes_s=times.lanes_s[group_of])


def corrected_times(
    costs: Costs, gpu_batch_size: int, loads: Sequence[SweepLoad], recurs: np.ndarray, replayed_ops: float = _KNOT_OPS
) -> SweepTimes:
    """The closed form of each load, times the ratio that replays of the nearest knots have to it.

    Args:
        recurs: how often each load occurs; knots are where most of the time is.
        replayed_ops: operations of all knots together, about; at least two are replayed.
    """
    batches = max(1.0, max(load.rows for load in loads) / gpu_batch_size)
    closed_s, lanes_s = _as_arrays(list(map(SweepForm(costs, gpu_batch_size).time, loads)))
    demanded = [costs.routing.on_demand(load.tokens) is not None for load in loads]
    knots = _knots(loads, demanded, recurs * closed_s, _count_knots(costs, batches, replayed_ops))
    replayer = Replayer(costs, gpu_batch_size)
    ratios = np.array([_replayed_over_closed(replayer, costs, gpu_batch_size, loads[knot]) for knot in knots])
    mixed = _nearness(loads, demanded, knots) @ ratios
    seconds = closed_s * mixed[:, 0]
    # A lane may be nearer to all of the sweep than at the knots.
    return SweepTimes(seconds=seconds, lanes_s=np.minimum(lanes_s * mixed[:, 1:], seconds[:, None]))


def _groups(sweeps: JobSweeps, most: int) -> tuple[list[SweepLoad], np.ndarray]:
    """The mean load of each group of like sweeps, and the group of each sweep."""
    flat = np.column_stack([sweeps.groups.reshape(len(sweeps.logits), -1), sweeps.logits, sweeps.copied])
    width = _NARROWEST
    while True:
        _, group_of = np.unique(np.round(np.log1p(flat) / width), axis=0, return_inverse=True)
        group_of = group_of.reshape(-1)
        count = int(group_of.max()) + 1
        if count <= most:
            break
        width *= 1.5
    sizes = np.bincount(group_of)
    means = np.stack([np.bincount(group_of, weights=column) / sizes for column in flat.T], axis=1)
    shape, size = sweeps.groups.shape[1:], sweeps.groups[0].size
    return [as_load(mean[:size].reshape(shape), mean[size], mean[size + 1 :]) for mean in means], group_of


def _as_arrays(times: list[SweepTime]) -> tuple[np.ndarray, np.ndarray]:
    lanes = [[time.lanes_s[lane] for lane in LANES] for time in times]
    return np.array([time.total_s for time in times]), np.array(lanes)


def _count_knots(costs: Costs, batches: float, replayed_ops: float) -> int:
    replayed = replayed_ops / operations(costs, min(KNOT_BATCHES, batches))
    return int(min(_MOST_KNOTS, max(FEWEST_KNOTS, replayed)))


def _knots(loads: Sequence[SweepLoad], demanded: list[bool], spent_s: np.ndarray, most: int) -> list[int]:
    """Groups to replay: those that prefill and those that do not, those whose experts come on demand apart, each in the order
    of their size, at equal seconds."""
    found: list[int] = []
    kinds = [(load.prompt_tokens > 0, on_demand) for load, on_demand in zip(loads, demanded, strict=True)]
    for kind in sorted(set(kinds), reverse=True):
        members = [at for at, own in enumerate(kinds) if own == kind]
        members.sort(key=lambda at: (loads[at].tokens, _context(loads[at])))
        part = spent_s[members].sum() / spent_s.sum()
        count = max(1, round(part * most))
        reached = np.cumsum(spent_s[members]) / spent_s[members].sum()
        places = np.searchsorted(reached, (np.arange(count) + 0.5) / count)
        found += [members[place] for place in dict.fromkeys(map(int, np.minimum(places, len(members) - 1)))]
    return found


def _replayed_over_closed(replayer: Replayer, costs: Costs, gpu_batch_size: int, load: SweepLoad) -> list[float]:
    """Ratio of the seconds of a sweep, then of those of each lane."""
    rows = gpu_batch_size * max(1, ceil(load.rows / gpu_batch_size / KNOT_BATCHES))
    replayed_s, lanes_s = replayer.steady(load, rows)
    closed = sweep_time(costs, load, rows)
    lanes = [lanes_s[lane] / closed.lanes_s[lane] if closed.lanes_s[lane] else 1.0 for lane in LANES]
    return [replayed_s / closed.total_s, *lanes]


def _nearness(loads: Sequence[SweepLoad], demanded: list[bool], knots: list[int]) -> np.ndarray:
    """``[groups, knots]``: how much each knot says of each group; rows sum to 1."""
    where = np.log1p(np.array([[load.tokens, load.prompt_tokens, _context(load)] for load in loads]))
    where = np.column_stack([where, _FAR * np.array(demanded)])
    apart = ((where[:, None, :] - where[None, knots, :]) ** 2).sum(axis=2)
    near: np.ndarray = 1 / (apart + 1e-6) ** 2
    nearness: np.ndarray = near / near.sum(axis=1, keepdims=True)
    return nearness


def _context(load: SweepLoad) -> float:
    return sum(group.decode_context for group in load.groups.values())
