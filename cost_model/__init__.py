"""How long it takes, and which policy is best. Never imports torch."""

from cost_model.arch import ModelArch

__all__ = ["ModelArch"]
