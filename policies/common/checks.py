"""What a number of a policy, a workload or a machine may be."""

import sys
from numbers import Integral, Real

from policies.common.errors import UsageError

PERCENT_TOLERANCE = 1e-6


def check_count(name: str, value: int, minimum: int = 1) -> int:
    """Returns `value` as an int, or raises UsageError unless it is a whole number of at least `minimum`."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)) or value < minimum:
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least {minimum}.")
    return int(value)


def check_number(name: str, value: float, *, zero: bool = False) -> float:
    """Returns `value` as a float, or raises UsageError unless it is a finite number above 0 (of at least 0 with `zero`)."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not 0 <= value <= sys.float_info.max or (value == 0 and not zero):
        raise UsageError(f"{name} is {value!r}; it must be a finite number {'of at least' if zero else 'above'} 0.")
    return float(value) + 0.0  # -0.0 becomes 0.0


def check_percent(name: str, value: float) -> float:
    """Returns `value` as a float, or raises UsageError unless it is a number from 0 to 100."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)) or not 0 <= value <= 100:
        raise UsageError(f"{name} is {value!r}; it must be a number from 0 to 100.")
    return float(value) + 0.0  # -0.0 becomes 0.0


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
