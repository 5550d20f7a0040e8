"""What is given: to the planner by the user, and to one linear programme by the planner."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any

from policies.common.checks import check_count, check_percent, check_shares
from policies.common.errors import UsageError
from policies.policy import HALF_BLOCKS, SCHEDULES, Policy
from policies.workload import Workload

_PAIRS = (("weights", "w"), ("cache", "cache"), ("activations", "act"))
#: Cache percents (GPU, CPU) and CPU attention percent that put all rows into one mode of `sweep_load.MODES`.
_PURE = {"gpu": (100, 0, 0), "fetch": (0, 100, 0), "disk": (0, 0, 0), "cpu": (0, 100, 100)}
#: Fields that the policies which get them check.
_CHECKED_BY_POLICY = ("expert_order", "compress_weight")
#: Weights on the GPU where some are streamed; what they are worth is a variable of the programme.
_SOME_PERCENT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Fields of `Policy` that are given. None leaves one to the planner; 0 is a value like any other.

    Raises:
        UsageError: a value is of the wrong type or out of range, or two shares add up to more than 100.
    """

    gpu_batch_size: int | None = None
    num_gpu_batches: int | None = None
    w_gpu_percent: float | None = None
    w_cpu_percent: float | None = None
    cache_gpu_percent: float | None = None
    cache_cpu_percent: float | None = None
    act_gpu_percent: float | None = None
    act_cpu_percent: float | None = None
    prefill_tokens: int | None = None
    cpu_attention_percent: float | None = None
    schedule: str | None = None
    weight_slots: int | None = None
    half_blocks: int | None = None
    expert_order: tuple[tuple[int, ...], ...] | None = None
    compress_weight: str | None = None
    overlap: bool = True
    pin_weight: bool = True
    compress_cache: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name in _CHECKED_BY_POLICY:
                continue
            if field.name.endswith("_percent"):
                object.__setattr__(self, field.name, check_percent(field.name, value))
            elif field.name in ("overlap", "pin_weight", "compress_cache"):
                if not isinstance(value, bool):
                    raise UsageError(f"{field.name} is {value!r}; it must be true or false.")
            elif field.name == "half_blocks":
                if isinstance(value, bool) or value not in HALF_BLOCKS:
                    raise UsageError(f"half_blocks is {value!r}; it must be 1 or 2.")
            elif field.name != "schedule":
                check_count(field.name, value, minimum=2 if field.name == "weight_slots" else 1)
            elif value not in SCHEDULES:
                raise UsageError(f"schedule is {value!r}; it must be one of {', '.join(SCHEDULES)}.")
        for what, stem in _PAIRS:
            check_shares(what, *(getattr(self, f"{stem}_{tier}_percent") or 0.0 for tier in ("gpu", "cpu")))

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are given, switches included; each of the type that `Policy` has it in."""
        return {name: value for name in _GIVEN if (value := getattr(self, name)) is not None}

    def applied(self, policy: Policy) -> Policy:
        """The policy with what is given; the other share of a pair gives way where both are too much."""
        values = self.given
        for _, stem in _PAIRS:
            gpu, cpu = f"{stem}_gpu_percent", f"{stem}_cpu_percent"
            if gpu in values and cpu not in values:
                values[cpu] = min(getattr(policy, cpu), 100 - values[gpu])
            elif cpu in values and gpu not in values:
                values[gpu] = min(getattr(policy, gpu), 100 - values[cpu])
        changed = {name: value for name, value in values.items() if getattr(policy, name) != value}
        return replace(policy, **changed) if changed else policy

    def __str__(self) -> str:
        shown = {name: value for name, value in self.given.items() if not isinstance(value, (bool, tuple))}
        return ", ".join(
            f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in shown.items()
        )


_GIVEN = tuple(each.name for each in fields(Fixed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one linear programme takes as given.

    Attributes:
        schedule: rolling or static.
        fill_sweeps: sweeps in which a block fills; it sets the pace of admission.
        gpu_batch_size: rows per GPU batch.
        modes: how rows may be attended (`sweep_load.MODES`).
        rows: nominal block size.
        most_rows: the block may not be larger; None is no limit.
        streams: weights may live outside the GPU.
        disk_weights: weights may live on disk.
        act_percents: activations on the GPU and in host memory.
        overlap, pin_weight, compress_cache, half_blocks: as in `Policy`.
    """

    schedule: str
    fill_sweeps: float
    gpu_batch_size: int
    modes: tuple[str, ...]
    rows: float
    most_rows: float | None = None
    streams: bool = True
    disk_weights: bool = True
    act_percents: tuple[float, float] = (100.0, 0.0)
    overlap: bool = True
    pin_weight: bool = True
    compress_cache: bool = False
    half_blocks: int = 1

    def policy(self, workload: Workload, rows: float, mode: str) -> Policy:
        """A block of about so many rows, all in one mode; a few weights are on the GPU, or all."""
        cache_gpu, cache_cpu, attended = _PURE[mode]
        size = min(self.gpu_batch_size, max(1, round(rows)))
        count = max(1, round(rows / size))
        gpu = _SOME_PERCENT if self.streams else 100
        return Policy(
            gpu_batch_size=size,
            num_gpu_batches=count,
            w_gpu_percent=gpu,
            w_cpu_percent=0 if self.disk_weights else 100 - gpu,
            cache_gpu_percent=cache_gpu,
            cache_cpu_percent=cache_cpu,
            act_gpu_percent=self.act_percents[0],
            act_cpu_percent=self.act_percents[1],
            prefill_tokens=max(1, ceil(size * count * workload.prompt_len / self.fill_sweeps)),
            cpu_attention_percent=attended,
            schedule=self.schedule,
            overlap=self.overlap,
            pin_weight=self.pin_weight,
            compress_cache=self.compress_cache,
            half_blocks=self.half_blocks,
        )
