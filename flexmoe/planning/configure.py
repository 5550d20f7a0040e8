"""From what a caller says of a model, a policy and a machine to an engine's configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cost_model.hardware.hardware import Hardware
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.router_counter import coactivation_bytes
from flexmoe.errors import UsageError
from flexmoe.models.loader import Model, compute_dtype
from flexmoe.planning.forecast import Forecaster
from flexmoe.system.device import Device
from policies.policy import Policy, PolicyFile
from policies.workload import Workload

#: Has the planner choose the policy, or this machine be measured.
AUTO = "auto"
#: Everything in (CPU or GPU) compute memory: what a model that fits wants.
RESIDENT = (100, 0, 100, 0, 100, 0)
_RESIDENT_ROWS = 32
#: Mean prompt and completion of a job about which nothing is known, and its longest row.
_USUAL_PROMPT, _USUAL_COMPLETION, _USUAL_LONGEST = 512, 128, 4096


def configure(
    model: Model,
    policy: Policy | str | Path | None,
    workload: Workload | None,
    hardware: Hardware | str | Path | None,
    **options: Any,
) -> EngineConfig:
    """The configuration of an engine for a model.

    Args:
        policy: ``"auto"`` plans for the machine and the workload; a path is a policy file; None keeps everything on the compute
            device.
        workload: lengths of the rows; default: those of the policy file, else the usual ones within the model's context.
        hardware: what ``"auto"`` plans with; default: this machine, measured now or before.
        **options: the other fields of `EngineConfig`.

    Raises:
        UsageError: an option cannot be used or is unknown.
        FlexMoEError: no policy fits, the file is another model's, or the machine cannot be measured.
    """
    usual = workload or _usual_workload(model.arch.max_position)
    try:  # what can be known to be wrong is told before a machine is measured
        asked = EngineConfig(policy=_resident(usual), workload=usual, **options)
    except TypeError as error:
        raise UsageError(f"LLM: {error}") from error
    if policy is None or policy == AUTO:
        return replace(asked, policy=_planned(model, asked, hardware)) if policy == AUTO else _without(asked, hardware)
    if not isinstance(policy, (str, Path)):
        return replace(_without(asked, hardware), policy=policy)
    file = PolicyFile.load(policy)
    file.check_model(model.arch.fingerprint())
    return replace(_without(asked, hardware), policy=file.policy, workload=workload or file.planned_workload() or usual)


def _planned(model: Model, asked: EngineConfig, hardware: Hardware | str | Path | None) -> Policy:
    """The planner's policy."""
    forecaster = Forecaster.of_machine(
        model.arch,
        asked.workload,
        compute_dtype(asked.dtype, model, Device(asked.device).torch),
        hardware=hardware or AUTO,
        device=asked.device,
        directory=asked.offload_dir,
        budgets={"gpu_mem": asked.gpu_mem, "cpu_mem": asked.cpu_mem, "nvme_mem": asked.nvme_mem},
        usage=asked.known_usage,
        on_demand=asked.expert_cache != "off",
        held_bytes=coactivation_bytes(model.arch) if asked.router_stats else 0,
    )
    return forecaster.plan(asked.kv_tokens)


def _without(asked: EngineConfig, hardware: Hardware | str | Path | None) -> EngineConfig:
    """The configuration where nothing is planned.

    Raises:
        UsageError: a machine is given to plan with.
    """
    if hardware is not None:
        raise UsageError('hardware is what policy="auto" plans with; leave it out, or the policy')
    return asked


def _usual_workload(context: int) -> Workload:
    prompt, completion = min(_USUAL_PROMPT, context // 2), min(_USUAL_COMPLETION, context // 4)
    return Workload(prompt_len=max(1, prompt), gen_len=max(1, completion), longest_row=min(_USUAL_LONGEST, context))


def _resident(workload: Workload) -> Policy:
    return Policy.from_percent(
        RESIDENT,
        gpu_batch_size=_RESIDENT_ROWS,
        num_gpu_batches=1,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
    )
