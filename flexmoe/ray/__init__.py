"""Completes the rows of a Ray Data set: `generate`, or the class `Generate` for ``Dataset.map_batches``."""

from flexmoe.ray.actor import Generate
from flexmoe.ray.dataset import generate

__all__ = ["Generate", "generate"]
