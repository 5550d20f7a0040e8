"""The weight units of a shape: what is placed and moved as one, how large it is, and when its experts are computed together.

Small experts are moved in groups: a unit of 9 MiB is over before its dispatch is. A group is a range of consecutive
experts of a layer, so placement, schedule, slots and the planner need not know that it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import ceil

from cost_model.hardware.hardware import Hardware
from cost_model.hardware.link_curves import efficient_bytes
from cost_model.model.arch import ModelArch
from policies.common.memory_units import SYSTEM_PAGE_BYTES
from policies.units import EMBEDDING, Unit, UnitId, expert_unit

#: Bytes of a unit at which a link is efficient, where none has been measured.
UNIT_BYTES = 64 << 20
#: A layer keeps at least so many units of experts: shares stay fine, and units arrive while others compute.
FEWEST_UNITS = 8
#: Of a link's seconds, what dispatch may take beside it; a unit is read, copied and computed.
_DISPATCH_SHARE = 0.05
_OPS_PER_UNIT = 3
#: What a unit has at least where no link was measured by size, and at most.
_LEAST_BYTES, _MOST_BYTES = 16 << 20, 256 << 20
_LEAST_SLACK_BYTES = 64 << 10
#: Mean tokens of an expert up to which a grouped product is at least as fast as a product per expert.
GROUPED_TOKENS = 64
#: Grouped products want rows of a multiple of this.
ROW_BYTES = 16


@lru_cache(maxsize=16)
def units_of(arch: ModelArch) -> tuple[Unit, ...]:
    """All units in schedule order, with their stored bytes; made once per shape.

    A tied model's head chunks refer to the embedding table again: as units they are placed and moved on their own, so the sum
    over units counts the table twice, while `ModelArch.parameters` and `ModelArch.total_bytes` count it once.
    """
    return tuple(_units(arch))


def _units(arch: ModelArch) -> Iterator[Unit]:
    yield Unit(EMBEDDING, arch.embed_params * arch.dtype_bytes)
    for layer in range(arch.num_layers):
        yield Unit(UnitId("attention", layer), arch.attention_bytes_in(layer))
        for experts in expert_groups(arch, layer):
            size = len(experts) * arch.expert_bytes_in(layer)
            yield Unit(expert_unit(layer, experts), size)
    for index in range(head_chunks(arch)):
        start, stop = head_rows(arch, index)
        params = (stop - start) * arch.head_row_params + (arch.norm_params if index == 0 else 0)
        yield Unit(UnitId("head", arch.num_layers, index), params * arch.dtype_bytes)


def experts_per_unit(arch: ModelArch) -> int:
    """Consecutive experts of a layer that are placed and moved as one."""
    return min(arch.group or efficient_group(arch.expert_bytes, arch.num_experts), arch.num_experts)


def expert_units(arch: ModelArch) -> int:
    """Units of experts of a sparse layer."""
    return -(-arch.num_experts // experts_per_unit(arch))


def expert_groups(arch: ModelArch, layer: int) -> list[range]:
    """The experts of each unit of a layer; the last one may be smaller."""
    count, group = arch.experts_in(layer), experts_per_unit(arch)
    return [range(first, min(first + group, count)) for first in range(0, count, group)]


def efficient_group(expert_bytes: int, num_experts: int, unit_bytes: float = UNIT_BYTES) -> int:
    """The fewest experts that have ``unit_bytes`` together, as far as a layer has enough of them."""
    return max(1, min(ceil(unit_bytes / expert_bytes), num_experts // FEWEST_UNITS))


def group_on(hardware: Hardware, arch: ModelArch) -> int | None:
    """Experts per unit at which the machine's fastest link is efficient, as far as it was measured by the size of what is moved,
    and dispatching a unit costs little beside moving it.

    None where that is what a shape has by itself.
    """
    gpu = hardware.gpu
    links = (gpu.h2d_bytes_per_s, gpu.h2d_curve), (hardware.disk_read_bytes_per_s, hardware.disk_read_curve)
    rate, curve = max(links, key=lambda link: link[0])
    dispatched = _OPS_PER_UNIT * gpu.op_s * rate / _DISPATCH_SHARE
    wanted = max(dispatched, efficient_bytes(curve) if curve else _LEAST_BYTES)
    group = efficient_group(arch.expert_bytes, arch.num_experts, min(wanted, _MOST_BYTES))
    return None if group == experts_per_unit(arch) else group


def unit_slack_bytes(arch: ModelArch) -> int:
    """What a unit takes at most beyond its stored bytes: each of its tensors may lie in file pages of its own (on the
    device, between 256-byte boundaries), which costs less than two pages."""
    attention = 4 * (2 if arch.attention_bias else 1) + 2 * (2 if arch.norm_bias else 1) + 2 * bool(arch.qk_norm)
    attention += 1 + arch.sinks + arch.router_bias + arch.router_correction + (4 if arch.shared_ffn else 0)
    return max(_LEAST_SLACK_BYTES, 2 * SYSTEM_PAGE_BYTES * max(attention, 3 * experts_per_unit(arch)))


@lru_cache(maxsize=64)
def head_chunks(arch: ModelArch) -> int:
    """The fewest equal row chunks of the head that are each no larger than the largest attention or expert unit.

    So the head never asks for a larger slot. The final norm is stored with the first chunk.
    """
    row = arch.head_row_params
    dense = max((arch.expert_bytes_in(layer) for layer in arch.dense_layers), default=0)
    attention = max(map(arch.attention_bytes_in, range(arch.num_layers)))
    largest = max(experts_per_unit(arch) * arch.expert_bytes, dense, attention) // arch.dtype_bytes
    chunks = -(-arch.vocab_size * row // largest)
    while max(-(-arch.vocab_size // chunks) * row, arch.vocab_size // chunks * row + arch.norm_params) > largest:
        chunks += 1
    return chunks


def head_rows(arch: ModelArch, index: int) -> tuple[int, int]:
    """(start, stop) of the vocabulary rows in head chunk ``index``; chunks differ by at most one row."""
    chunks = head_chunks(arch)
    return index * arch.vocab_size // chunks, (index + 1) * arch.vocab_size // chunks


def are_grouped(arch: ModelArch, dtype_bytes: int, tokens: float) -> bool:
    """Whether a sweep of so many tokens computes the experts of a unit together where their weights lie stacked: what the
    runtime does, and the planner predicts.

    Args:
        arch: the shape, with the units of the run.
        dtype_bytes: bytes of one number in the compute dtype.
    """
    if experts_per_unit(arch) == 1 or tokens * arch.top_k > GROUPED_TOKENS * arch.num_experts:
        return False
    return all(width * dtype_bytes % ROW_BYTES == 0 for width in (arch.hidden, arch.ffn))
