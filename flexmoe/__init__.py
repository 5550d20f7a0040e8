"""FlexMoE: offline batch inference of Mixture-of-Experts models that do not fit on the GPU.

Everything below is imported when it is first asked for: `import flexmoe` loads no torch.
"""

import os
from typing import TYPE_CHECKING

# OpenMP's idle threads otherwise spin, and on a machine with few cores that starves the threads that read weights: with
# one busy neighbour the same GEMMs ran 10x slower. It takes effect where torch is not loaded yet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Shapes change in every sweep: segments that grow in place leave fewer holes. It takes effect where CUDA is not started yet;
# who has said how torch allocates is not overruled.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

if TYPE_CHECKING:
    from cost_model.hardware.hardware import Hardware
    from cost_model.planner.solve import Plan
    from flexmoe.batch.run_batch import run_batch
    from flexmoe.calls.prompts import TextPrompt, TokensPrompt
    from flexmoe.job.result import JobResult
    from flexmoe.llm import LLM
    from flexmoe.outputs import RequestOutput
    from flexmoe.params import EngineRequest, SamplingParams
    from flexmoe.planning.plan import plan
    from flexmoe.probing.measure import probe
    from flexmoe.structured.asked import StructuredOutputsParams
    from policies.common.errors import FlexMoEError
    from policies.policy import Policy
    from policies.workload import Workload

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "EngineRequest",
    "FlexMoEError",
    "Hardware",
    "JobResult",
    "Plan",
    "Policy",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "Workload",
    "plan",
    "probe",
    "run_batch",
]
_MODULES = {
    "LLM": "flexmoe.llm",
    "EngineRequest": "flexmoe.params",
    "FlexMoEError": "policies.common.errors",
    "Hardware": "cost_model.hardware.hardware",
    "JobResult": "flexmoe.job.result",
    "Plan": "cost_model.planner.solve",
    "Policy": "policies.policy",
    "RequestOutput": "flexmoe.outputs",
    "SamplingParams": "flexmoe.params",
    "StructuredOutputsParams": "flexmoe.structured.asked",
    "TextPrompt": "flexmoe.calls.prompts",
    "TokensPrompt": "flexmoe.calls.prompts",
    "Workload": "policies.workload",
    "plan": "flexmoe.planning.plan",
    "probe": "flexmoe.probing.measure",
    "run_batch": "flexmoe.batch.run_batch",
}


def __getattr__(name: str) -> object:
    """Imports what is asked for: processes that only parse and tokenize need no torch, and start in half the time."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
