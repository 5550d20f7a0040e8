"""How long it takes, and which policy is best: numpy and pulp, never torch."""

from cost_model.arch import ModelArch
from cost_model.evaluate import Prediction, evaluate
from cost_model.fixed import Fixed
from cost_model.hardware import Hardware
from cost_model.solver import Explanation, Plan, solve
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
