"""Which thread of the weight stream moves which unit, in which order; the same in every sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from cost_model.model.weight_units import units_of
from cost_model.simulation.threads import COPY, READ, STAGE
from cost_model.timing.op_costs import Costs
from policies.schedule import SweepUnits
from policies.units import UnitId


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A streamed unit on a thread of the weight stream.

    Attributes:
        unit, nbytes: what is moved.
        seconds: what it takes alone.
        place: its place among all streamed units of a sweep, which get slots in this order.
        staged: its place among the units that pass through a staging slot; -1: it does not.
        staged_by: (thread, place there) that fills its staging slot before this move; None: it has none.
    """

    unit: UnitId
    nbytes: int
    seconds: float
    place: int
    staged: int = -1
    staged_by: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """As in a trace."""
        return str(self.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQueues:
    """The weight stream of one sweep.

    Attributes:
        moves: in order, by thread (`COPY`, `READ`, `STAGE`).
        brought_by: of each unit, the (thread, place there) that brings it into its slot.
        units: how many are streamed.
        staged: how many of them pass through a staging slot.
    """

    moves: Mapping[int, Sequence[Move]]
    brought_by: Mapping[UnitId, tuple[int, int]]
    units: int
    staged: int


def weight_queues(costs: Costs, units: SweepUnits, on_demand: frozenset[int] = frozenset()) -> WeightQueues:
    """The moves of a sweep, but for the experts of the layers that are on demand.

    On device cpu a disk unit is read straight into its slot and a host unit is copied. On CUDA every unit is copied;
    one on disk is read into a staging slot first, and a host unit that is not pinned is copied there.
    """
    direct = costs.hardware.device == "cpu"
    sizes = {unit.id: unit.stored_bytes for unit in units_of(costs.arch)}
    copy_s, read_s = cache(costs.copy_s), cache(costs.read_s)
    moves: dict[int, list[Move]] = {COPY: [], READ: [], STAGE: []}
    brought_by: dict[UnitId, tuple[int, int]] = {}
    streamed, staged = units.streamed(on_demand), 0
    for place, step in enumerate(streamed):
        size, on_disk = sizes[step.unit], step.tier == "disk"
        move = Move(unit=step.unit, nbytes=size, seconds=copy_s(size), place=place)
        read = Move(unit=step.unit, nbytes=size, seconds=read_s(size), place=place) if on_disk else move
        if costs.stages_host_units or (on_disk and not direct):
            thread, first = (READ, read) if on_disk else (STAGE, move)
            move = replace(move, staged=staged, staged_by=(thread, len(moves[thread])))
            moves[thread].append(replace(first, staged=staged))
            staged += 1
        thread, last = (READ, read) if direct and on_disk else (COPY, move)
        brought_by[step.unit] = (thread, len(moves[thread]))
        moves[thread].append(last)
    return WeightQueues(moves=moves, brought_by=brought_by, units=len(streamed), staged=staged)
