"""What the user has decided about a policy, so that the planner decides the rest."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from policies.common.checks import check_count, check_percent, check_shares
from policies.common.errors import UsageError
from policies.policy import SCHEDULES, Policy

_PAIRS = (("weights", "w"), ("cache", "cache"), ("activations", "act"))


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
    expert_order: tuple[tuple[int, ...], ...] | None = None
    overlap: bool = True
    pin_weight: bool = True

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "expert_order":  # the policies that get it check it
                continue
            if field.name.endswith("_percent"):
                object.__setattr__(self, field.name, check_percent(field.name, value))
            elif field.name in ("overlap", "pin_weight"):
                if not isinstance(value, bool):
                    raise UsageError(f"{field.name} is {value!r}; it must be true or false.")
            elif field.name != "schedule":
                check_count(field.name, value, minimum=2 if field.name == "weight_slots" else 1)
            elif value not in SCHEDULES:
                raise UsageError(f"schedule is {value!r}; it must be one of {', '.join(SCHEDULES)}.")
        for what, stem in _PAIRS:
            check_shares(what, *(getattr(self, f"{stem}_{tier}_percent") or 0.0 for tier in ("gpu", "cpu")))

    @property
    def given(self) -> dict[str, object]:
        """The fields that are given, switches included."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

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
        names = [f"{name} {value:g}" if not isinstance(value, str) else f"{name} {value}" for name, value in self.given.items()
                 if not isinstance(value, (bool, tuple))]  # fmt: skip
        return ", ".join(names)
