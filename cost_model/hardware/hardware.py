"""A machine: how much its tiers hold and how fast its lanes are. Presets, and the JSON file that carries a measured one."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from cost_model.hardware.gemm_rates import AllRates, SomeRates
from cost_model.hardware.link_curves import LinkCurve
from policies.common.checks import check_number
from policies.common.errors import DataError, FlexMoEError, UsageError
from policies.common.fields import (
    Cost,
    Count,
    Json,
    Rate,
    Rule,
    Size,
    Text,
    check_fields,
    one_of,
    optional,
    whole,
)
from policies.common.json_files import build, check_header, listed, read_json, write_json
from policies.common.memory_units import GIB
from policies.common.option_names import option

KIND = "flexmoe.hardware"
SCHEMA_VERSION = 1
DEVICES = ("cuda", "cpu")
MACHINES = Path(__file__).parent / "machines"


def _check_seconds(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{name} is {value!r}; it must map names to seconds.")
    return {key: check_number(f"{name} of {key}", seconds, zero=True) for key, seconds in value.items()}


_SECONDS_BY_NAME = Rule(
    check=_check_seconds,
    schema={"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The compute device; on device cpu, the cores in that role.

    Args:
        name: for people.
        memory_bytes: what it has; on device cpu, what the gpu tier may take of host memory (all of it without a budget).
        reserved_bytes: CUDA context and kernels, and what is kept for the allocator, not for tensors; 0 on device cpu.
        experts: by bytes of one number (2 and 4), an expert as the runtime computes it: gather, three GEMMs, activation,
            scatter.
        dense: by bytes of one number, the linear part of the attention module (projections, norms, rope, router), and the head.
        memory_bytes_per_s: reads of its own memory; on device cpu, of host memory.
        h2d_bytes_per_s, d2h_bytes_per_s: pinned copies up and down, each alone.
        h2d_duplex_bytes_per_s, d2h_duplex_bytes_per_s: pinned copies up and down while both run.
        kv_load_bytes_per_s: scattered KV pages of host memory, packed, copied up and placed in the staging buffer.
        kv_store_bytes_per_s: new KV, copied down and scattered into pages of host memory.
        attention_bytes_per_s: decode attention over KV on the device.
        attention_flops_per_s: prefill attention.
        op_s: dispatch of one operation of the schedule.
        h2d_curve: pinned copies up by the bytes of a unit; empty where not measured.
        score_s: per vocabulary entry of a position whose log-probability is asked, beside the product that makes it; 0 where it
            was not measured.
        h2d_busy_latency_s: what a small copy up takes beyond its bytes while weights are copied; 0 where it was not measured, and
            on device cpu.
        unpack_s: by format of packed weights (`PackedFormat.name`), unpacking a weight beside the product that takes it; of a
            format that was not measured, what reading and writing it takes.
        grouped_experts: like ``experts``, one of a unit of several whose weights lie stacked, by grouped products; without
            the sizes of numbers that were not measured, or for which the runtime has none.
        int8_attention: what decode attention takes over a token of compressed KV, as a part of what it takes over one of 16
            bits; 1 where it was not measured.

    Raises:
        UsageError: a value is of the wrong type or out of range; the sentence names it.
    """

    name: Text
    memory_bytes: Size
    reserved_bytes: Size
    experts: AllRates
    dense: AllRates
    memory_bytes_per_s: Rate
    h2d_bytes_per_s: Rate
    d2h_bytes_per_s: Rate
    h2d_duplex_bytes_per_s: Rate
    d2h_duplex_bytes_per_s: Rate
    kv_load_bytes_per_s: Rate
    kv_store_bytes_per_s: Rate
    attention_bytes_per_s: Rate
    attention_flops_per_s: Rate
    op_s: Cost
    h2d_curve: LinkCurve = ()
    score_s: Cost = 0.0
    h2d_busy_latency_s: Cost = 0.0
    grouped_experts: SomeRates = field(default_factory=dict)
    unpack_s: Annotated[Mapping[str, float], _SECONDS_BY_NAME] = field(default_factory=dict)
    int8_attention: Rate = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "of the GPU")


def _check_gpus(name: str, value: Any) -> tuple[Gpu, ...]:
    if not isinstance(value, (tuple, list)) or len(value) != 1 or not isinstance(value[0], Gpu):
        raise UsageError(f"{name} is {value!r}; it must be a list of exactly one GPU.")
    return tuple(value)


def _read_gpus(where: str, values: Json) -> tuple[Gpu, ...]:
    if not isinstance(values, list):
        raise DataError('"gpus" must be a list.')
    return tuple(build(Gpu, f"gpus[{index}]", each) for index, each in enumerate(values))


def _check_sources(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} is {value!r}; it must map field names to sentences.")
    for field_name, source in value.items():
        if not isinstance(field_name, str) or not isinstance(source, str):
            raise UsageError(f"the source of {field_name!r} is {source!r}; it must be a sentence.")
    return dict(value)


_GPUS = Rule(
    check=_check_gpus,
    read=_read_gpus,
    schema={"type": "array", "minItems": 1, "maxItems": 1, "items": {"$ref": "#/$defs/gpu"}},
)
_SOURCES = Rule(check=_check_sources, schema={"type": "object", "additionalProperties": {"type": "string"}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the planner knows of a machine.

    Args:
        name: for people, and for `preset`.
        device: "cuda" or "cpu", the type of the compute device.
        gpus: the compute devices; exactly one today.
        cores: CPU cores that a run may use.
        host_memory_bytes: host memory that the process of a run may take, all of it.
        host_bytes_per_s: DRAM, all readers together.
        disk_bytes: disk space that a run may take.
        disk_read_bytes_per_s, disk_write_bytes_per_s: reads and writes of the disk, at the runtime's depth.
        h2d_core_s_per_byte: core-seconds that copying a weight byte takes from computing beside it, on device cpu; 0 is
            allowed, and what a device with copy engines has.
        disk_read_core_s_per_byte: core-seconds that reading a byte takes from computing beside it; 0 is allowed.
        disk_write_core_s_per_byte: core-seconds that writing a byte takes from computing beside it; 0 is allowed.
        kv_block_read_s: the disk's seconds per read of KV, of one page or neighbours, beyond its bytes at
            disk_read_bytes_per_s, at the depth of the KV lanes; 0 is allowed, here and below.
        kv_block_core_s: core-seconds per such read beyond those of its bytes.
        kv_block_write_s: the disk's seconds per KV page written, beyond its bytes at disk_write_bytes_per_s.
        disk_latency_s: what a transfer to or from disk takes that somebody waits for, beyond its bytes.
        disk_busy_latency_s: what such a transfer takes while weights are read at the full rate.
        handoff_s: what an operation beside the compute lane takes at least: calls, and on device cuda from thread to thread.
        cpu_attention_bytes_per_s: decode attention over KV in host memory, all cores.
        cpu_attention_flops_per_s: prefill attention on the cores.
        row_s: host work per row and sweep.
        sweep_s: host work per sweep.
        sources: field name of this class or of `Gpu` to where the value comes from.
        cpu_budget_bytes: on device cpu, what the cpu tier may take of host memory; None is all of it.
        disk_read_curve: reads by the bytes of a unit, a few units under way; empty where not measured.
        process_bytes: host memory that the process takes beside what the plan places: Python, libraries with what they keep,
            threads; 0 where not measured.
        cpu_int8_attention: as `Gpu.int8_attention`, of attention in host memory.
        disk_read_beside_compute: the part of its rate that reading from disk keeps while all cores compute; 1 where it was not
            measured. A virtual machine's disk is served by its host, on cores that its own work wants too.

    Raises:
        UsageError: a value is of the wrong type or out of range; the sentence names it.
    """

    name: Text
    device: Annotated[str, one_of(*DEVICES)]
    gpus: Annotated[tuple[Gpu, ...], _GPUS]
    cores: Count
    host_memory_bytes: Size
    host_bytes_per_s: Rate
    disk_bytes: Size
    disk_read_bytes_per_s: Rate
    disk_write_bytes_per_s: Rate
    h2d_core_s_per_byte: Cost
    disk_read_core_s_per_byte: Cost
    disk_write_core_s_per_byte: Cost
    kv_block_read_s: Cost
    kv_block_core_s: Cost
    kv_block_write_s: Cost
    disk_latency_s: Cost
    disk_busy_latency_s: Cost
    handoff_s: Cost
    cpu_attention_bytes_per_s: Rate
    cpu_attention_flops_per_s: Rate
    row_s: Cost
    sweep_s: Cost
    sources: Annotated[Mapping[str, str], _SOURCES] = field(default_factory=dict)
    cpu_budget_bytes: Annotated[int | None, optional(whole(0))] = None
    disk_read_curve: LinkCurve = ()
    process_bytes: Annotated[int, whole(0)] = 0
    cpu_int8_attention: Rate = 1.0
    disk_read_beside_compute: Rate = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "of the machine")
        if self.cpu_budget_bytes is not None and self.device != "cpu":
            raise UsageError("cpu_budget_bytes is for device cpu; on device cuda lower host_memory_bytes instead.")
        if self.device == "cpu" and self.gpu.reserved_bytes:
            raise UsageError(
                f"reserved_bytes is {self.gpu.reserved_bytes} on device cpu, which has no context; give 0."
            )

    @property
    def gpu(self) -> Gpu:
        """The one compute device."""
        return self.gpus[0]

    def with_budgets(
        self,
        *,
        gpu_mem: float | None = None,
        cpu_mem: float | None = None,
        nvme_mem: float | None = None,
        memory_limit: float | None = None,
    ) -> "Hardware":
        """This machine with other capacities, in GiB; None keeps what it has, and 0 is a value.

        On device cuda they replace the sizes of GPU memory (the context included) and of host memory, be they smaller
        or larger; of host memory the smaller of ``cpu_mem`` and ``memory_limit``, in which the process itself is
        counted. On device cpu ``gpu_mem`` and ``cpu_mem`` limit what is placed in the gpu and the cpu tier; the two and
        the process share the machine's host memory, which ``memory_limit`` replaces.

        Raises:
            UsageError: a value is negative or no finite number; the sentence names it.
        """
        asked = {"gpu_mem": gpu_mem, "cpu_mem": cpu_mem, "nvme_mem": nvme_mem, "memory_limit": memory_limit}
        gpu_bytes, cpu_bytes, disk_bytes, limit_bytes = (
            None if gib is None else int(Fraction(check_number(option(name), gib, zero=True)) * GIB)
            for name, gib in asked.items()
        )
        changes: dict[str, Any] = {}
        if limit_bytes is not None:
            changes["host_memory_bytes"] = limit_bytes
            if self.device == "cuda" and cpu_bytes is not None:
                cpu_bytes = min(cpu_bytes, limit_bytes)
        if gpu_bytes is not None:
            changes["gpus"] = (replace(self.gpu, memory_bytes=gpu_bytes),)
        if cpu_bytes is not None:
            changes["host_memory_bytes" if self.device == "cuda" else "cpu_budget_bytes"] = cpu_bytes
        if disk_bytes is not None:
            changes["disk_bytes"] = disk_bytes
        return replace(self, **changes)

    def budgets(self) -> dict[str, int | None]:
        """Bytes that each tier's tensors may take, by the keys of `MemoryPlan.check`; None is no limit of its own.

        The process itself is an item of the cpu tier. On device cpu both tiers are host memory, under the key
        ``gpu+cpu``; each has a limit of its own only where a budget below that was given, to which what the process
        takes is added.
        """
        host = self.host_memory_bytes
        if self.device == "cuda":
            return {
                "gpu": max(0, self.gpu.memory_bytes - self.gpu.reserved_bytes),
                "cpu": host,
                "disk": self.disk_bytes,
            }
        gpu = self.gpu.memory_bytes if self.gpu.memory_bytes < host else None
        cpu = None if self.cpu_budget_bytes is None else self.cpu_budget_bytes + self.process_bytes
        return {"gpu": gpu, "cpu": cpu, "gpu+cpu": host, "disk": self.disk_bytes}

    def fingerprint(self) -> dict[str, str | int]:
        """What a policy file says of the machine that it was planned for."""
        return {
            "name": self.name,
            "device": self.device,
            "gpu": self.gpu.name,
            "gpu_memory_bytes": self.gpu.memory_bytes,
            "host_memory_bytes": self.host_memory_bytes,
            "disk_bytes": self.disk_bytes,
        }

    def to_json(self) -> dict[str, Json]:
        """The content of the file as a dict of JSON values; `hardware.schema.json` describes it (`cost_model.hardware.hardware_schema`)."""
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **listed(asdict(self))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file under its final name in one step.

        Raises:
            StorageError: the directory is missing, read-only or full.
        """
        write_json(path, self.to_json(), "the machine")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Hardware":
        """Reads and checks a hardware file.

        Raises:
            InputMissingError: there is no such file, or it cannot be read.
            DataError: it is not strict JSON, not a hardware file, newer than this program, or a key or value is unknown,
                missing or out of range; the sentence names the file and the field.
        """
        document = read_json(path, "the hardware file")
        try:
            check_header(document, KIND, SCHEMA_VERSION, "a hardware file")
            values = {key: value for key, value in document.items() if key not in ("kind", "schema_version")}
            return build(cls, "the file", values)
        except FlexMoEError as error:
            raise DataError(f"the hardware file {path} cannot be used: {error}") from error

    @classmethod
    def preset(cls, name: str) -> "Hardware":
        """A machine that ships with the package, by name in any case.

        Raises:
            UsageError: there is no such preset; the known ones are listed.
        """
        if name.lower() not in cls.preset_names():
            raise UsageError(
                f"there is no machine {name!r}; give a hardware file, or one of {', '.join(cls.preset_names())}."
            )
        return cls.load(MACHINES / f"{name.lower()}.json")

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        """Names of the machines that ship with the package."""
        return tuple(sorted(path.stem for path in MACHINES.glob("*.json")))
