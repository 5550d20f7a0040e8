"""Whose turn it is: which model runs next, and which of its batches may run together.

The order is that of priority, and of age among equals; online requests come before batches. A
batch never overtakes one of another model that is before it, so the turns that follow are the fewest that keep the order:
one for each stretch of neighbours of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something that waits for a model.

    Args:
        name: of a batch; "" for an online request or a switch.
        arrival: place in the order of arrival.
        has_begun: whether rows of the batch have run since the model was loaded.
    """

    model: str
    arrival: int
    name: str = ""
    priority: int = 0
    has_begun: bool = False

    @property
    def is_batch(self) -> bool:
        """Whether it is a batch."""
        return bool(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A model, and the batches whose rows may enter its engine now, the first ones first."""

    model: str
    batches: tuple[str, ...] = ()


def turn_of(items: Sequence[Item], loaded: str | None = None, *, may_leave: bool = True) -> Turn | None:
    """The turn that the order asks for; None where nothing waits.

    Args:
        loaded: the model that is loaded.
        may_leave: whether it has been loaded for long enough; if not, it keeps its turn as long as anything waits for it.
    """
    ordered = sorted(items, key=lambda each: (each.is_batch, -each.priority, each.arrival))
    if not ordered:
        return None
    model = ordered[0].model
    if loaded is not None and not may_leave and any(each.model == loaded for each in ordered):
        model = loaded
    batches = [each for each in ordered if each.is_batch]
    stretch = next((at for at, each in enumerate(batches) if each.model != model), len(batches))
    chosen = batches[:stretch]
    if not may_leave:
        chosen += [each for each in batches[stretch:] if each.model == model and each.has_begun]
    return Turn(model=model, batches=tuple(each.name for each in chosen))
