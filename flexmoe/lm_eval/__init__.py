"""The model ``flexmoe`` of EleutherAI's lm-evaluation-harness; importing this registers it.

The harness's own command finds only models of its own, so that ``python -m flexmoe.lm_eval`` takes its place: it registers
the model and runs the harness's command line.
"""

from flexmoe.lm_eval.model import FlexMoELM

__all__ = ["FlexMoELM"]
