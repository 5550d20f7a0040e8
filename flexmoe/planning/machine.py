"""What a run on this machine may plan with: measured rates, and what is free of its memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cost_model.hardware.hardware import Hardware

#: Of the host memory and disk space that are free now; the rest is for the process itself and for others.
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
        rates: ``"auto"``: measured now (one to four minutes) or before; else a file of `python -m flexmoe.probe`, or its content.
        device: ``auto``, ``cuda`` or ``cpu``.
        directory: on the disk that the disk tier lives on.
        budgets: GiB of ``gpu_mem``, ``cpu_mem`` and ``nvme_mem``; None is what the machine has, less a tenth.
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
    machine = replace(
        machine,
        host_memory_bytes=int(_SHARE_TO_TAKE * machine.host_memory_bytes),
        disk_bytes=int(_SHARE_TO_TAKE * machine.disk_bytes),
    ).with_budgets(**dict(budgets or {}))
    if held_bytes:
        gpu = replace(machine.gpu, memory_bytes=max(0, machine.gpu.memory_bytes - held_bytes))
        machine = replace(machine, gpus=(gpu,))
    return machine
