"""FlexMoE: offline batch inference of Mixture-of-Experts models that do not fit on the GPU."""

from flexmoe.llm import LLM
from flexmoe.params import RequestOutput, SamplingParams

__all__ = ["LLM", "RequestOutput", "SamplingParams"]
