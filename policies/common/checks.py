"""What a number of a policy, a workload or a machine may be."""

import sys
from numbers import Integral, Real
from typing import TypeGuard

from policies.common.errors import UsageError

PERCENT_TOLERANCE = 1e-6


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Returns `value` as an int, or raises UsageError unless it is a whole number of at least `minimum`."""
    if isinstance(value, (int, Integral)) and not isinstance(value, bool) and int(value) >= minimum:
        return int(value)
    raise UsageError(f"{name} is {value!r}; it must be a whole number of at least {minimum}.")


def check_number(name: str, value: object, *, zero: bool = False) -> float:
    """Returns `value` as a float, or raises UsageError unless it is a finite number above 0 (of at least 0 with `zero`)."""
    if _is_within(value, sys.float_info.max) and (zero or value != 0):
        return float(value) + 0.0  # -0.0 becomes 0.0
    raise UsageError(f"{name} is {value!r}; it must be a finite number {'of at least' if zero else 'above'} 0.")


def check_percent(name: str, value: object) -> float:
    """Returns `value` as a float, or raises UsageError unless it is a number from 0 to 100."""
    if _is_within(value, 100):
        return float(value) + 0.0  # -0.0 becomes 0.0
    raise UsageError(f"{name} is {value!r}; it must be a number from 0 to 100.")


def _is_within(value: object, most: float) -> TypeGuard[float]:
    """Whether it is a number from 0 to ``most``."""
    if isinstance(value, float):
        return 0 <= value <= most
    return isinstance(value, Real) and not isinstance(value, bool) and not value < 0 and value <= most


def check_shares(name: str, gpu_percent: float, cpu_percent: float) -> tuple[float, float]:
    """Returns both percents as floats, or raises UsageError unless each is 0 to 100 and they sum to at most 100."""
    gpu_percent = check_percent(f"the GPU percent of {name}", gpu_percent)
    cpu_percent = check_percent(f"the CPU percent of {name}", cpu_percent)
    if gpu_percent + cpu_percent > 100 + PERCENT_TOLERANCE:
        raise UsageError(
            f"{name}: {gpu_percent:g} % on the GPU and {cpu_percent:g} % on the CPU add up to "
            f"{gpu_percent + cpu_percent:g} %; lower one, so that they sum to at most 100 (the rest goes to disk)."
        )
    return gpu_percent, cpu_percent
