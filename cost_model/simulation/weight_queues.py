"""Which thread of the weight stream moves which unit, in which order; the same in every sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from cost_model.simulation.threads import COPY, READ, STAGE
from cost_model.timing.op_costs import Costs
from policies.schedule import UnitStep, experts_in_compute_order


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSteps:
    """The weight units of a model as the executor orders them, by layer where there are layers."""

    attention: Sequence[UnitStep]
    experts: Sequence[Sequence[UnitStep]]
    head: Sequence[UnitStep]

    @classmethod
    def of(cls, arch: ModelArch, tier_of: Mapping[str, str]) -> UnitSteps:
        """The units of a model at home in these tiers."""
        found: dict[str, list[UnitStep]] = {"embed": [], "attention": [], "head": []}
        experts: list[list[UnitStep]] = [[] for _ in range(arch.num_layers)]
        for unit in units_of(arch):
            into = experts[unit.layer] if unit.kind == "expert" else found[unit.kind]
            into.append(UnitStep(name=unit.name, tier=tier_of[unit.name]))
        ordered = [experts_in_compute_order(each) for each in experts]
        return cls(attention=found["attention"], experts=ordered, head=found["head"])

    def in_order(self, on_demand: frozenset[int] = frozenset()) -> Iterable[UnitStep]:
        """Those that a sweep needs for sure, in the order in which it does: not the experts of layers on demand."""
        for layer, (unit, experts) in enumerate(zip(self.attention, self.experts, strict=True)):
            yield unit
            if layer not in on_demand:
                yield from experts
        yield from self.head


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A streamed unit on a thread of the weight stream.

    Attributes:
        name, nbytes: the unit.
        seconds: what it takes alone.
        place: its place among all streamed units of a sweep, which get slots in this order.
        staged: its place among the units that pass through a staging slot; -1: it does not.
        staged_by: (thread, place there) that fills its staging slot before this move; None: nobody.
    """

    name: str
    nbytes: int
    seconds: float
    place: int
    staged: int = -1
    staged_by: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQueues:
    """The weight stream of one sweep.

    Attributes:
        moves: in order, by thread (`COPY`, `READ`, `STAGE`).
        brought_by: unit name to the (thread, place there) that brings it into its slot.
        units: how many are streamed.
        staged: how many of them pass through a staging slot.
    """

    moves: Mapping[int, Sequence[Move]]
    brought_by: Mapping[str, tuple[int, int]]
    units: int
    staged: int


def weight_queues(costs: Costs, steps: UnitSteps, on_demand: frozenset[int] = frozenset()) -> WeightQueues:
    """The moves of a sweep, but for the experts of the layers that are on demand.

    On device cpu a disk unit is read straight into its slot and a host unit is copied. On CUDA every unit is copied;
    one on disk is read into a staging slot first, and a host unit that is not pinned is copied there.
    """
    direct = costs.hardware.device == "cpu"
    sizes = {unit.name: unit.stored_bytes for unit in units_of(costs.arch)}
    moves: dict[int, list[Move]] = {COPY: [], READ: [], STAGE: []}
    brought_by, staged = {}, 0
    streamed = [step for step in steps.in_order(on_demand) if step.tier != "gpu"]
    for place, step in enumerate(streamed):
        size, on_disk = sizes[step.name], step.tier == "disk"
        what = {"name": step.name, "nbytes": size, "place": place}
        read_s, copy_s, by = costs.read_s(size), costs.copy_s(size), None
        if not direct and (on_disk or not costs.pinned):
            what["staged"], staged = staged, staged + 1
            thread = READ if on_disk else STAGE
            by = (thread, len(moves[thread]))
            moves[thread].append(Move(seconds=read_s if on_disk else copy_s, **what))
        thread = READ if direct and on_disk else COPY
        brought_by[step.name] = (thread, len(moves[thread]))
        moves[thread].append(Move(seconds=read_s if thread == READ else copy_s, staged_by=by, **what))
    return WeightQueues(moves=moves, brought_by=brought_by, units=len(streamed), staged=staged)
