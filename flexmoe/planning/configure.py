"""From what a caller says of a model, a policy and a machine to an engine's configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cost_model.hardware.hardware import Hardware
from cost_model.model.packing import check_unpacked, packed_as
from cost_model.planner.constraints import Fixed
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.router_counter import coactivation_bytes
from flexmoe.errors import UsageError
from flexmoe.models.loader import Model, compute_dtype
from flexmoe.planning.forecast import Forecaster
from flexmoe.system.device import Device
from policies.common.checks import check_count
from policies.common.memory_units import GIB
from policies.policy import Policy, PolicyFile
from policies.workload import Workload

log = logging.getLogger(__name__)
#: What `LLM` takes.
ARGUMENTS = (
    *("model", "tokenizer", "load_format", "hardware", "generation_config", "gpu_memory_utilization"),
    *("compress_weight", "compress_cache", "kv_cache_dtype", "enable_prefix_caching"),
    *(field.name for field in fields(EngineConfig)),
)
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
        **options: the other fields of `EngineConfig`, ``gpu_memory_utilization``, ``compress_weight``, and ``compress_cache`` or,
            in vLLM's words, ``kv_cache_dtype="int8"``.

    Raises:
        UsageError: an option cannot be used.
        FlexMoEError: no policy fits, the file is another model's, or the machine cannot be measured.
    """
    options = _in_our_words(model, options)
    given = {name: options.pop(name, None) for name in ("compress_weight", "compress_cache")}
    compression = {name: value for name, value in given.items() if value is not None}
    usual = workload or _usual_workload(options.get("max_model_len") or model.arch.max_position)
    # What can be known to be wrong is told before a machine is measured.
    check_unpacked(model.arch, compression.get("compress_weight"))
    asked = EngineConfig(policy=_resident(usual, compression), workload=usual, **options)
    if policy is None or policy == AUTO:
        return _planned(model, asked, hardware) if policy == AUTO else _without(asked, hardware)
    if compression:
        raise UsageError(f"the policy already says what {', '.join(compression)} would; give one or the other")
    if not isinstance(policy, (str, Path)):
        return replace(_without(asked, hardware), policy=policy)
    file = PolicyFile.load(policy)
    file.check_model(packed_as(model.arch, file.policy.compress_weight).fingerprint())
    return replace(_without(asked, hardware), policy=file.policy, workload=workload or file.planned_workload() or usual)


def _in_our_words(model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """Options with vLLM's ways to say how much memory there is, how long a row may be and what its KV is stored as in our terms."""
    share, most = options.pop("gpu_memory_utilization", None), options.get("max_model_len")
    if share is not None:
        options["gpu_mem"] = _gpu_gib(share, options.get("gpu_mem"), options.get("device", "auto"))
    if most is not None:
        if check_count("max_model_len", most) > model.arch.max_position:
            raise UsageError(f"max_model_len is {most}; the model's context is {model.arch.max_position}, give less")
        options["longest_row"] = options.get("longest_row") or most
    caching = options.pop("enable_prefix_caching", None)
    if caching is not None and options.setdefault("prefix_caching", caching) != caching:
        raise UsageError(f"enable_prefix_caching is {caching!r} and prefix_caching is not; give one of them")
    if "kv_cache_dtype" in options:
        options["compress_cache"] = _is_compressed(options.pop("kv_cache_dtype"), options.get("compress_cache"))
    return options


def _is_compressed(kv_cache_dtype: Any, compress_cache: bool | None) -> bool | None:
    """What vLLM's ``kv_cache_dtype`` asks for."""
    if kv_cache_dtype in (None, "auto"):
        return compress_cache
    if kv_cache_dtype != "int8" or compress_cache is False:
        raise UsageError(
            f'kv_cache_dtype is {kv_cache_dtype!r}; give "int8", which is compress_cache=True, or "auto", the dtype of the '
            "computation"
        )
    return True


def _gpu_gib(share: Any, gpu_mem: float | None, device: str) -> float | None:
    """GiB of a share of the GPU's memory; None on a CPU, where there is none."""
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise UsageError(f"gpu_memory_utilization is {share!r}; give a number above 0 and at most 1")
    if gpu_mem is not None:
        raise UsageError("gpu_mem and gpu_memory_utilization are both budgets of the GPU's memory; give one")
    total_bytes = Device(device).total_bytes
    if total_bytes is None:
        log.info("gpu_memory_utilization changes nothing on a CPU; gpu_mem and cpu_mem are budgets in GiB")
        return None
    return share * total_bytes / GIB


def _planned(model: Model, asked: EngineConfig, hardware: Hardware | str | Path | None) -> EngineConfig:
    """With the planner's policy, and the memory of the process that it was planned with."""
    format = asked.policy.compress_weight
    forecaster = Forecaster.of_machine(
        packed_as(model.arch, format),
        asked.workload,
        compute_dtype(asked.dtype, model, Device(asked.device).torch),
        hardware=hardware or AUTO,
        device=asked.device,
        directory=asked.offload_dir,
        budgets={
            "gpu_mem": asked.gpu_mem,
            "cpu_mem": asked.cpu_mem,
            "nvme_mem": asked.nvme_mem,
            "memory_limit": asked.memory_limit,
        },
        usage=asked.known_usage,
        on_demand=asked.expert_cache != "off",
        held_bytes=coactivation_bytes(model.arch) if asked.router_stats else 0,
    )
    policy = forecaster.plan(asked.kv_tokens, Fixed(compress_weight=format, compress_cache=asked.policy.compress_cache))
    return replace(asked, policy=policy, process_bytes=asked.process_bytes or forecaster.hardware.process_bytes)


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


def _resident(workload: Workload, compression: Mapping[str, Any]) -> Policy:
    return Policy.from_percent(
        RESIDENT,
        gpu_batch_size=_RESIDENT_ROWS,
        num_gpu_batches=1,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        **compression,
    )
