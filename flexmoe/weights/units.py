"""The weight units of a model as the schedule wants them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import experts_of, head_rows, units_of
from policies.schedule import UnitStep, experts_in_compute_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The units in the order of a sweep; ``experts_of`` and ``head_rows`` (of the vocabulary) by unit name."""

    attention: tuple[UnitStep, ...]
    experts: tuple[tuple[UnitStep, ...], ...]
    head: tuple[UnitStep, ...]
    experts_of: dict[str, range]
    head_rows: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, arch: ModelArch, tier_of: Mapping[str, str]) -> Units:
        """The units of a model, each at home in its tier."""
        attention, experts, head, index, rows = [], [[] for _ in range(arch.num_layers)], [], {}, {}
        for unit in units_of(arch):
            step, number = UnitStep(name=unit.name, tier=tier_of[unit.name]), unit.name.rsplit(".", 1)[-1]
            if unit.kind == "attention":
                attention.append(step)
            elif unit.kind == "expert":
                experts[unit.layer].append(step)
                index[unit.name] = experts_of(unit.name)
            elif unit.kind == "head":
                head.append(step)
                rows[unit.name] = head_rows(arch, int(number))
        ordered = tuple(tuple(experts_in_compute_order(e)) for e in experts)
        return cls(attention=tuple(attention), experts=ordered, head=tuple(head), experts_of=index, head_rows=rows)
