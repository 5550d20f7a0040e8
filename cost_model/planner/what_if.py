"""What would help most: the problem solved again on a better machine, or with fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from cost_model.hardware.hardware import Gpu, Hardware
from cost_model.hardware.link_curves import scaled
from cost_model.hardware.speeds import with_speeds
from cost_model.model.arch import ModelArch
from cost_model.model.packed_format import PackedFormat
from cost_model.planner.constraints import Fixed
from cost_model.planner.search import Optimum, improved
from cost_model.timing.problem import Problem
from policies.common.memory_units import GIB

#: So many changes are shown that the runtime could use at once, and so many that it could not.
_MOST_OF_MACHINE, _MOST_OF_MODEL = 3, 2
_LEAST_GAIN = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change.

    Attributes:
        change: in words.
        tokens_per_s: what the best policy then gives.
        gain: its ratio to what is had now, less 1.
        available: the runtime has it; else it is a prospect.
    """

    change: str
    tokens_per_s: float
    gain: float
    available: bool = True

    def __str__(self) -> str:
        gain = f"{self.gain + 1:.1f}x" if self.gain >= 1 else f"+{100 * self.gain:.0f} %"
        return f"{self.change}: {gain}" + ("" if self.available else " (not in the runtime yet)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """The changes that give most, best first, with the programmes and evaluations that finding them took."""

    advice: tuple[Advice, ...] = ()
    programmes: int = 0
    evaluations: int = 0


def advise(problem: Problem, fixed: Fixed, found: Optimum, bottleneck: str) -> Hints:
    """What would help most. Only what binds is tried.

    Args:
        found: the best policy on the machine as it is.
        bottleneck: what decides most of its time.
    """
    scarce = {price.name for price in found.prices} | {bottleneck}
    now = improved(problem, fixed, found.policy).tokens_per_s
    advice, programmes, evaluations = [], 0, 0
    for change, better, available in _changes(problem, scarce):
        then = improved(better, fixed, found.policy)
        programmes, evaluations = programmes + then.programmes, evaluations + then.evaluations
        gain = then.tokens_per_s / now - 1
        if gain >= _LEAST_GAIN:
            advice.append(Advice(change=change, tokens_per_s=then.tokens_per_s, gain=gain, available=available))
    advice.sort(key=lambda each: -each.gain)
    shown = [each for each in advice if each.available][:_MOST_OF_MACHINE]
    shown += [each for each in advice if not each.available][:_MOST_OF_MODEL]
    best_first = tuple(sorted(shown, key=lambda each: -each.gain))
    return Hints(advice=best_first, programmes=programmes, evaluations=evaluations)


def _changes(problem: Problem, scarce: set[str]) -> Iterator[tuple[str, Problem, bool]]:
    for names, change, better in _MACHINES:
        if scarce & set(names):
            yield change, replace(problem, hardware=better(problem.hardware)), True
    for change, fewer in _MODELS:
        yield change, replace(problem, arch=fewer(problem.arch)), False


# Machines.

_Better = Callable[[Hardware], Hardware]


def _more_gpu_memory(hw: Hardware) -> Hardware:
    return _gpu(hw, memory_bytes=hw.gpu.memory_bytes + 8 * GIB)


def _more_host_memory(hw: Hardware) -> Hardware:
    more = 16 * GIB
    if hw.device == "cpu":
        hw = _gpu(hw, memory_bytes=hw.gpu.memory_bytes + more)
        hw = replace(hw, cpu_budget_bytes=None if hw.cpu_budget_bytes is None else hw.cpu_budget_bytes + more)
    return replace(hw, host_memory_bytes=hw.host_memory_bytes + more)


def _more_disk(hw: Hardware) -> Hardware:
    return replace(hw, disk_bytes=hw.disk_bytes + 10**12)


def _faster_link(hw: Hardware) -> Hardware:
    """Scattered KV is packed as fast as before, and copied twice as fast."""
    gpu = hw.gpu

    def behind(rate: float, link: float) -> float:
        return 1 / max(1 / rate - 1 / (2 * link), 0.5 / rate)

    rates = ("h2d_bytes_per_s", "d2h_bytes_per_s", "h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s")
    kv_load = behind(gpu.kv_load_bytes_per_s, gpu.h2d_bytes_per_s)
    kv_store = behind(gpu.kv_store_bytes_per_s, gpu.d2h_bytes_per_s)
    curve = scaled(gpu.h2d_curve, 2)
    return _gpu(
        hw, **_doubled(gpu, *rates), h2d_curve=curve, kv_load_bytes_per_s=kv_load, kv_store_bytes_per_s=kv_store
    )


def _faster_disk(hw: Hardware) -> Hardware:
    return with_speeds(hw, disk_read=2, disk_write=2)


def _faster_device(hw: Hardware) -> Hardware:
    return with_speeds(hw, compute=2)


def _faster_host(hw: Hardware) -> Hardware:
    return replace(hw, **_doubled(hw, "host_bytes_per_s", "cpu_attention_bytes_per_s", "cpu_attention_flops_per_s"))


def _doubled(rated: Hardware | Gpu, *names: str) -> dict[str, Any]:
    return {name: 2 * getattr(rated, name) for name in names}


def _gpu(hw: Hardware, **changes: Any) -> Hardware:
    return replace(hw, gpus=(replace(hw.gpu, **changes),))


#: What has to be scarce, the change, and the machine with it.
_MACHINES: Iterable[tuple[tuple[str, ...], str, _Better]] = (
    (("gpu memory", "on demand"), "+8 GiB GPU memory", _more_gpu_memory),
    (("cpu memory", "gpu+cpu memory"), "+16 GiB host memory", _more_host_memory),
    (("disk memory",), "+1 TB NVMe", _more_disk),
    (
        ("h2d", "d2h", "pcie", "slots", "kv loads", "hidden states", "on demand"),
        "a link to the device twice as fast",
        _faster_link,
    ),
    (("disk_read", "disk_write", "kv loads", "on demand"), "a disk twice as fast", _faster_disk),
    (("cpu", "host memory"), "host memory and CPU attention twice as fast", _faster_host),
    (("gpu", "cores", "schedule"), "a compute device twice as fast", _faster_device),
)


# Models.


#: Inputs that share a scale.
_GROUP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed(ModelArch):
    """The model with KV in fewer bits: at rest and on the links.

    Attributes:
        kv_bits: of one number of the KV cache; 0 is the compute dtype's.
    """

    kv_bits: int = 0

    def kv_bytes_per_token_layer(self, dtype_bytes: int = 2, *, compressed: bool = False) -> int:
        """Bytes of K and V that one token keeps in one layer."""
        full = ModelArch.kv_bytes_per_token_layer(self, dtype_bytes, compressed=compressed)
        return full * self.kv_bits // (8 * dtype_bytes) if self.kv_bits and not compressed else full


def _packed_weights(bits: int) -> Callable[[ModelArch], ModelArch]:
    packed = PackedFormat(method="compressed-tensors", codec="integer", bits=bits, columns=_GROUP)
    return lambda arch: arch if arch.packed else replace(arch, packed=packed)


def _packed_kv(bits: int) -> Callable[[ModelArch], ModelArch]:
    def pack(arch: ModelArch) -> ModelArch:
        values = {field.name: getattr(arch, field.name) for field in fields(ModelArch)}
        return Packed(**values, kv_bits=bits)

    return pack


_MODELS: Iterable[tuple[str, Callable[[ModelArch], ModelArch]]] = (
    ("int8 weights", _packed_weights(8)),
    ("int4 weights", _packed_weights(4)),
    ("int8 KV", _packed_kv(8)),
)
