"""The weight units of a model: which each is, and how large. A unit is the smallest piece of weight that is placed and moved."""

from __future__ import annotations

from dataclasses import dataclass

from policies.common.checks import check_count
from policies.common.errors import UsageError

KINDS = ("embed", "attention", "expert", "head")


@dataclass(frozen=True, slots=True)
class UnitId:
    """Which unit; ``str`` gives the name that messages and traces have, such as ``layers.3.expert.8-15``.

    Args:
        kind: one of `KINDS`.
        layer: the layer it belongs to; -1 for the embedding, the number of layers for the head.
        first: its first expert, or the place of a chunk in the head; 0 for other kinds.
        count: its experts, which are consecutive; 1 for other kinds.

    Raises:
        UsageError: the kind is unknown.
    """

    kind: str
    layer: int
    first: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"a unit of layer {self.layer} has kind {self.kind!r}; the kinds are {', '.join(KINDS)}.")

    @property
    def experts(self) -> range:
        """The experts of a unit of them; the MLP of a dense layer is expert 0."""
        return range(self.first, self.first + self.count)

    def __str__(self) -> str:
        if self.kind == "embed":
            return "embed"
        if self.kind == "head":
            return f"head.{self.first}"
        if self.kind == "attention":
            return f"layers.{self.layer}.attention"
        last = f"-{self.first + self.count - 1}" if self.count > 1 else ""
        return f"layers.{self.layer}.expert.{self.first}{last}"


EMBEDDING = UnitId("embed", -1)


def expert_unit(layer: int, experts: range) -> UnitId:
    """The unit of these consecutive experts of a layer."""
    return UnitId("expert", layer, experts.start, len(experts))


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit and its size.

    Args:
        id: which it is.
        stored_bytes: its size at rest, at least 1.

    Raises:
        UsageError: the size is not a positive whole number.
    """

    id: UnitId
    stored_bytes: int

    def __post_init__(self) -> None:
        check_count(f"stored_bytes of unit {self.id}", self.stored_bytes)

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.id.kind

    @property
    def layer(self) -> int:
        """The layer that it belongs to, as `UnitId` has it."""
        return self.id.layer
