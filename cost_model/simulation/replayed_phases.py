"""Tokens per second of a policy with its phases in closed form and their sweeps replayed: nearly what `simulate` finds, sooner."""

from __future__ import annotations

import numpy as np

from cost_model.simulation.replay import STEADY_SWEEPS
from cost_model.simulation.sweep_times import FEWEST_KNOTS, KNOT_BATCHES, corrected_times, operations
from cost_model.timing.job_phases import job_phases
from cost_model.timing.problem import Problem
from policies.policy import Policy

#: Operations that are replayed for a policy, about: a few sweeps of a large model, all phases of a small one.
_REPLAYED_OPS = 5_000


def replayed_operations(problem: Problem, policy: Policy) -> float:
    """About as many operations are replayed to judge a policy."""
    costs = problem.costs(policy, problem.sized(policy)[0])
    return STEADY_SWEEPS[0] * max(
        _REPLAYED_OPS, FEWEST_KNOTS * operations(costs, min(KNOT_BATCHES, policy.num_gpu_batches))
    )


def replayed_tokens_per_s(problem: Problem, policy: Policy) -> float:
    """Generated tokens per second of the whole job; of the steady state where it is endless.

    Raises:
        InfeasibleError: a tier has too few bytes.
    """
    allocation, memory = problem.sized(policy)
    memory.check(problem.hardware.budgets())
    costs = problem.costs(policy, allocation)
    job = job_phases(policy, allocation, problem.workload, most_on_demand=costs.routing.most_on_demand)
    phases = [phase for phase in job.phases if phase.sweeps > 0]
    recurs = np.array([phase.sweeps for phase in phases])
    loads = [phase.load for phase in phases]
    times = corrected_times(costs, policy.gpu_batch_size, loads, recurs, _REPLAYED_OPS)
    return job.tokens / float(recurs @ times.seconds)
