"""How long it takes, and which policy is best: numpy and pulp, never torch."""

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.planner.constraints import Fixed
from cost_model.planner.solve import Explanation, Plan, solve
from cost_model.timing.evaluate import Prediction, evaluate
from policies.workload import Workload

__all__ = [
    "Explanation",
    "Fixed",
    "Hardware",
    "ModelArch",
    "Plan",
    "Prediction",
    "Workload",
    "evaluate",
    "solve",
]
