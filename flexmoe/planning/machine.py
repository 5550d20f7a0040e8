"""What a run on this machine may plan with: measured rates, and what is free of its memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cost_model.hardware.hardware import Hardware
from flexmoe.system.memory import process_bytes
from policies.common.memory_units import GIB

#: Of the host memory and disk space that are free now; the rest is for others.
_SHARE_TO_TAKE = 0.9


def this_machine(
    rates: Hardware | str | Path = "auto",
    *,
    device: str = "auto",
    directory: Path,
    budgets: Mapping[str, float | None] | None = None,
    held_bytes: int = 0,
) -> Hardware:
    """This machine as the planner takes it.

    Args:
        rates: ``"auto"``: measured now (one to seven minutes) or before; else a file of `python -m flexmoe.probe`, or its content.
        device: ``auto``, ``cuda`` or ``cpu``.
        directory: on the disk that the disk tier lives on.
        budgets: GiB of ``gpu_mem``, ``cpu_mem``, ``nvme_mem`` and ``memory_limit``; None is what the machine has, less a tenth.
        held_bytes: of the compute device's memory, not for what the planner places.

    Raises:
        FlexMoEError: it cannot be measured, or the file cannot be used.
    """
    if isinstance(rates, Hardware):
        machine = rates
    elif str(rates) == "auto":
        from flexmoe.probing.cache import cached_probe  # with torch, which a given machine does not need

        machine = cached_probe(device, directory)
    else:
        machine = Hardware.load(rates)
    asked, has = dict(budgets or {}), machine.host_memory_bytes / GIB
    if asked.get("memory_limit") is not None:
        asked["memory_limit"] = min(asked["memory_limit"] or 0.0, has)
    machine = replace(
        machine,
        host_memory_bytes=int(_SHARE_TO_TAKE * machine.host_memory_bytes),
        disk_bytes=int(_SHARE_TO_TAKE * machine.disk_bytes),
        process_bytes=max(machine.process_bytes, process_bytes()),
    ).with_budgets(**asked)
    if held_bytes:
        gpu = replace(machine.gpu, memory_bytes=max(0, machine.gpu.memory_bytes - held_bytes))
        machine = replace(machine, gpus=(gpu,))
    return machine
