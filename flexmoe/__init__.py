"""FlexMoE: offline batch inference of Mixture-of-Experts models that do not fit on the GPU."""

import os

# OpenMP's idle threads otherwise spin, and on a machine with few cores that starves the threads that read weights: with
# one busy neighbour the same GEMMs ran 10x slower. It takes effect where torch is not loaded yet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from flexmoe.llm import LLM  # noqa: E402
from flexmoe.params import EngineRequest, RequestOutput, SamplingParams  # noqa: E402

__all__ = ["LLM", "EngineRequest", "RequestOutput", "SamplingParams"]
