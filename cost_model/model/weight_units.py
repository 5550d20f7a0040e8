"""The weight units of a model: what is placed and moved as one, and what the units of experts are called.

Small experts are moved in groups: a unit of 9 MiB is over before its dispatch is. A group is a range of consecutive
experts of a layer, so placement, schedule, slots and the planner need not know that it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from cost_model.hardware.link_curves import efficient_bytes
from policies.common.units import SYSTEM_PAGE_BYTES
from policies.placement import Unit

if TYPE_CHECKING:
    from cost_model.hardware.hardware import Hardware
    from cost_model.model.arch import ModelArch

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


def experts_per_unit(expert_bytes: int, num_experts: int, unit_bytes: float = UNIT_BYTES) -> int:
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
    group = experts_per_unit(arch.expert_bytes, arch.num_experts, min(wanted, _MOST_BYTES))
    return None if group == arch.experts_per_unit else group


def unit_slack_bytes(arch: ModelArch) -> int:
    """What a unit takes at most beyond its stored bytes: each of its tensors may lie in file pages of its own (on the
    device, between 256-byte boundaries), which costs less than two pages."""
    attention = 4 * (2 if arch.attention_bias else 1) + 2 * (2 if arch.norm_bias else 1) + 2 * arch.qk_norm + 1
    return max(_LEAST_SLACK_BYTES, 2 * SYSTEM_PAGE_BYTES * max(attention, 3 * arch.experts_per_unit))


def expert_unit(layer: int, experts: range) -> str:
    """Name of the unit of these experts of a layer: `layers.3.expert.5`, or `layers.3.expert.8-15` for a group."""
    last = f"-{experts[-1]}" if len(experts) > 1 else ""
    return f"layers.{layer}.expert.{experts[0]}{last}"


def experts_of(unit: str) -> range:
    """The experts of a unit, by its name."""
    first, _, last = unit.rsplit(".", 1)[1].partition("-")
    return range(int(first), int(last or first) + 1)


def head_chunks(arch: ModelArch) -> int:
    """The fewest equal row chunks of the head that are each no larger than the largest attention or expert unit.

    So the head never asks for a larger slot. The final norm is stored with the first chunk.
    """
    row = arch.head_row_params
    largest = max(arch.experts_per_unit * arch.expert_params, arch.dense_params, arch.attention_params)
    chunks = -(-arch.vocab_size * row // largest)
    while max(-(-arch.vocab_size // chunks) * row, arch.vocab_size // chunks * row + arch.norm_params) > largest:
        chunks += 1
    return chunks


@lru_cache(maxsize=16)
def all_units(arch: ModelArch) -> tuple[Unit, ...]:
    """Units in schedule order, with their stored bytes."""
    return tuple(_units(arch))


def _units(arch: ModelArch) -> Iterator[Unit]:
    yield Unit("embed", -1, "embed", arch.embed_params * arch.dtype_bytes)
    for layer in range(arch.num_layers):
        yield Unit(f"layers.{layer}.attention", layer, "attention", arch.attention_bytes_in(layer))
        for experts in arch.expert_groups_in(layer):
            size = len(experts) * arch.expert_bytes_in(layer)
            yield Unit(expert_unit(layer, experts), layer, "expert", size)
    for index in range(arch.num_head_chunks):
        start, stop = arch.head_rows(index)
        params = (stop - start) * arch.head_row_params + (arch.norm_params if index == 0 else 0)
        yield Unit(f"head.{index}", arch.num_layers, "head", params * arch.dtype_bytes)
