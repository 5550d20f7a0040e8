"""What would help most: the problem solved again on a better machine, or with fewer bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cost_model.hardware.hardware import Gpu, Hardware
from cost_model.hardware.link_curves import scaled
from cost_model.hardware.speeds import with_speeds
from cost_model.model.packing import packed_as
from cost_model.model.weight_units import experts_per_unit, group_on
from cost_model.planner.constraints import Fixed
from cost_model.planner.search import Optimum, improved
from cost_model.timing.problem import Problem
from policies.common.errors import UsageError
from policies.common.memory_units import GIB
from policies.common.option_names import option
from policies.policy import Policy

#: So many changes of the machine are shown.
_MOST_OF_MACHINE = 3
#: What a change has to give to be worth a word, and a compression to be chosen.
LEAST_GAIN = 0.01
#: Formats of weights, those that change them least first; and those that are spoken of, as others gain much the same.
_FORMATS, _SHOWN_FORMATS = ("int8", "fp8", "int4", "mxfp4"), ("int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change.

    Attributes:
        change: in words.
        tokens_per_s: what the best policy then gives.
        gain: its ratio to what is had now, less 1; at least, as the search for it is short.
        ask: the option that asks for it; empty for another machine.
    """

    change: str
    tokens_per_s: float
    gain: float
    ask: str = ""

    def describe(self, tokens_per_s: float) -> str:
        """The change and its gain; of what can be asked for also the speed, and how.

        Args:
            tokens_per_s: that is predicted now.
        """
        gain = f"{self.gain + 1:.1f}x" if self.gain >= 1 else f"+{100 * self.gain:.0f} %"
        if not self.ask:
            return f"{self.change}: {gain}"
        then = (1 + self.gain) * tokens_per_s
        return f"{self.change}: at least {f'{then:,.0f}' if then >= 100 else f'{then:.3g}'} tokens/s, {gain}; ask by {self.ask}"


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
    fewer_bytes = *_weights(problem, fixed, _SHOWN_FORMATS), *_cache(problem, fixed)
    for changed in (*_machines(problem, fixed, scarce), *fewer_bytes):
        then = improved(changed.problem, changed.fixed, found.policy)
        programmes, evaluations = programmes + then.programmes, evaluations + then.evaluations
        gain = then.tokens_per_s / now - 1
        if gain >= LEAST_GAIN:
            advice.append(Advice(change=changed.change, tokens_per_s=then.tokens_per_s, gain=gain, ask=changed.ask))
    advice.sort(key=lambda each: -each.gain)
    shown = [each for each in advice if not each.ask][:_MOST_OF_MACHINE] + [each for each in advice if each.ask]
    best_first = tuple(sorted(shown, key=lambda each: -each.gain))
    return Hints(advice=best_first, programmes=programmes, evaluations=evaluations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A problem and what is fixed of it after a change.

    Attributes:
        change: in words.
        ask: the option that asks for it; empty for another machine.
    """

    change: str
    problem: Problem
    fixed: Fixed
    ask: str = ""


def _machines(problem: Problem, fixed: Fixed, scarce: set[str]) -> Iterator[Changed]:
    for names, change, better in _MACHINES:
        if scarce & set(names):
            yield Changed(change=change, problem=replace(problem, hardware=better(problem.hardware)), fixed=fixed)


# Fewer bytes.


def compressed(problem: Problem, fixed: Fixed) -> Iterator[Changed]:
    """All ways to compress a problem, one thing before both, and what changes numbers least first."""
    weights, cache = list(_weights(problem, fixed, _FORMATS)), list(_cache(problem, fixed))
    yield from (*cache, *weights)
    yield from (both for own in weights for both in _cache(own.problem, own.fixed))


def most_gaining(problem: Problem, fixed: Fixed, policy: Policy) -> tuple[Problem, Fixed] | None:
    """The compression that gains most by a short search from a policy; None where none gains.

    One that changes numbers more is taken only where it gains beside those that change them less.
    """
    best, tokens_per_s = (problem, fixed), improved(problem, fixed, policy).tokens_per_s
    for tried in (partial(_weights, formats=_FORMATS), _cache):
        for changed in tried(*best):
            then = improved(changed.problem, changed.fixed, policy).tokens_per_s
            if then >= (1 + LEAST_GAIN) * tokens_per_s:
                best, tokens_per_s = (changed.problem, changed.fixed), then
    return None if best == (problem, fixed) else best


def _cache(problem: Problem, fixed: Fixed) -> Iterator[Changed]:
    if not fixed.compress_cache:
        ask = option("compress_cache", True)
        yield Changed(change="int8 KV", problem=problem, fixed=replace(fixed, compress_cache=True), ask=ask)


def _weights(problem: Problem, fixed: Fixed, formats: Iterable[str]) -> Iterator[Changed]:
    if problem.arch.packed is None:
        for format in formats:
            with contextlib.suppress(UsageError):  # no group of the format fits the widths, or matrices lie together
                yield _with_weights(problem, fixed, format)


def _with_weights(problem: Problem, fixed: Fixed, format: str) -> Changed:
    """Weights in a format, in units of the size that suits them, or of as many experts as the order of experts is given for."""
    arch = packed_as(replace(problem.arch, group=None), format)
    given = fixed.expert_order is not None
    arch = arch.grouped(experts_per_unit(problem.arch) if given else group_on(problem.hardware, arch))
    return Changed(
        change=f"{format} weights",
        problem=replace(problem, arch=arch),
        fixed=replace(fixed, compress_weight=format),
        ask=option("compress_weight", format),
    )


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
