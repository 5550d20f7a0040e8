"""Where nothing fits: which limit binds, and by how much each capacity alone would have to grow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import ceil, floor, log10

from cost_model.hardware.hardware import Hardware
from cost_model.planner.constraints import Fixed
from cost_model.planner.objective import Objective
from cost_model.timing.problem import Problem
from policies.common.errors import InfeasibleError
from policies.common.memory_units import GIB
from policies.common.option_names import option
from policies.policy import Policy

_MEMORY = {"gpu": "GPU memory", "cpu": "host memory", "gpu+cpu": "host memory", "disk": "disk"}
#: The options that are budgets.
_OPTIONS = {"gpu": "gpu_mem", "cpu": "cpu_mem", "gpu+cpu": "memory_limit", "disk": "nvme_mem"}
#: What a capacity is known to, as a part of it.
_RESOLUTION = 1e-3
_NO_LIMIT_BYTES = 1 << 60
_FINEST_BYTES = 1 << 16


def smallest_policies(problem: Problem, fixed: Fixed) -> list[Policy]:
    """Policies of one row that fit, wherever its KV and hidden states live; none where nothing fits."""
    objective = Objective(problem, fixed)
    found = []
    for policy in _one_row(fixed):
        for tried in (policy, objective.fitted(policy)):
            if tried is not None and not any(size < 0 for size in objective.spare_bytes(tried)[1].values()):
                found.append(tried)
                break
    return list(dict.fromkeys(found))


def refusal(problem: Problem, fixed: Fixed) -> InfeasibleError:
    """The error for a problem without a policy: the limit that binds, and the least of each capacity that would do."""
    limited = [name for name in _MEMORY if problem.hardware.budgets().get(name) is not None]
    least = {name: least_capacity(problem, fixed, name) for name in limited}
    has = {name: _capacity(problem.hardware, name) for name in limited}
    model = problem.arch.name or "the model"
    given = f" with {fixed}" if str(fixed) else ""
    missing = {name: size - has[name] for name, size in least.items() if size is not None}
    if missing:
        name = min(missing, key=missing.__getitem__)
        binds = f"even with the fewest rows in flight, {model} needs {_gib(missing[name])} GiB more of {_MEMORY[name]}"
    else:
        objective = Objective(problem, fixed)
        lacks = min((_lacking(objective, policy) for policy in _one_row(fixed)), key=lambda lack: sum(lack.values()))
        sizes = " and ".join(f"{_gib(size)} GiB of {_MEMORY[name]}" for name, size in lacks.items())
        binds = f"even with the fewest rows in flight, {model} lacks {sizes}"
    remedies = "; ".join(_remedy(problem, fixed, name, least[name], has[name]) for name in limited)
    return InfeasibleError(f"no policy{given} fits this machine: {binds}. By itself, {remedies}.")


def least_capacity(problem: Problem, fixed: Fixed, name: str) -> int | None:
    """The least capacity behind a budget (key of `Hardware.budgets`) with which something fits, in bytes.

    None where no capacity is enough by itself. On device cuda that of the GPU has the context in it.
    """
    if not _fits(problem, fixed, name, _NO_LIMIT_BYTES):
        return None
    low, high = _capacity(problem.hardware, name), _NO_LIMIT_BYTES
    while high - low > max(1, _RESOLUTION * high):
        middle = (low + high) // 2 if high <= 4 * max(low, _FINEST_BYTES) else 2 * max(low, _FINEST_BYTES)
        low, high = (low, middle) if _fits(problem, fixed, name, middle) else (middle, high)
    return high


def _fits(problem: Problem, fixed: Fixed, name: str, nbytes: int) -> bool:
    return bool(smallest_policies(replace(problem, hardware=_with_capacity(problem.hardware, name, nbytes)), fixed))


def _with_capacity(hardware: Hardware, name: str, nbytes: int) -> Hardware:
    gpu = hardware.gpu
    if name == "gpu":
        return replace(hardware, gpus=(replace(gpu, memory_bytes=nbytes),))
    if name == "disk":
        return replace(hardware, disk_bytes=nbytes)
    if name == "cpu" and hardware.device == "cpu":
        return replace(hardware, cpu_budget_bytes=nbytes)
    if hardware.device == "cpu" and gpu.memory_bytes >= hardware.host_memory_bytes:  # no budget of its own
        hardware = replace(hardware, gpus=(replace(gpu, memory_bytes=nbytes),))
    return replace(hardware, host_memory_bytes=nbytes)


def _capacity(hardware: Hardware, name: str) -> int:
    """The capacity behind a budget that limits: of a GPU the context is a part of it, and of the cpu tier on device cpu the
    process is not."""
    if name == "cpu" and hardware.device == "cpu":
        return hardware.cpu_budget_bytes or 0
    return hardware.gpu.memory_bytes if name == "gpu" else hardware.budgets()[name] or 0


def _remedy(problem: Problem, fixed: Fixed, name: str, least: int | None, has: int) -> str:
    """What to ask for, in the words and the GiB that the user asks with."""
    what = _MEMORY[name]
    asked = option(_OPTIONS[name])
    if least is None:
        return f"more {what} ({asked}) would not be enough"
    enough = least
    while not _fits(problem, fixed, name, _bytes(_gib(enough))):  # rounding to whole units can spoil a little more room
        enough += max(1, int(_RESOLUTION * enough))
    return f"{asked} of {_gib(enough)} GiB instead of {_gib(has)} would do"


def _one_row(fixed: Fixed) -> Iterator[Policy]:
    """One row at a time, in pieces of one token, in every home."""
    homes = ((0.0, 100.0), (100.0, 0.0), (0.0, 0.0))
    for cache, act, weights, attended in product(homes, (homes[1], homes[0], homes[2]), homes, (100.0, 0.0)):
        if attended and not cache[1]:
            continue
        policy = Policy(
            gpu_batch_size=1,
            num_gpu_batches=1,
            w_gpu_percent=weights[0],
            w_cpu_percent=weights[1],
            cache_gpu_percent=cache[0],
            cache_cpu_percent=cache[1],
            act_gpu_percent=act[0],
            act_cpu_percent=act[1],
            prefill_tokens=1,
            cpu_attention_percent=attended,
            weight_slots=2,
        )
        yield fixed.applied(policy)


def _lacking(objective: Objective, policy: Policy) -> dict[str, int]:
    """Missing bytes by budget."""
    return {name: -size for name, size in objective.spare_bytes(policy)[1].items() if size < 0}


def _bytes(gib: str) -> int:
    """What a flag makes of it."""
    return int(Fraction(float(gib)) * GIB)


def _gib(nbytes: int) -> str:
    """GiB with four significant digits, rounded up, so that the number is enough."""
    gib = nbytes / GIB
    if gib <= 0:
        return "0"
    unit = 10.0 ** (floor(log10(gib)) - 3)
    return f"{ceil(gib / unit - 1e-9) * unit:.12g}"
