"""The zig-zag block schedule of one sweep: which operations, on which lane, after which others.

Pure: no durations, no tensors, no device. The executor walks the operations in the order given (issue order) and the
planner's simulator walks the same ones with durations, so what is predicted is what runs.

Layer by layer; inside a layer attention runs GPU batch by GPU batch, then every expert once over the tokens of the
whole block (module batching). A column-by-column ("zig-zag") walk would re-read the weights for every GPU batch.

A block may march as two half-blocks, half a layer apart: while the experts of one half compute, the attention of the other
goes on, on the CPU and with KV that comes over the link. A layer's units stay in their slots until both have used them, so
weights still cross the link once a sweep. Where the head lives on the GPU the first half gets its logits before the last experts of
the second one: while the GPU computes those, the host chooses and books its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from policies.units import KINDS, UnitId

LANES = ("disk_read", "disk_write", "h2d", "d2h", "gpu", "cpu")
#: GPU batches whose fetched KV has a place on the device at a time.
KV_BUFFERS = 2
#: Tokens of an expert in a half-block, at least, on device cpu: so many that its products run at the rate of larger ones.
LEAST_HALF_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitStep:
    """One weight unit as the schedule sees it: which it is and where it lives."""

    unit: UnitId
    tier: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepUnits:
    """The weight units of a model in the order in which a sweep asks for them; of the embedding only rows are read.

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
        half_blocks: from `halves_of_sweep`; `first_half` says whether this sweep marches so.
    """

    units: SweepUnits
    activation_tiers: Sequence[str]
    fetched_batches: frozenset[int] = frozenset()
    cpu_batches: frozenset[int] = frozenset()
    stored_batches: frozenset[int] = frozenset()
    disk_batches: frozenset[int] = frozenset()
    on_demand: frozenset[int] = frozenset()
    half_blocks: int = 1

    @property
    def first_half(self) -> int:
        """GPU batches of the first half-block; 0 where the block marches as one.

        It does so where a half would be empty, where experts come on demand, as rows are few then, and where nothing moves
        beside the GPU, so that nobody waits for anybody.
        """
        batches, moves = len(self.activation_tiers), self.fetched_batches or self.cpu_batches
        if self.half_blocks == 1 or batches < 2 or self.on_demand or not (moves or self.units.streamed()):
            return 0
        return in_first_half(batches)

    @property
    def first_part(self) -> int:
        """GPU batches of the first half-block, if its rows get their tokens before those of the second one; 0 where all rows get
        them together: so they do where the head is streamed, which would take slots from what comes ahead until both have used it."""
        return self.first_half if all(step.tier == "gpu" for step in self.units.head) else 0


def halves_of_sweep(half_blocks: int, device: str, expert_tokens: float) -> int:
    """As how many half-blocks a sweep may march.

    On device cpu as one where few tokens come to an expert: its products are bound by the weights, and over two halves take nearly
    twice as long. A GPU reads weights much faster than they come.

    Args:
        half_blocks: as in `policies.policy.Policy`.
        device: ``cpu`` or ``cuda``.
        expert_tokens: tokens of the sweep that an expert gets in the mean.
    """
    return half_blocks if device != "cpu" or expert_tokens >= 2 * LEAST_HALF_TOKENS else 1


def is_moved_at_once(device: str, tier: str) -> bool:
    """Whether the thread that computes moves hidden states itself that live in a tier: on device cpu, but to and from disk.

    There another thread would want the same cores, and each hand-over takes time of both. So the thread that computes does what
    KV takes, too, right before a GPU batch is attended: it brings the past in, takes what is new home, and attends to what
    is attended on the CPU; the disk alone is at work meanwhile.
    """
    return device == "cpu" and tier != "disk"


def in_first_half(batches: int) -> int:
    """GPU batches of the first half-block, of so many of the block; the second one has no more."""
    return -(-batches // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation: ``kind`` on ``lane`` after the operations whose ids are in ``deps``.

    ``batch`` is a GPU batch and ``unit`` a weight unit, where the kind has one; ``half`` is the half-block of ``route``,
    ``expert`` and what follows the layers, 0 where that is done for the whole block. After the operation no other one of the
    sweep uses the unit ``releases``.
    """

    id: int
    kind: str
    lane: str
    layer: int
    batch: int = -1
    unit: UnitId | None = None
    deps: tuple[int, ...] = ()
    half: int = 0
    releases: UnitId | None = None


class _Builder:
    """Numbers the operations and, in the serial variant, chains each one to its predecessor."""

    def __init__(self, overlap: bool):
        self.overlap = overlap
        self.ops: list[Op] = []
        self._last = -1

    def add(self, kind: str, lane: str, layer: int, deps: Sequence[int] = (), **more: Any) -> int:
        index = self._last + 1
        chain = () if self.overlap or self._last < 0 else (self._last,)
        after = tuple(sorted({d for d in (*deps, *chain) if d >= 0}))
        self.ops.append(Op(id=index, kind=kind, lane=lane, layer=layer, deps=after, **more))
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
    projection); ``route`` once per layer and half-block; ``expert`` once per unit and half-block; ``collect``, ``head`` once per
    head unit, and ``sample``, once for all rows or for those of each half-block (`SweepShape.first_part`). In a layer on demand the streamed experts are one operation: ``read_routed`` (disk_read), ``copy_routed`` (h2d), ``routed``.

    Args:
        shape: the units, tiers and GPU batches of the sweep.
        overlap: False chains every operation to the one before it (FlexLLMGen's ``--overlap false``).

    Yields:
        Op: ids count up from 0; every dependency has a smaller id.
    """
    build = _Builder(overlap)
    if shape.first_half:
        yield from _HalfBlocks(build, shape).operations()
        return
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
                last = build.add("expert", "gpu", layer, (arrived, route), unit=step.unit, releases=step.unit)
        ready = [(last, home) for home in stored]
        yield from build.drain()
    _head(build, shape, range(count), ready)
    yield from build.drain()


def _head(
    build: _Builder, shape: SweepShape, batches: Sequence[int], ready: Sequence[tuple[int, ...]], half: int = 0
) -> None:
    """From the hidden states of some batches to their tokens."""
    last = len(shape.units.attention)
    gathered = [_load_act(build, shape, last, j, ready[j]) for j in batches]
    done = [build.add("collect", "gpu", last, gathered, half=half)]
    is_last = batches[-1] == len(shape.activation_tiers) - 1
    for step in shape.units.head:
        deps, unit = (_fetch(build, last, step), done[-1]), step.unit if is_last else None
        done.append(build.add("head", "gpu", last, deps, unit=step.unit, half=half, releases=unit))
    build.add("sample", "gpu", last, done, half=half)


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
            build.add("expert", "gpu", layer, (route,), unit=step.unit, releases=step.unit)
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
        end, home = _attend(build, shape, layer, j, (*ahead[j], weights))
        stored.append(home)
        ends.append(end)
    return ends, stored


def _attend(build: _Builder, shape: SweepShape, layer: int, j: int, after: tuple[int, ...]) -> tuple[int, int]:
    """A batch's ``attend`` and its ``store_act``; the last one of the block needs the layer's weights no more."""
    unit = shape.units.attention[layer].unit if j == len(shape.activation_tiers) - 1 else None
    end = build.add("attend", "gpu", layer, after, batch=j, releases=unit)
    away = shape.activation_tiers[j] != "gpu"
    return end, build.add("store_act", "d2h", layer, (end,), batch=j) if away else -1


def _project(
    build: _Builder, shape: SweepShape, layer: int, j: int, weights: int, after: tuple[int, ...], loaded: int
) -> tuple[int, ...]:
    """Everything that a batch's ``attend`` waits for; returns those ids.

    New KV of rows on disk goes home when the old has come, for that moves their last pages on. Elsewhere it need not wait for
    the link, and nor does the CPU, whose queries go down with it."""
    hidden = _load_act(build, shape, layer, j, after)
    project = build.add("project", "gpu", layer, (weights, hidden), batch=j)
    before = loaded if j in shape.disk_batches else -1
    stored = build.add("store_kv", "d2h", layer, (project, before), batch=j) if j in shape.stored_batches else -1
    if j in shape.disk_batches:
        build.add("write_kv", "disk_write", layer, (stored,), batch=j)
    on_cpu = build.add("cpu_attend", "cpu", layer, (stored,), batch=j) if j in shape.cpu_batches else -1
    return tuple(d for d in (loaded, project, on_cpu) if d >= 0)


@dataclass(slots=True)
class _Pending:
    """Experts of a half-block in the layer that it was routed in last: its units in order, of which so many are ``issued``."""

    half: int
    layer: int = 0
    route: int = -1
    units: Sequence[UnitStep] = ()
    issued: int = 0
    last: int = -1


class _HalfBlocks:
    """The layers of a sweep whose block marches as two halves.

    The attention of all batches is one pipeline through the halves and layers, in turns: the first half in a layer, the
    second one there, the first one in the next layer. As in a block that marches as one, a batch is projected before the
    batch in front of it is attended, so that no more than two are under way. Between the batches of a turn the experts of
    the other half compute, evenly spread, all of them before the last but one is attended: then that half is projected again
    while the CPU still attends the last one.

    KV is requested as soon as there is a place for it: when a batch that fetches has been attended, that of the last but one
    after it. Where few batches of a half fetch, it comes while others, of both halves, are attended on the CPU.

    The first half takes a layer's units as they arrive, the resident ones first. The second one starts with the streamed
    ones, which are all there then, so that their slots are soon free.

    The first half gets its logits before the last experts of the second one, where `SweepShape.first_part` says so.
    """

    def __init__(self, build: _Builder, shape: SweepShape):
        self._build, self._shape = build, shape
        count, first = len(shape.activation_tiers), shape.first_half
        self._batches = (range(first), range(first, count))
        self._ready: list[tuple[int, ...]] = [(-1,)] * count
        self._pending = (_Pending(0), _Pending(1))
        self._weights = -1  # the copy of the attention unit of the layer that was projected last
        self._arrived: dict[UnitId, int] = {}
        self._to_load = product(range(len(shape.units.attention)), sorted(shape.fetched_batches))
        self._loads: dict[tuple[int, int], int] = {}  # by layer and batch, those that have been requested

    def operations(self) -> Iterator[Op]:
        """Those of the sweep."""
        turns = [(layer, half) for layer in range(len(self._shape.units.attention)) for half in range(2)]
        for _ in range(KV_BUFFERS):
            self._load_next()
        ahead = self._project(0, 0)
        for turn, following in zip(turns, [*turns[1:], None]):
            ahead = self._turn(*turn, following, ahead)
            yield from self._build.drain()
        build, shape, ready = self._build, self._shape, self._ready
        if shape.first_part:
            _head(build, shape, self._batches[0], ready)
        self._experts(self._pending[1], 1, 1)
        if shape.first_part:
            _head(build, shape, self._batches[1], ready, half=1)
        else:
            _head(build, shape, range(len(ready)), ready)
        yield from build.drain()

    def _turn(
        self, layer: int, half: int, following: tuple[int, int] | None, ahead: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Attention of one half in a layer, between the experts of the other one. ``ahead`` is what the first batch waits for;
        returns that of the batch after the last one."""
        own, other, ends = self._batches[half], self._pending[1 - half], []
        parts = max(1, len(own) - 1)
        for place, j in enumerate(own, start=1):
            last = place == len(own)
            after = () if last else self._project(layer, j + 1)
            self._experts(other, min(place, parts), parts)
            if last and following is not None:
                after = self._project(following[0], self._batches[following[1]][0])
            end, home = _attend(self._build, self._shape, layer, j, ahead)
            if j in self._shape.fetched_batches:
                self._load_next()
            ends.append(end)
            self._ready[j] = (-1, home)
            ahead = after
        self._route(layer, half, ends)
        return ahead

    def _load_next(self) -> None:
        """Requests the KV of the next batch that fetches, if there is one."""
        for at in islice(self._to_load, 1):
            self._loads[at] = _load_kv(self._build, self._shape, *at)

    def _project(self, layer: int, j: int) -> tuple[int, ...]:
        """A batch up to where it can be attended; returns what its ``attend`` waits for."""
        if j == 0:
            self._weights = _fetch(self._build, layer, self._shape.units.attention[layer])
        weights, loaded = self._weights, self._loads.pop((layer, j), -1)
        return (*_project(self._build, self._shape, layer, j, weights, self._ready[j], loaded), weights)

    def _route(self, layer: int, half: int, ends: Sequence[int]) -> None:
        pending = self._pending[half]
        pending.route = self._build.add("route", "gpu", layer, ends, half=half)
        units = self._shape.units.experts[layer]
        order = sorted(units, key=lambda step: step.tier == "gpu") if half else units
        pending.layer, pending.units, pending.issued = layer, order, 0

    def _experts(self, pending: _Pending, part: int, parts: int) -> None:
        """Those of a half up to a part of all; with the last of them the half is ready for its next layer."""
        upto = len(pending.units) * part // parts
        for step in pending.units[pending.issued : upto]:
            if pending.half == 0:
                self._arrived[step.unit] = _fetch(self._build, pending.layer, step)
            pending.last = self._build.add(
                "expert",
                "gpu",
                pending.layer,
                (self._arrived[step.unit], pending.route),
                unit=step.unit,
                half=pending.half,
                releases=step.unit if pending.half else None,
            )
        pending.issued = upto
        if part == parts and pending.units:
            for j in self._batches[pending.half]:
                self._ready[j] = (pending.last, *self._ready[j][1:])
