"""How long it takes, and which policy is best: numpy and pulp, never torch."""

from cost_model.arch import ModelArch
from cost_model.evaluate import Prediction, evaluate
from cost_model.hardware import Hardware
from policies.workload import Workload

__all__ = ["Hardware", "ModelArch", "Prediction", "Workload", "evaluate"]
