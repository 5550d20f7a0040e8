"""What the machine is and has, which limits bind, and whether other processes use it: nothing here is timed."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cost_model.memory.memory_plan import PROCESS
from flexmoe.errors import InfeasibleError
from flexmoe.kernels.native.build import sources_digest
from flexmoe.system.device import Device, process_gpu_bytes
from flexmoe.system.machine import (
    busy_core_s,
    cpu_name,
    filesystem,
    free_disk_bytes,
    nearest_existing,
    usable_cores,
)
from flexmoe.system.memory import process_limit_bytes
from policies.common.option_names import as_flags, option

log = logging.getLogger(__name__)
#: What the steps of the probe are steps of, for people.
MEASURING = "measuring this machine"
_TRIED_BYTES = 32 << 20
#: What the memory of a process is measured with: experts that get another number of tokens in every sweep.
_SMALL_MODEL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
#: As for the command line of a run.
_SMALL_RUN = {
    "load_format": ("dummy",),
    "percent": ("0", "100", "50", "50", "100", "0"),
    "gpu_batch_size": ("32",),
    "num_gpu_batches": ("4",),
    "prompt_len": ("48",),
    "gen_len": ("24",),
    "num_prompts": ("192",),
    "expert_cache": ("off",),
}
#: Other processes may use so much of the cores without a word.
_IDLE = 0.1


def compute_dtypes(device: Device) -> dict[int, torch.dtype]:
    """The dtypes that are measured, by their bytes: fp16 where a GPU has no bf16, as the runtime chooses."""
    no_bf16 = device.is_cuda and torch.cuda.get_device_capability(device.torch)[0] < 8
    return {2: torch.float16 if no_bf16 else torch.bfloat16, 4: torch.float32}


def device_name(device: Device) -> str:
    """Name of the compute device: the GPU's, or the processor's."""
    return torch.cuda.get_device_name(device.torch) if device.is_cuda else cpu_name()


def gpu_details(device: Device) -> dict[str, str | int]:
    """Memory, driver and link of the GPU; empty on cpu."""
    if not device.is_cuda:
        return {}
    found: dict[str, str | int] = {
        "cuda": str(torch.version.cuda),
        "gpu_bytes": torch.cuda.mem_get_info(device.torch)[1],
    }
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(device.torch.index)
        found["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        generation, width = nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle), nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
        found["pcie"] = f"gen {generation} x{width}"
    except Exception as error:  # noqa: BLE001 - no NVML, or a virtual machine that hides the link
        found["nvml"] = f"{type(error).__name__}: {error}"
    return found


def capacities(device: Device, directory: Path) -> dict[str, int]:
    """What a run may take now, by field of `Hardware` and `Gpu`."""
    limit, host = pinned_limit_bytes(device), process_limit_bytes()
    host = host if limit is None else min(host, limit)
    gpu, reserved = _gpu_bytes(device) if device.is_cuda else (host, 0)
    return {
        "cores": usable_cores(),
        "host_memory_bytes": host,
        "disk_bytes": free_disk_bytes(directory),
        "memory_bytes": gpu,
        "reserved_bytes": reserved,
    }


def circumstances(device: Device, directory: Path) -> tuple[str, ...]:
    """What measured rates depend on: another value of one of them means another machine."""
    return (
        device.torch.type,
        device_name(device),
        str(gpu_details(device).get("driver", "")),
        cpu_name(),
        str(usable_cores()),
        str(torch.get_num_threads()),
        torch.__version__,
        os.environ.get("FLEXMOE_NATIVE", ""),
        sources_digest(),
        filesystem(directory),
        str(os.stat(nearest_existing(directory)).st_dev),
    )


def child_environment() -> dict[str, str]:
    """For a Python process of these sources."""
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def process_bytes(device: Device, dtype: torch.dtype) -> int:
    """Host memory that the process of a run takes beside what is planned: the peak of one that runs a small model, less
    its plan.

    Raises:
        InfeasibleError: the small model could not be run.
    """
    with tempfile.TemporaryDirectory(prefix="flexmoe-process-") as scratch:
        metrics = Path(scratch) / "metrics.json"
        (Path(scratch) / "config.json").write_text(json.dumps(_SMALL_MODEL), encoding="utf-8")
        asked = _SMALL_RUN | {
            "model": (scratch,),
            "device": (str(device.torch),),
            "dtype": (str(dtype).removeprefix("torch."),),
            "metrics_json": (str(metrics),),
        }
        with as_flags():
            flags = [part for name, values in asked.items() for part in (option(name), *values)]
        child = subprocess.run(
            [sys.executable, "-m", "flexmoe.run", *flags],
            env=child_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if child.returncode != 0:
            said = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            raise InfeasibleError(f"the memory of a process could not be measured: {said[0]}")
        measured = json.loads(metrics.read_text(encoding="utf-8"))
    tiers = ("cpu",) if device.is_cuda else ("gpu", "cpu")
    planned: int = sum(measured["memory"][tier]["planned_bytes"] for tier in tiers) - measured["memory"]["cpu"][PROCESS]
    return max(0, int(measured["peak_process_bytes"]) - planned)


def pinned_limit_bytes(device: Device) -> int | None:
    """What RLIMIT_MEMLOCK leaves for pinned memory; None where nothing is pinned, no limit is set or it does not bind.

    Most drivers lock pages without counting them, so it is tried: a little is pinned under a limit that is still lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not device.is_cuda or soft == resource.RLIM_INFINITY:
        return None
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (min(soft, _TRIED_BYTES // 2), hard))
    try:
        device.host_buffer(_TRIED_BYTES)
        return None
    except InfeasibleError:
        return soft
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def _gpu_bytes(device: Device) -> tuple[int, int]:
    """What is free on the GPU or held by this process, and what of it no planned tensor can have."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device.torch)
    usable = free + (process_gpu_bytes(device.torch) or total - free)
    return usable, usable - device.room(usable)


class Others:
    """How busy other processes keep the cores from now on: rates that were measured beside them are too low."""

    def __init__(self) -> None:
        self._before = self._now()

    def sentence(self) -> str:
        """A sentence about it, also logged as a warning; empty when the machine was idle or that cannot be known."""
        before, now = self._before, self._now()
        if before is None or now is None:
            return ""
        used = (now[0] - before[0]) / max(1e-3, now[1] - before[1])
        if used < _IDLE * usable_cores():
            return ""
        sentence = f"other processes kept {used:.1f} of {usable_cores()} cores busy meanwhile"
        log.warning("%s: measure again on an idle machine for better numbers", sentence)
        return f"; {sentence}"

    def _now(self) -> tuple[float, float] | None:
        busy_s = busy_core_s()
        return None if busy_s is None else (busy_s - time.process_time(), time.perf_counter())
