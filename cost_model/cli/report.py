"""What is known of a policy, on a screen that a person reads in ten seconds, and the same as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.planner.solve import with_achieved_shares
from cost_model.timing.evaluate import Prediction
from cost_model.timing.phase_loads import mode_shares
from cost_model.timing.sweep_load import MODES
from policies.common.memory_units import GIB
from policies.placement import TIERS
from policies.policy import Policy, PolicyFile
from policies.workload import Workload

if TYPE_CHECKING:
    from cost_model.planner.solve import Explanation
    from cost_model.routing.expert_usage import ExpertUsage
    from cost_model.simulation.simulate import Simulation

_WIDTH, _MARGIN = 100, 11
_BAR = 20
_LARGEST_ITEMS = 2
_LEAST_SHARE = 0.001
_BUSY = 0.95
_EXAMPLE_ROWS = 10_000
#: What a job is bound by, in words, by the lane that takes longest.
BOUND_BY = {
    "gpu": "compute-bound: attention and experts on the compute device take the longest",
    "cpu": "bound by attention on the CPU",
    "h2d": "PCIe-bound: weights on their way to the GPU",
    "d2h": "PCIe-bound: new KV on its way to host memory",
    "kv loads": "bound by fetched KV: read from disk, gathered, and copied to the GPU, one GPU batch after the other",
    "hidden states": "bound by activations on their way to the GPU and back",
    "pcie": "PCIe-bound: weights, KV and activations over the link, both ways",
    "disk_read": "disk-bound: reads of weights and KV",
    "disk_write": "disk-bound: writes of KV",
    "host memory": "bound by host memory's bandwidth, which copies and CPU attention share",
    "cores": "bound by the CPU cores, which all lanes share",
    "schedule": "bound by the chain of operations: computation, and what it waits for in a layer",
    "on demand": "bound by the experts that routing asks for: they are moved while the layer waits",
    "slots": "bound by the weight slots: the link waits for a free one while a layer attends",
    "serial": "every lane waits for the others (--overlap false)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A policy and what is known of it.

    Args:
        arch, hardware, workload: the model on the machine for the job.
        dtype_bytes: bytes of one number in the compute dtype.
        origin: a phrase on where the machine's rates come from.
        notes: sentences on how the job's lengths were found.
        policy, prediction: the policy and what is expected of it.
        explanation: why it is that one; None for a given policy.
        usage: how often each expert was chosen, where that is known.
        simulation: the job followed sweep by sweep; None for one without end. Where it is given, the whole job's rate, time
            and lanes are its.
    """

    arch: ModelArch
    hardware: Hardware
    workload: Workload
    dtype_bytes: int
    origin: str
    notes: tuple[str, ...] = ()
    policy: Policy
    prediction: Prediction
    explanation: Explanation | None = None
    usage: ExpertUsage | None = None
    simulation: Simulation | None = None

    @property
    def advice(self) -> tuple[str, ...]:
        """What would help most, a phrase each; nothing for a given policy."""
        now = self.predicted()["tokens_per_s"]
        return tuple(each.describe(now) for each in self.explanation.advice) if self.explanation else ()

    def achieved(self) -> dict[str, tuple[float, float, float]]:
        """(GPU, CPU, disk) in percent of weights, KV cache and activations, after rounding to whole pieces."""
        allocation = self.prediction.allocation
        pages, tiers = sum(allocation.kv_pages.values()), allocation.activation_tiers
        return {
            "weights": allocation.placement.achieved_percent,
            "KV cache": _by_tier(lambda tier: 100.0 * allocation.kv_pages[tier] / pages),
            "activations": _by_tier(lambda tier: 100.0 * tiers.count(tier) / len(tiers)),
        }

    def policy_file(self) -> PolicyFile:
        """The file that carries the policy, with achieved percents."""
        return PolicyFile(
            policy=with_achieved_shares(self.policy, self.prediction.allocation),
            model=self.arch.fingerprint(),
            hardware=self.hardware.fingerprint(),
            workload=self.workload.to_json(),
            predicted=self.predicted(),
        )

    def predicted(self) -> dict[str, Any]:
        """The section "predicted" of the policy file."""
        values, simulation = self.prediction.to_json(), self.simulation
        if simulation:
            values |= {"tokens_per_s": simulation.tokens_per_s, "job_s": simulation.job_s, "wall_s": simulation.job_s}
            values |= {"sweep_s": simulation.job_s / simulation.sweeps, "lanes_s": dict(simulation.lanes_s)}
        return values

    def lane_shares(self) -> dict[str, float]:
        """Part of the time in which each lane is at work."""
        values = self.predicted()
        return {lane: values["lanes_s"][lane] / values["wall_s"] for lane in self.prediction.lanes_s}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; ``policy_file`` is what ``-o`` writes."""
        prediction = self.prediction
        return {
            "kind": "flexmoe.report",
            "schema_version": 1,
            "policy_file": self.policy_file().to_json(),
            "achieved_percent": {name: dict(zip(TIERS, shares)) for name, shares in self.achieved().items()},
            "memory_bytes": {tier: dict(items) for tier, items in prediction.memory.parts.items()},
            "budgets_bytes": dict(prediction.budgets),
            "lanes_share": self.lane_shares(),
            "rates": self.origin,
            "notes": list(self.notes),
            "advice": list(self.advice),
            "explanation": self.explanation.to_json() if self.explanation else None,
            "phases_s": dict(self.simulation.phases_s) if self.simulation else None,
        }

    def lines(self) -> list[str]:
        """The screen, at most 100 columns wide."""
        return [
            *_section("machine", self._machine()),
            *_section("model", self._model()),
            *_section("job", self._job()),
            "",
            *_section("policy", self._policy()),
            "",
            *_section("predicted", self._predicted()),
            *_section("memory", _memory(self.prediction)),
            *_section("lanes", _lanes(self.lane_shares())),
            *_section("limit", [self._limit()]),
            *_section("advice", self.advice),
        ]

    def _machine(self) -> list[str]:
        hw, gpu = self.hardware, self.hardware.gpu
        on_cuda = hw.device == "cuda"
        device = f"{gpu.name} {_gib(gpu.memory_bytes)}, host" if on_cuda else f"{gpu.name}, {hw.cores} cores, memory"
        link = f", PCIe {_gb(gpu.h2d_bytes_per_s)}" if on_cuda else ""
        memory = f"{_gib(hw.host_memory_bytes)} at {_gb(hw.host_bytes_per_s)}"
        disk = f"{_gib(hw.disk_bytes)} at {_gb(hw.disk_read_bytes_per_s)}"
        return [f"{device} {memory}, disk {disk}{link}", self.origin]

    def _model(self) -> list[str]:
        arch = self.arch
        packed = f" in {arch.packed.describe()}" if arch.packed else ""
        size = f"{arch.parameters / 1e9:.2f} G parameters, {_gib(arch.total_bytes)}{packed}"
        compressed = self.policy.compress_cache
        kv_bytes = arch.kv_bytes_per_token(self.dtype_bytes, compressed=compressed)
        windows = " while all layers see it" if arch.windowed_share else ""
        kv = f"{kv_bytes / 1024:.0f} KiB of {'int8 ' if compressed else ''}KV a token{windows}"
        return [f"{arch.name or arch.model_type}: {size}; computes in {8 * self.dtype_bytes} bits, {kv}"]

    def _job(self) -> list[str]:
        job = self.workload
        mean = "mean " if len(job.lengths) > 1 else ""
        rows = f"{job.num_requests:,} requests" if job.num_requests else "requests without end"
        longest = f", longest row {job.longest_row}" if job.lengths else ""
        lengths = f"{rows}, {mean}prompt {job.prompt_len}, {mean}completion {job.gen_len} tokens{longest}"
        routed = [f"experts are chosen as {self.usage.tokens:,} tokens of another run chose them"] if self.usage else []
        return [lengths, *self.notes, *routed]

    def _policy(self) -> list[str]:
        policy, allocation = self.policy, self.prediction.allocation
        slots = f"; {allocation.slots} slots" if allocation.slots else ""
        slots += "; two half-blocks" if policy.half_blocks > 1 else ""
        overlap = "" if policy.overlap else "; no overlap"
        order = "; most used experts first" if policy.expert_order else ""
        shares = [f"{name:<12}" + "".join(f"{v:8.1f}" for v in row) for name, row in self.achieved().items()]
        modes = mode_shares(policy, allocation, policy.block_size)
        where = {"gpu": "on the GPU", "fetch": "fetched to it", "disk": "from disk", "cpu": "on the CPU"}
        attended = ", ".join(f"{_percent(modes[mode])} {where[mode]}" for mode in MODES if mode in modes)
        rows = f"{policy.num_gpu_batches} GPU batches of {policy.gpu_batch_size} = {policy.block_size} rows"
        return [
            f"{policy.schedule}: {rows}; at most {policy.prefill_tokens} prompt tokens a sweep{slots}{overlap}{order}",
            f"{'percent on':<12}" + "".join(f"{tier:>8}" for tier in ("GPU", "CPU", "disk")),
            *shares,
            f"attended: {attended}",
        ]

    def _predicted(self) -> list[str]:
        p, job = self.prediction, self.predicted()
        if job["job_s"] is None:
            rows = _EXAMPLE_ROWS
            span = f"{rows:,} requests in {_duration(rows * self.workload.gen_len / p.tokens_per_s)} once it is full"
        else:
            span = f"{self.workload.num_requests:,} requests in {_duration(job['job_s'])}"
        if self.simulation:
            fill, drain = (_duration(self.simulation.phases_s[name]) for name in ("fill", "drain"))
            span += f" ({fill} to fill, {drain} to drain)"
        rates = f"prefill {_number(p.prefill_tokens_per_s)} prompt tokens/s, decode {_number(p.decode_tokens_per_s)} tokens/s"
        return [
            f"{_number(job['tokens_per_s'])} tokens/s generated: {span}",
            f"{rates}; a sweep takes {_duration(job['sweep_s'])}, a row {_duration(p.row_s)}",
        ]

    def _limit(self) -> str:
        """What decides; a chain of operations in which nothing waits is computation alone."""
        name = self.prediction.bottleneck
        if name == "schedule" and self.lane_shares()["gpu"] >= _BUSY:
            name = "gpu"
        return BOUND_BY.get(name, f"bound by {name}")


def _by_tier(share: Callable[[str], float]) -> tuple[float, float, float]:
    gpu, cpu, disk = map(share, TIERS)
    return gpu, cpu, disk


def _memory(prediction: Prediction) -> list[str]:
    parts, rows = prediction.memory.parts, []
    for tier, items in parts.items():
        usage = _usage(tier, prediction.memory.total(tier), prediction.budgets.get(tier))
        largest = sorted(items, key=items.__getitem__, reverse=True)[: 1 if "TOO" in usage else _LARGEST_ITEMS]
        rows.append(usage + "".join(f", {item} {_short(items[item])}" for item in largest).replace(", ", "  ", 1))
    for name, budget in prediction.budgets.items():
        if name not in parts:
            rows.append(_usage(name, sum(map(prediction.memory.total, name.split("+"))), budget))
    return rows


def _usage(name: str, used: int, budget: int | None) -> str:
    if budget is None:
        return f"{name:<11}{'':<{_BAR}} {used / GIB:7.2f} GiB"
    over = f": {(used - budget) / GIB:.2f} TOO MUCH" if used > budget else ""
    share = used / budget if budget else float(used > 0)
    return f"{name:<11}{bar(share)} {used / GIB:7.2f} of {budget / GIB:.2f} GiB{over}"


def _lanes(shares: dict[str, float]) -> list[str]:
    shown = {lane: share for lane, share in shares.items() if share >= _LEAST_SHARE}
    return [f"{lane:<11}{bar(share)} {100 * share:5.1f} % of the time" for lane, share in shown.items()]


def bar(share: float, width: int = _BAR) -> str:
    """``share`` (0 to 1) as a bar; what is above 0 shows."""
    filled = min(width, max(round(share * width), 1 if share > 0 else 0))
    return "#" * filled + "." * (width - filled)


def _section(name: str, lines: Iterable[str]) -> list[str]:
    """The lines beside the name of their section; a long one is wrapped."""
    wrapped = [part for line in lines for part in _wrapped(line)]
    return [f"{name if index == 0 else '':<{_MARGIN}}{line}" for index, line in enumerate(wrapped)]


def _wrapped(line: str) -> list[str]:
    """A sentence in lines that fit; a line with columns is never longer."""
    if len(line) <= _WIDTH - _MARGIN:
        return [line]
    return textwrap.wrap(line, _WIDTH - _MARGIN, subsequent_indent="  ", break_long_words=False)


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f}".removesuffix(".0") + " GiB"


def _short(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 else "<0.01"


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
