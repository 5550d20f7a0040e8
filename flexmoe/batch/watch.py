"""Watches a run for drift: what is predicted again, and what is measured again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cost_model.simulation.simulate import Simulation
from flexmoe.batch.options import AUTO, RunOptions
from flexmoe.batch.plan import RunPlan
from flexmoe.planning.drift import Drift, DriftWatch
from flexmoe.probing.cache import mark_stale


def drift_watch(options: RunOptions, plan: RunPlan) -> DriftWatch | None:
    """Watches whether the machine is as it was measured; None where nothing is predicted. Rates that a run has kept are
    measured again after drift."""
    predicted, forecaster = plan.predicted, plan.forecaster
    if predicted is None or forecaster is None:
        return None
    is_kept = str(options.hardware or AUTO) == AUTO

    def again(speeds: Mapping[str, float]) -> Simulation:
        cache_experts = plan.engine.allocation.cache_experts
        return forecaster.at_speeds(speeds).predict(plan.policy, plan.options["kv_tokens"], cache_experts)

    def found(drifts: Sequence[Drift]) -> None:
        if is_kept:
            mark_stale(options.device, options.offload_dir, {drift.lane for drift in drifts})

    return DriftWatch(predicted, again, found)
