"""`plan`: the best policy for a model, a machine and a job, from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.model.config_fields import DTYPE_BYTES
from cost_model.model.families import dtype_name
from cost_model.model.packing import check_unpacked
from cost_model.planner.constraints import Fixed
from cost_model.planner.solve import Plan, solve
from flexmoe.planning.machine import this_machine
from policies.common.directories import OFFLOAD_DIR
from policies.workload import Workload

_USUAL = Workload(prompt_len=512, gen_len=128)


def plan(
    model: str | Path | ModelArch,
    hardware: Hardware | str | Path | None = None,
    workload: Workload | None = None,
    *,
    gpu_mem: float | None = None,
    cpu_mem: float | None = None,
    nvme_mem: float | None = None,
    memory_limit: float | None = None,
    dtype: Any = "auto",
    device: str = "auto",
    offload_dir: str | Path = OFFLOAD_DIR,
    fixed: Fixed | None = None,
    kv_tokens: int | None = None,
    advice: bool = True,
    compress_weight: str | None = None,
    allow_compression: bool = False,
) -> Plan:
    """The policy with the most tokens per second, what it will do, and why it is that one; nothing is loaded or run.

    Args:
        model: a directory with a `config.json`, the name of a known shape, its hub id, or a `ModelArch`.
        hardware: a `Hardware`, the name of a preset (``"rtx4090"``), or a file of `python -m flexmoe.probe`. None: this machine,
            measured now (one to seven minutes) or before, with nine tenths of what is free of its memory.
        workload: prompt and completion lengths, and the rows of the job; default: 512 and 128 tokens, without end.
        gpu_mem, cpu_mem, nvme_mem: most GiB of each tier; None: what the machine has.
        memory_limit: most GiB of host memory of the whole process; None: what the machine has.
        dtype: compute dtype, a name or a `torch.dtype`; ``auto`` is as stored.
        device: of this machine: ``auto``, ``cuda`` or ``cpu``.
        offload_dir: on the disk that this machine's disk tier lives on.
        fixed: fields of the policy that are decided already.
        kv_tokens: KV capacity over all tiers; default: what keeps the block in flight.
        advice: find out what would help most, too, which takes about as long again.
        compress_weight: plan for 16-bit weights packed in ``int4``, ``int8``, ``fp8`` or ``mxfp4``, as a run packs them.
        allow_compression: compress where that gains.

    Returns:
        Plan: ``policy``, ``prediction`` and ``explanation``.

    Raises:
        UsageError: an argument cannot be used, or the rows are longer than the model's context.
        InfeasibleError: nothing fits; the sentence names what binds and the cheapest way out.
        FlexMoEError: the model or the machine is not known or cannot be measured.

    Example:
        >>> found = plan("mixtral-8x7b", "rtx4090", Workload(prompt_len=512, gen_len=256), cpu_mem=120)
        >>> found.policy.block_size, found.prediction.tokens_per_s, found.prediction.bottleneck
    """
    arch = model if isinstance(model, ModelArch) else _shape(model)
    check_unpacked(arch, compress_weight)
    if compress_weight is not None:
        fixed = replace(fixed or Fixed(), compress_weight=compress_weight)
    workload = workload or _USUAL
    arch.check_rows(workload.longest_row)
    budgets = {"gpu_mem": gpu_mem, "cpu_mem": cpu_mem, "nvme_mem": nvme_mem, "memory_limit": memory_limit}
    if hardware is None:
        machine = this_machine(device=device, directory=Path(offload_dir), budgets=budgets)
    else:
        machine = _machine(hardware).with_budgets(**budgets)
    return solve(
        arch,
        machine,
        workload,
        fixed=fixed,
        dtype_bytes=DTYPE_BYTES.get(dtype_name(dtype)),
        kv_tokens=kv_tokens,
        advice=advice,
        allow_compression=allow_compression,
    )


def _shape(model: str | Path) -> ModelArch:
    return ModelArch.from_dir(model) if Path(model).is_dir() else ModelArch.from_name(str(model))


def _machine(hardware: Hardware | str | Path) -> Hardware:
    if isinstance(hardware, Hardware):
        return hardware
    is_file = Path(hardware).suffix == ".json" or Path(hardware).is_file()
    return Hardware.load(hardware) if is_file else Hardware.preset(str(hardware))
