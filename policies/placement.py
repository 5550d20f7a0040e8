"""Fractions in, whole units, KV pages and batches per tier out: the only place where a share is rounded.

A user asks for percents; memory holds whole units. When every caller rounds for itself, asking for 20 % of the weights
on a tier can give 8 %, and planner and executor disagree about what fits. Here the rounding is done once, the
achieved percents are reported beside the asked ones (`describe`), and placing the achieved percents again gives
the same placement, so that a policy file means one thing.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from policies.common.checks import PERCENT_TOLERANCE, check_count, check_shares
from policies.common.errors import UsageError
from policies.units import KINDS, Unit, UnitId

TIERS = ("gpu", "cpu", "disk")


@dataclass(frozen=True)
class Placement:
    """The home tier of every unit: the first `gpu_end` units of the order on the GPU, up to `cpu_end` in host memory.

    Args:
        residency: the units in residency order.
        gpu_end, cpu_end: the two boundaries.
    """

    residency: "Residency"
    gpu_end: int
    cpu_end: int

    @cached_property
    def tier_of(self) -> dict[UnitId, str]:
        """The tier of each unit, in the order in which the units were given."""
        residency, gpu_end, cpu_end = self.residency, self.gpu_end, self.cpu_end
        return {
            unit.id: TIERS[(place >= gpu_end) + (place >= cpu_end)]
            for unit, place in zip(residency.units, residency.places, strict=True)
        }

    @cached_property
    def bytes_per_tier(self) -> dict[str, int]:
        """Stored bytes per tier; all three tiers are present."""
        return {tier: self.bytes_of(tier) for tier in TIERS}

    @property
    def achieved_percent(self) -> tuple[float, float, float]:
        """(gpu, cpu, disk) in percent of all stored bytes; placing these again returns this placement."""
        total_bytes = sum(self.bytes_per_tier.values())
        gpu, cpu, disk = (100.0 * self.bytes_per_tier[tier] / total_bytes for tier in TIERS)
        return gpu, cpu, disk

    def bytes_of(self, tier: str, *kinds: str) -> int:
        """Stored bytes of the units of these kinds (default all) in a tier."""
        return self.residency.bytes_between(*self.stretch(tier), *kinds)

    def count_of(self, tier: str, *kinds: str) -> int:
        """How many units of these kinds (default all) a tier holds."""
        return self.residency.count_between(*self.stretch(tier), *kinds)

    def stretch(self, tier: str) -> tuple[int, int]:
        """The places [first, last) in residency order that a tier holds."""
        return self._stretches[tier]

    @cached_property
    def _stretches(self) -> dict[str, tuple[int, int]]:
        ends = (0, self.gpu_end, self.cpu_end, len(self.residency.order))
        return dict(zip(TIERS, pairwise(ends), strict=True))


class Residency:
    """The units of a model in `residency_order`, with what any stretch of that order holds, in constant time.

    Args:
        units: all units of the model, in schedule order.
        expert_order: for each layer the numbers of its expert units, those first that are most worth a fast tier; None: as
            they stand.

    Attributes:
        order: the units in residency order.
        places: of each unit, as they were given, its place in that order.

    Raises:
        UsageError: there are no units, one is there twice, or the order is not one of these units.
    """

    def __init__(self, units: Iterable[Unit], expert_order: Sequence[Sequence[int]] | None = None):
        self.units, self.expert_order = tuple(units), expert_order
        if not self.units:
            raise UsageError("there are no weight units to place; give at least one.")
        different = len({unit.id for unit in self.units})
        if different != len(self.units):
            raise UsageError(f"{len(self.units)} units have only {different} different names; each needs its own.")
        self.order = tuple(residency_order(self.units, expert_order))
        place_of = {unit.id: place for place, unit in enumerate(self.order)}
        self.places = [place_of[unit.id] for unit in self.units]
        self._bytes = {kind: _sums(unit.stored_bytes * (unit.kind == kind) for unit in self.order) for kind in KINDS}
        self._counts = {kind: _sums(unit.kind == kind for unit in self.order) for kind in KINDS}
        self.prefix_bytes = _sums(unit.stored_bytes for unit in self.order)
        streamed = [0 if unit.kind == "embed" else unit.stored_bytes for unit in self.order]
        self._largest_after = list(accumulate(reversed(streamed), max, initial=0))[::-1]

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Residency) and self.order == other.order and self.units == other.units
        )

    def __hash__(self) -> int:
        return hash(self.units)

    def place(self, gpu_percent: float, cpu_percent: float) -> Placement:
        """The placement nearest to the asked percents; see `place_weights`."""
        gpu_percent, cpu_percent = check_shares("weights", gpu_percent, cpu_percent)
        gpu_end = _nearest_prefix(self.prefix_bytes, gpu_percent)
        return Placement(self, gpu_end, _nearest_prefix(self.prefix_bytes, gpu_percent + cpu_percent))

    def bytes_between(self, first: int, last: int, *kinds: str) -> int:
        """Stored bytes of the units of these kinds (default all) at places [first, last) of the order."""
        sums = [self._bytes[kind] for kind in kinds] if kinds else [self.prefix_bytes]
        return sum(s[last] - s[first] for s in sums)

    def count_between(self, first: int, last: int, *kinds: str) -> int:
        """How many units of these kinds (default all) stand at places [first, last) of the order."""
        return sum(self._counts[kind][last] - self._counts[kind][first] for kind in kinds) if kinds else last - first

    def largest_streamed_bytes(self, gpu_end: int) -> int:
        """Stored bytes of the largest unit that passes through a slot when the first `gpu_end` units are resident."""
        return self._largest_after[gpu_end]


def place_weights(units: Iterable[Unit], gpu_percent: float, cpu_percent: float) -> Placement:
    """Gives every unit a home tier, near the asked percents and spread evenly over the layers.

    All units stand in one fixed order (`residency_order`). The GPU holds the prefix whose bytes are nearest to
    `gpu_percent` of the total, GPU and CPU together the prefix nearest to `gpu_percent + cpu_percent`, and the disk
    the rest; of two equally near prefixes the shorter one is taken. Both boundaries are then exact prefix sums,
    which is why the achieved percents lead back to the same placement. 0 % is no unit at all, 100 % is all.

    Args:
        units: all units of the model, in schedule order.
        gpu_percent, cpu_percent: shares of the stored bytes, 0 to 100; the rest is disk.

    Raises:
        UsageError: there are no units, one is there twice, or the percents do not add up.
    """
    return Residency(units).place(gpu_percent, cpu_percent)


def residency_order(units: Sequence[Unit], expert_order: Sequence[Sequence[int]] | None = None) -> list[Unit]:
    """All units, those first that are most worth a fast tier; it does not depend on percents.

    Embedding, attention and head serve every token in every sweep and are small, so they come before the experts.
    Experts follow by their rank within the layer (``expert_order``, as `Residency` takes it), and for each rank the layers
    come in bit-reversed (van der Corput) order. That order is the same for every rank, so any interval of the experts is a
    window of one repeating sequence: two layers differ by at most one expert in a prefix (GPU) and in an interval (CPU) alike, and the layers
    that hold the extra one are spread over the depth of the model.

    Raises:
        UsageError: ``expert_order`` has another number of layers, or a layer another number of expert units.
    """
    layers = sorted({unit.layer for unit in units if unit.kind in ("attention", "expert")})
    rank = {layer: place for place, layer in enumerate(_spread(layers))}
    by_kind = {kind: [unit for unit in units if unit.kind == kind] for kind in KINDS}
    attention = sorted(by_kind["attention"], key=lambda unit: rank[unit.layer])

    ranked = _ranked_experts(by_kind["expert"], layers, expert_order)
    experts = sorted(by_kind["expert"], key=lambda unit: (ranked[unit.id], rank[unit.layer]))
    return by_kind["embed"] + attention + by_kind["head"] + experts


def _ranked_experts(
    experts: Sequence[Unit], layers: Sequence[int], order: Sequence[Sequence[int]] | None
) -> dict[UnitId, int]:
    """Of each unit, how many units of its layer come before it."""
    of_layer: dict[int, list[UnitId]] = {layer: [] for layer in layers}
    for unit in experts:
        of_layer[unit.layer].append(unit.id)
    numbers = [range(len(own)) for own in of_layer.values()] if order is None else order
    if len(numbers) != len(layers):
        raise UsageError(
            f"expert_order is of {len(numbers)} layers, and the model has {len(layers)}; take one made for it."
        )
    for layer, own in zip(layers, numbers):
        if sorted(own) != list(range(len(of_layer[layer]))):
            raise UsageError(
                f"expert_order names {len(own)} expert units of layer {layer}, which has {len(of_layer[layer])}; it must "
                "name each of them once. Take an order made for this model and these units."
            )
    return {of_layer[layer][number]: at for layer, own in zip(layers, numbers) for at, number in enumerate(own)}


def place_pieces(total: int, gpu_percent: float, cpu_percent: float) -> dict[str, int]:
    """Splits `total` equal pieces (KV pages, rows) over the tiers by largest remainder.

    The counts sum to `total`, each is within one of its exact share, a tier asked for 0 % gets none, and splitting
    by the achieved percents gives the same counts. Of equal remainders the slower tier wins, as room there is cheaper.

    Raises:
        UsageError: `total` is not a whole number of at least 0, or the percents do not add up.
    """
    check_count("the number of pieces", total, minimum=0)
    gpu_percent, cpu_percent = check_shares("pieces", gpu_percent, cpu_percent)
    disk_percent = 100.0 - gpu_percent - cpu_percent
    if disk_percent <= PERCENT_TOLERANCE:
        disk_percent = 0.0
    if 100.0 in (gpu_percent, cpu_percent, disk_percent):
        return {tier: total * (share == 100.0) for tier, share in zip(TIERS, (gpu_percent, cpu_percent, disk_percent))}
    # Exact: the percents in whole multiples of the smallest power of two that any of them has.
    ratios = [percent.as_integer_ratio() for percent in (gpu_percent, cpu_percent, disk_percent)]
    finest = max(denominator for _, denominator in ratios)
    parts = [numerator * (finest // denominator) for numerator, denominator in ratios]
    whole = sum(parts)
    counts = [total * part // whole for part in parts]
    by_remainder = sorted(range(len(TIERS)), key=lambda tier: (total * parts[tier] % whole, tier), reverse=True)
    for tier in by_remainder[: total - sum(counts)]:
        counts[tier] += 1
    return dict(zip(TIERS, counts, strict=True))


def place_batches(num_batches: int, gpu_percent: float, cpu_percent: float) -> tuple[str, ...]:
    """The tier of the activations of each GPU batch: the counts of `place_pieces`, evenly interleaved.

    Interleaving (each turn goes to the tier that is furthest behind its share) keeps transfers of neighbouring
    batches from bunching up on one lane.

    Raises:
        UsageError: as `place_pieces`.
    """
    counts = place_pieces(num_batches, gpu_percent, cpu_percent)
    for tier, count in counts.items():
        if count == num_batches:
            return (tier,) * num_batches
    behind = dict.fromkeys(TIERS, 0)
    turns = []
    for _ in range(num_batches):
        for tier in TIERS:
            behind[tier] += counts[tier]
        turn = max(TIERS, key=behind.__getitem__)
        behind[turn] -= num_batches
        turns.append(turn)
    return tuple(turns)


def describe(asked: Sequence[float], achieved: Sequence[float], what: str = "weights") -> str:
    """One line that sets achieved percents beside asked ones, both (gpu, cpu, disk).

    Example:
        >>> describe((10, 20, 70), (10.2, 19.8, 70.0))
        'weights: asked 10/20/70 %, placed 10.2/19.8/70.0 %'
    """
    asked_text = "/".join(f"{round(percent, 2):g}" for percent in asked)
    achieved_text = "/".join(f"{percent:.1f}" for percent in achieved)
    return f"{what}: asked {asked_text} %, placed {achieved_text} %"


def _nearest_prefix(prefix_bytes: Sequence[int], percent: float) -> int:
    """The number of units whose bytes are nearest to `percent` of the total; the smaller one on a tie."""
    target_bytes = percent * prefix_bytes[-1] / 100
    above = min(bisect_left(prefix_bytes, target_bytes), len(prefix_bytes) - 1)
    if above == 0:
        return 0
    below_is_nearer = target_bytes - prefix_bytes[above - 1] <= prefix_bytes[above] - target_bytes
    return above - 1 if below_is_nearer else above


def _sums(values: Iterable[int]) -> list[int]:
    return list(accumulate(values, initial=0))


def _spread(layers: Sequence[int]) -> list[int]:
    """The layers in bit-reversed order: any window of it is spread over the depth of the model."""
    bits = max(len(layers) - 1, 0).bit_length()
    reversed_places = (int(format(place, f"0{bits}b")[::-1], 2) for place in range(1 << bits))
    return [layers[place] for place in reversed_places if place < len(layers)]
