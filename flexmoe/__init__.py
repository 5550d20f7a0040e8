"""FlexMoE: offline batch inference of Mixture-of-Experts models that do not fit on the GPU."""

import os
from typing import TYPE_CHECKING, Any

# OpenMP's idle threads otherwise spin, and on a machine with few cores that starves the threads that read weights: with
# one busy neighbour the same GEMMs ran 10x slower. It takes effect where torch is not loaded yet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from flexmoe.llm import LLM
    from flexmoe.params import EngineRequest, RequestOutput, SamplingParams

__all__ = ["LLM", "EngineRequest", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: processes that only parse and tokenize need no torch, and start in half the time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("flexmoe.llm" if name == "LLM" else "flexmoe.params"), name)
