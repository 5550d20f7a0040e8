"""The zig-zag block schedule of one sweep: which operations, on which lane, after which others.

Pure: no durations, no tensors, no device. The executor walks the operations in the order given (issue order) and the
planner's simulator walks the same ones with durations, so what is predicted is what runs.

Layer by layer; inside a layer attention runs GPU batch by GPU batch, then every expert once over the tokens of the
whole block (module batching). A column-by-column ("zig-zag") walk would re-read the weights for every GPU batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from policies.units import KINDS, UnitId

LANES = ("disk_read", "disk_write", "h2d", "d2h", "gpu", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitStep:
    """One weight unit as the schedule sees it: which it is and where it lives."""

    unit: UnitId
    tier: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepUnits:
    """The weight units of a model in the order in which a sweep computes with them; of the embedding only rows are read.

    Attributes:
        attention: the attention unit of each layer.
        experts: the expert units of each layer. Those that live on the GPU come first: they compute while the others arrive.
        head: the head units.
    """

    attention: tuple[UnitStep, ...]
    experts: tuple[tuple[UnitStep, ...], ...]
    head: tuple[UnitStep, ...]

    @classmethod
    def of(cls, tier_of: Mapping[UnitId, str]) -> SweepUnits:
        """The units of a model, each with the tier where it lives, in the order in which the model has them."""
        steps: dict[str, list[UnitStep]] = {kind: [] for kind in KINDS}
        for unit, tier in tier_of.items():
            steps[unit.kind].append(UnitStep(unit=unit, tier=tier))
        experts: list[list[UnitStep]] = [[] for _ in steps["attention"]]
        for step in sorted(steps["expert"], key=lambda step: step.tier != "gpu"):
            experts[step.unit.layer].append(step)
        return cls(attention=tuple(steps["attention"]), experts=tuple(map(tuple, experts)), head=tuple(steps["head"]))

    def streamed(self, on_demand: frozenset[int] = frozenset()) -> list[UnitStep]:
        """Those that a sweep moves to the GPU whatever is routed where, in the order in which it needs them: what the weight
        stream cycles over. Not the experts of the layers ``on_demand``."""
        steps: list[UnitStep] = []
        for layer, (attention, experts) in enumerate(zip(self.attention, self.experts, strict=True)):
            steps += [attention, *(() if layer in on_demand else experts)]
        return [step for step in (*steps, *self.head) if step.tier != "gpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepShape:
    """What a sweep consists of; nothing about how large or how fast it is.

    Attributes:
        units: the weights.
        activation_tiers: home tier of the hidden states of each GPU batch; its length is the number of GPU batches.
        fetched_batches: GPU batches that have rows whose KV is not on the GPU and is attended there.
        cpu_batches: GPU batches that have rows attended on the CPU.
        stored_batches: GPU batches that have rows whose KV home is not the GPU.
        disk_batches: GPU batches that have rows whose KV home is the disk.
        on_demand: layers whose streamed experts are moved on demand: only those routed to, once that is known.
    """

    units: SweepUnits
    activation_tiers: Sequence[str]
    fetched_batches: frozenset[int] = frozenset()
    cpu_batches: frozenset[int] = frozenset()
    stored_batches: frozenset[int] = frozenset()
    disk_batches: frozenset[int] = frozenset()
    on_demand: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation: ``kind`` on ``lane`` after the operations whose ids are in ``deps``.

    ``batch`` is a GPU batch and ``unit`` a weight unit, where the kind has one.
    """

    id: int
    kind: str
    lane: str
    layer: int
    batch: int = -1
    unit: UnitId | None = None
    deps: tuple[int, ...] = ()


class _Builder:
    """Numbers the operations and, in the serial variant, chains each one to its predecessor."""

    def __init__(self, overlap: bool):
        self.overlap = overlap
        self.ops: list[Op] = []
        self._last = -1

    def add(
        self, kind: str, lane: str, layer: int, deps: Sequence[int] = (), batch: int = -1, unit: UnitId | None = None
    ) -> int:
        index = self._last + 1
        chain = () if self.overlap or self._last < 0 else (self._last,)
        after = tuple(sorted({d for d in (*deps, *chain) if d >= 0}))
        self.ops.append(Op(id=index, kind=kind, lane=lane, layer=layer, deps=after, batch=batch, unit=unit))
        self._last = index
        return index

    def drain(self) -> list[Op]:
        ops, self.ops = self.ops, []
        return ops


def sweep(shape: SweepShape, *, overlap: bool = True) -> Iterator[Op]:
    """The operations of one sweep in issue order.

    Kinds, with their lanes: ``read`` (disk_read) and ``copy`` (h2d) of a weight unit; ``embed``, ``load_act`` and
    ``store_act`` of a GPU batch's hidden states; ``project`` (norm, QKV, rope, new KV); ``load_kv`` (h2d),
    ``store_kv`` (d2h), ``write_kv`` (disk_write); ``cpu_attend`` (cpu); ``attend`` (gpu; includes the output
    projection); ``route`` once per layer; ``expert`` once per unit; ``head`` once per head unit; ``sample``. In a layer on
    demand the streamed experts are one operation: ``read_routed`` (disk_read), ``copy_routed`` (h2d), ``routed``.

    Args:
        shape: the units, tiers and GPU batches of the sweep.
        overlap: False chains every operation to the one before it (FlexLLMGen's ``--overlap false``).

    Yields:
        Op: ids count up from 0; every dependency has a smaller id.
    """
    build = _Builder(overlap)
    count = len(shape.activation_tiers)
    ready: list[tuple[int, ...]] = [(-1,)] * count
    first_kv = _load_kv(build, shape, 0, 0)
    for layer, (unit, experts) in enumerate(zip(shape.units.attention, shape.units.experts, strict=True)):
        attended, stored = _attention(build, shape, layer, _fetch(build, layer, unit), ready, first_kv)
        first_kv = _load_kv(build, shape, layer + 1, 0) if layer + 1 < len(shape.units.attention) else -1
        route = build.add("route", "gpu", layer, attended)
        if layer in shape.on_demand:
            last = _routed(build, layer, experts, route)
        else:
            for step in experts:
                arrived = _fetch(build, layer, step)
                last = build.add("expert", "gpu", layer, (arrived, route), unit=step.unit)
        ready = [(last, home) for home in stored]
        yield from build.drain()
    yield from _head(build, shape, ready)


def _head(build: _Builder, shape: SweepShape, ready: Sequence[tuple[int, ...]]) -> list[Op]:
    last = len(shape.units.attention)
    gathered = [_load_act(build, shape, last, j, ready[j]) for j in range(len(shape.activation_tiers))]
    done = [build.add("collect", "gpu", last, gathered)]
    for step in shape.units.head:
        done.append(build.add("head", "gpu", last, (_fetch(build, last, step), done[-1]), unit=step.unit))
    build.add("sample", "gpu", last, done)
    return build.drain()


def _fetch(build: _Builder, layer: int, step: UnitStep) -> int:
    """The transfers that bring a unit to the compute device; -1 when it lives there."""
    if step.tier == "gpu":
        return -1
    read = build.add("read", "disk_read", layer, unit=step.unit) if step.tier == "disk" else -1
    return build.add("copy", "h2d", layer, (read,), unit=step.unit)


def _routed(build: _Builder, layer: int, experts: Sequence[UnitStep], route: int) -> int:
    """The experts of a layer on demand: streamed ones are requested first, and the resident ones compute meanwhile."""
    tiers = {step.tier for step in experts}
    read = build.add("read_routed", "disk_read", layer, (route,)) if "disk" in tiers else route
    copied = build.add("copy_routed", "h2d", layer, (read,))
    for step in experts:
        if step.tier == "gpu":
            build.add("expert", "gpu", layer, (route,), unit=step.unit)
    return build.add("routed", "gpu", layer, (route, copied))


def _load_kv(build: _Builder, shape: SweepShape, layer: int, batch: int) -> int:
    return build.add("load_kv", "h2d", layer, batch=batch) if batch in shape.fetched_batches else -1


def _load_act(build: _Builder, shape: SweepShape, layer: int, batch: int, after: tuple[int, ...]) -> int:
    """``after``: the last expert of the layer before and, for a batch that went home, its ``store_act``."""
    if layer == 0:
        return build.add("embed", "gpu", layer, batch=batch)
    if shape.activation_tiers[batch] == "gpu":
        return after[0]
    return build.add("load_act", "h2d", layer, after, batch=batch)


def _attention(
    build: _Builder, shape: SweepShape, layer: int, weights: int, ready: Sequence[tuple[int, ...]], first_kv: int
) -> tuple[list[int], list[int]]:
    """Attention of one layer: each batch's ``attend``, and its ``store_act`` (-1 where hidden states stay on the GPU).

    Batch j + 1 is projected, and its KV requested, before batch j is attended: the CPU and the copy lanes then always
    have the next piece of work while the GPU works on this one. The KV of the first batch is requested a layer's
    experts earlier."""
    count = len(shape.activation_tiers)
    ahead, ends, stored = [_project(build, shape, layer, 0, weights, ready[0], first_kv)], [], []
    for j in range(count):
        if j + 1 < count:
            loaded = _load_kv(build, shape, layer, j + 1)
            ahead.append(_project(build, shape, layer, j + 1, weights, ready[j + 1], loaded))
        end = build.add("attend", "gpu", layer, (*ahead[j], weights), batch=j)
        away = shape.activation_tiers[j] != "gpu"
        stored.append(build.add("store_act", "d2h", layer, (end,), batch=j) if away else -1)
        ends.append(end)
    return ends, stored


def _project(
    build: _Builder, shape: SweepShape, layer: int, j: int, weights: int, after: tuple[int, ...], loaded: int
) -> tuple[int, ...]:
    """Everything that a batch's ``attend`` waits for; returns those ids."""
    hidden = _load_act(build, shape, layer, j, after)
    project = build.add("project", "gpu", layer, (weights, hidden), batch=j)
    stored = build.add("store_kv", "d2h", layer, (project, loaded), batch=j) if j in shape.stored_batches else -1
    if j in shape.disk_batches:
        build.add("write_kv", "disk_write", layer, (stored,), batch=j)
    on_cpu = build.add("cpu_attend", "cpu", layer, (stored,), batch=j) if j in shape.cpu_batches else -1
    return tuple(d for d in (loaded, project, on_cpu) if d >= 0)
