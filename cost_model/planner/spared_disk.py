"""KV on disk only where it pays: of two policies that are as fast, the one that does not wear the drive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cost_model.planner.constraints import Fixed
from cost_model.timing.evaluate import predict
from cost_model.timing.problem import Problem
from policies.common.errors import InfeasibleError
from policies.policy import Policy

#: What may be lost of the tokens per second: less than any prediction is worth.
_AS_FAST = 0.997
_KEPT = (0.0, 0.25, 0.5, 0.75)


def spare_the_disk(problem: Problem, fixed: Fixed, policy: Policy) -> Policy:
    """The policy with as much of its disk KV in host memory as fits there and costs no speed.

    What the user has fixed of the cache stays.
    """
    on_disk = 100.0 - policy.cache_gpu_percent - policy.cache_cpu_percent
    if on_disk <= 0 or fixed.cache_cpu_percent is not None or fixed.cache_gpu_percent is not None:
        return policy
    wanted = _AS_FAST * _tokens_per_s(problem, policy)
    return next((moved for moved in _moved(policy, fixed, on_disk) if _tokens_per_s(problem, moved) >= wanted), policy)


def _moved(policy: Policy, fixed: Fixed, on_disk: float) -> Iterator[Policy]:
    """Less and less of the disk's KV in host memory; as many rows as before attended on the CPU, or as large a share."""
    for kept in _KEPT:
        on_host = min(100.0 - policy.cache_gpu_percent, policy.cache_cpu_percent + (1 - kept) * on_disk)
        same_rows = policy.cpu_attention_percent * policy.cache_cpu_percent / on_host
        shares = dict.fromkeys((policy.cpu_attention_percent, round(same_rows, 1)))
        for attended in shares if fixed.cpu_attention_percent is None else (policy.cpu_attention_percent,):
            yield replace(policy, cache_cpu_percent=on_host, cpu_attention_percent=attended)


def _tokens_per_s(problem: Problem, policy: Policy) -> float:
    """0 where it does not fit."""
    try:
        return predict(problem, policy).tokens_per_s
    except InfeasibleError:
        return 0.0
