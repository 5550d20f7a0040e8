"""The whole probe: every rate of `cost_model.hardware.hardware.Hardware`, by the runtime's own parts, in one to seven minutes."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import Gpu, Hardware
from cost_model.memory.allocation import PAGE_TOKENS
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import GROUPED_TOKENS
from flexmoe.errors import InfeasibleError
from flexmoe.kernels.native import library as native
from flexmoe.probing.attention import attention_rates
from flexmoe.probing.copies import copy_curve, copy_rates, memory_rate, small_copy_s
from flexmoe.probing.disk import DiskRates, disk_rates
from flexmoe.probing.effort import Effort
from flexmoe.probing.facts import (
    MEASURING,
    Others,
    capacities,
    compute_dtypes,
    device_name,
    gpu_details,
    pinned_limit_bytes,
    process_bytes,
)
from flexmoe.probing.gemms import UNIT_EXPERTS, dense_rates, expert_rates, grouped_expert_rates, unpacking_s
from flexmoe.probing.kv import SHAPES, kv_block_costs, kv_rates
from flexmoe.probing.latency import (
    disk_latency,
    handoff_s,
    kv_block_core_s,
    moved_archs,
    moved_rows,
    reading_beside_compute,
    streaming_arch,
    streaming_core_s_per_byte,
)
from flexmoe.probing.sweeps import overheads, score_s
from flexmoe.probing.timing import CURVE_ROUNDS, WeightArena, mean_of_passes
from flexmoe.progress import Steps
from flexmoe.system.device import Device, give_back_freed_memory, keep_freed_memory
from flexmoe.system.direct_io import PIECE_BYTES, READ_THREADS, SHARED_PIECE_BYTES
from flexmoe.system.machine import cpu_name, filesystem
from policies.common.directories import OFFLOAD_DIR, resolved
from policies.common.memory_units import MIB


@dataclass(slots=True)
class Found:
    """Values by field of `Hardware` or `Gpu`, and where each comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def put(self, source: str, **values: Any) -> None:
        """Values that were measured in one way."""
        self.values |= values
        self.sources |= dict.fromkeys(values, source)

    def of(self, kind: type[Gpu] | type[Hardware]) -> dict[str, Any]:
        """The values that are fields of ``kind``."""
        return {each.name: self.values[each.name] for each in fields(kind) if each.name in self.values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every step needs; ``dtypes`` by bytes of one number."""

    device: Device
    directory: Path
    effort: Effort
    dtypes: dict[int, torch.dtype]


def probe(device: str = "auto", directory: str | Path = OFFLOAD_DIR, effort: Effort | None = None) -> Hardware:
    """Measure this machine.

    Args:
        device: ``auto``, ``cuda`` or ``cpu``.
        directory: on the disk whose rate counts, default where the disk tier writes; a file is written there that has no
            name and is gone afterwards.
        effort: how much to measure.

    Raises:
        UsageError: no such device.
        StorageError: the directory cannot be written or has too little free space.
        InfeasibleError: too little memory, or the driver does not lock it.
    """
    dev, directory = Device(device), resolved(directory).absolute()
    keep_freed_memory()  # as the engine does: freed activations of up to 32 MiB cost no page faults
    limit, found = pinned_limit_bytes(dev), Found()
    setting = Setting(
        device=dev, directory=directory, effort=(effort or Effort()).bounded(limit), dtypes=compute_dtypes(dev)
    )
    found.put(_capacity_source(dev, limit), **capacities(dev, directory))
    others = Others()
    try:
        with Steps(MEASURING, bar=sys.stderr.isatty()) as steps, dev.computing():
            run_steps(setting, found, steps)
    except torch.OutOfMemoryError as error:
        raise InfeasibleError(
            f"the GPU has too little free memory to be measured ({str(error).splitlines()[0]}); end what else uses it"
        ) from error
    finally:
        _give_back(dev)
    return _hardware(dev, found, others.sentence())


def run_steps(setting: Setting, found: Found, steps: Steps) -> None:
    """All steps. On device cpu those that the cores' speed decides are made in passes, between the others; their means count."""
    count = 1 if setting.device.is_cuda else setting.effort.passes
    passes = [Found(dict(found.values)) for _ in range(count)]
    each = replace(setting, effort=replace(setting.effort, point_s=setting.effort.point_s / count))
    disk, *others = _ALONE
    order = [(disk, setting, found)]
    for at, own in enumerate(passes, 1):
        order += [(what, each, own) for what in _IN_PASSES]
        order += [(what, setting, found) for what in (others[at - 1 : at] if at < count else others[at - 1 :])]
    for number, (what, how, into) in enumerate(order, 1):
        steps.begin(number, len(order), what)
        STEPS[what](how, into)
    for name, source in passes[0].sources.items():
        source += f"; the mean of {count} passes" if count > 1 else ""
        found.put(source, **{name: mean_of_passes([own.values[name] for own in passes])})


def _give_back(device: Device) -> None:
    """Freed memory that torch and the C library keep for later: a run in this process counts what is left."""
    if device.is_cuda:
        torch.cuda.empty_cache()
    give_back_freed_memory()


def _hardware(device: Device, found: Found, meanwhile: str) -> Hardware:
    gpu_name, cpus = device_name(device), f"{found.values['cores']} cores of {cpu_name()}"
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    details = "".join(f", {name} {value}" for name, value in gpu_details(device).items())
    found.sources["name"] = (
        f"measured {now} by flexmoe.probe: torch {torch.__version__} with {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, {platform.system()} {platform.release()}{details}{meanwhile}"
    )
    return Hardware(
        name=f"{gpu_name}, {cpus}" if device.is_cuda else cpus,
        device=device.torch.type,
        gpus=(Gpu(name=gpu_name, **found.of(Gpu)),),
        sources=found.sources,
        **found.of(Hardware),
    )


def _capacity_source(device: Device, limit: int | None) -> str:
    source = "what was available to this process when it was measured, within its cgroup"
    if limit is not None:
        source += f"; pinned memory is limited to {limit / MIB:.0f} MiB by RLIMIT_MEMLOCK (raise it with ulimit -l)"
    return source


def _disk(s: Setting, found: Found) -> None:
    rates = disk_rates(s.device, s.directory, s.effort)
    way = "O_DIRECT" if rates.direct else "no O_DIRECT: through the page cache, so that reads may be memory's"
    source = (
        f"flexmoe.system.direct_io, {READ_THREADS} threads with {PIECE_BYTES / MIB:.0f} MiB each, "
        f"{rates.read.nbytes / MIB:.0f} MiB in {s.directory} ({filesystem(s.directory)}, {way})"
    )
    own = f"{source}; CPU time of this process"
    found.put(source, disk_read_bytes_per_s=rates.read.bytes_per_s)
    found.put(f"{source}, flushed", disk_write_bytes_per_s=rates.write.bytes_per_s)
    found.put(
        f"{source}, a unit at a time, 4 under way; the mean of {CURVE_ROUNDS} rounds", disk_read_curve=rates.curve
    )
    found.put(own, disk_read_core_s_per_byte=rates.read.core_s_per_byte)
    found.put(own, disk_write_core_s_per_byte=rates.write.core_s_per_byte)
    _kv_blocks(s, found, rates)


def _kv_blocks(s: Setting, found: Found, rates: DiskRates) -> None:
    costs = kv_block_costs(s.device, s.dtypes[2], s.directory, s.effort, rates)
    source = (
        f"flexmoe.kv.disk, up to {s.effort.kv_blocks} blocks that are no neighbours in {s.directory}, of {PAGE_TOKENS} tokens "
        f"with (KV heads, head size) in {SHAPES}, {_dtype(s, 2)}: the mean, less what the bytes take"
    )
    found.put(source, kv_block_read_s=costs.read_s, kv_block_write_s=costs.write_s)
    found.put(f"{source}; CPU time of this process", kv_block_core_s=costs.read_core_s)


def _memory(s: Setting, found: Found) -> None:
    host = s.device.host_buffer(s.effort.buffer_bytes // 2, pinned=False)
    host_rate = memory_rate(Device("cpu"), host.view(torch.float32).fill_(1), s.effort.point_s)
    source = "the fastest of sum, maximum and dot product over {:.0f} MiB, all threads"
    found.put(source.format(host.nbytes / MIB), host_bytes_per_s=host_rate, memory_bytes_per_s=host_rate)
    if s.device.is_cuda:
        size = min(4 << 30, found.values["memory_bytes"] // 8)
        values = torch.ones(size // 4, device=s.device.torch)
        rate = memory_rate(s.device, values, 3 * s.effort.point_s)
        found.put(f"a sum over {values.nbytes / MIB:.0f} MiB on the GPU", memory_bytes_per_s=rate)


def _copies(s: Setting, found: Found) -> None:
    kind = s.device.torch.type
    unit = min(s.effort.copy_bytes[kind], s.effort.buffer_bytes // (2 if s.device.is_cuda else 4))
    rates = copy_rates(s.device, unit, 3 * s.effort.point_s)
    how = (
        "pinned copies on a stream each way"
        if s.device.is_cuda
        else "numpy copies between host buffers, one thread each way"
    )
    source = f"{how}, units of {unit / MIB:.0f} MiB in three pieces"
    found.put(f"{source}, alone", h2d_bytes_per_s=rates.h2d, d2h_bytes_per_s=rates.d2h)
    found.put(
        f"{source}, both at once", h2d_duplex_bytes_per_s=rates.h2d_duplex, d2h_duplex_bytes_per_s=rates.d2h_duplex
    )
    room = s.effort.buffer_bytes // (2 if s.device.is_cuda else 4)
    found.put(
        f"{how}, units of each size in three pieces, one after the other in {room / MIB:.0f} MiB; the mean of {CURVE_ROUNDS} rounds",
        h2d_curve=copy_curve(s.device, room, s.effort.link_bytes, s.effort.point_s),
    )


def _kv(s: Setting, found: Found) -> None:
    rates = kv_rates(s.device, s.dtypes[2], s.effort)
    first, last = s.effort.contexts
    source = f"flexmoe.kv.transfers on blocks in no order, bytes of K and V, {_dtype(s, 2)}, 8 KV heads of 128"
    found.put(f"{source}, {rates.rows} rows of {first} to {last} tokens", kv_load_bytes_per_s=rates.load)
    found.put(f"{source}, runs of 64 tokens", kv_store_bytes_per_s=rates.store)


def _attention(s: Setting, found: Found) -> None:
    on_host = attention_rates(s.device, s.dtypes[2], s.effort, on_host=True)
    on_device = attention_rates(s.device, s.dtypes[2], s.effort, on_host=False) if s.device.is_cuda else on_host
    kernel = "native code" if native.available() else "torch (no native code: is there a C++ compiler?)"
    first, last = s.effort.contexts
    decode = (
        f"flexmoe.kernels.paged_attention, {_dtype(s, 2)}, {on_host.rows} rows of {first} to {last} tokens, heads of 64 and 128, 4 queries "
        f"per KV head"
    )
    prefill = f"flexmoe.kernels.paged_attention, {_dtype(s, 2)}, runs of {s.effort.prompts} tokens, whole prompts and second chunks"
    for prefix, rates, where in (("", on_device, "torch" if s.device.is_cuda else kernel), ("cpu_", on_host, kernel)):
        found.put(f"{decode}, {where}", **{f"{prefix}attention_bytes_per_s": rates.bytes_per_s})
        found.put(f"{prefill}, {where}", **{f"{prefix}attention_flops_per_s": rates.flops_per_s})
        found.put(f"{decode}, KV of int8 beside that, {where}", **{f"{prefix}int8_attention": rates.int8})


def _linear(s: Setting, found: Found) -> None:
    experts: dict[int, GemmRates] = {}
    grouped: dict[int, GemmRates] = {}
    dense: dict[int, GemmRates] = {}
    room = min(s.effort.buffer_bytes, found.values["memory_bytes"] // 8) * 3 // 4
    for size, dtype in s.dtypes.items():
        arena = WeightArena(s.device, dtype, room)
        experts[size], dense[size] = (rates(s.device, arena, dtype, s.effort) for rates in (expert_rates, dense_rates))
        together = grouped_expert_rates(s.device, arena, dtype, s.effort)
        grouped |= {size: together} if together else {}
        del arena  # before the next is made
    source = f"weights in turn from {s.effort.cycle_bytes / MIB:.0f} MiB, token counts spread as random routing spreads them, {_dtype(s, 2)} and {_dtype(s, 4)}"
    found.put(
        f"flexmoe.kernels.expert_dispatch and the family's expert: gather, three GEMMs, activation, scatter; {source}",
        experts=experts,
    )
    found.put(
        f"the same, of units of {UNIT_EXPERTS} experts with up to {GROUPED_TOKENS} tokens each, by grouped products; {source}, "
        f"as far as the device has such products",
        grouped_experts=grouped,
    )
    found.put(f"the family's projections, new KV, output and router, and routing, per GPU batch; {source}", dense=dense)
    unpacked = f"flexmoe.formats, a matrix of an expert in the pieces that a product takes, into {_dtype(s, 2)}"
    found.put(unpacked, unpack_s=unpacking_s(s.device, s.dtypes[2], s.effort))


def _overheads(s: Setting, found: Found) -> None:
    rest = overheads(s.device, s.dtypes[2], s.directory, s.effort)
    source = (
        f"sweeps of a tiny model of {s.effort.layers} layers by flexmoe.engine.engine, {s.effort.rows} rows that decode in GPU batches "
        f"of {s.effort.batch_rows}; experts, attention modules and attention measured apart and taken off, the rest fitted to "
        f"(1, rows, operations)"
    )
    found.put(source, sweep_s=rest.sweep_s, row_s=rest.row_s, op_s=rest.op_s)
    source = (
        "flexmoe.sampling.logprobs, positions of a prompt with their most probable tokens, without the head's product"
    )
    found.put(source, score_s=score_s(s.device, s.effort))


def _latencies(s: Setting, found: Found) -> None:
    found.put(
        f"the KV lanes' own seconds per operation in sweeps of {_model(s)}, KV of few tokens in host memory",
        handoff_s=handoff_s(s.device, s.dtypes[2], s.directory, s.effort),
    )
    if s.device.is_cuda:
        unit = min(s.effort.copy_bytes["cuda"], s.effort.buffer_bytes // 2)
        small_s = small_copy_s(s.device, unit, s.effort.point_s)
        source = f"1 MiB up while a thread copies {unit / MIB:.0f} MiB again and again as the weight stream does, beyond what it takes alone"
        found.put(source, h2d_busy_latency_s=small_s)
    else:
        found.put("on device cpu a thread copies what it is asked for", h2d_busy_latency_s=0.0)
    disk = disk_latency(s.device, s.directory, s.effort)
    found.put("64 KiB written or read with nothing else under way", disk_latency_s=disk.alone_s)
    busy = f"the same while {READ_THREADS} threads read {SHARED_PIECE_BYTES / MIB:.0f} MiB each without end"
    found.put(busy, disk_busy_latency_s=disk.busy_s)


def _streaming(s: Setting, found: Found) -> None:
    """On CUDA copies take no core, and no GEMM waits for those that disk reads take; the CPU's attention slows reads there."""
    beside = reading_beside_compute(s.device, s.directory, s.effort)
    found.put(
        f"reads of {READ_THREADS} threads while products take all cores, beside those alone",
        disk_read_beside_compute=beside,
    )
    if s.device.is_cuda:
        found.put("the device's own engines copy", h2d_core_s_per_byte=0.0)
        return
    rate, alone = found.values["disk_read_bytes_per_s"], found.values["disk_read_core_s_per_byte"]
    taken = streaming_core_s_per_byte(s.device, s.dtypes[2], s.directory, s.effort, rate)
    models = " and ".join(_described(arch) for arch in moved_archs(s.dtypes[2], s.effort))
    source = (
        f"sweeps of {models}, {moved_rows(s.effort)} rows in one GPU batch, with weights {{}} beside those with none: "
        "cores x difference / bytes"
    )
    found.put(source.format("in host memory"), h2d_core_s_per_byte=taken["cpu"])
    disk = source.format("on disk") + ", at least the CPU time of reads alone"
    found.put(disk, disk_read_core_s_per_byte=max(alone, taken["disk"]))
    _kv_beside_compute(s, found)


def _kv_beside_compute(s: Setting, found: Found) -> None:
    arch = streaming_arch(s.dtypes[2], s.effort)
    nbytes = PAGE_TOKENS * arch.kv_bytes_per_token_layer(s.dtypes[2].itemsize)
    taken_s = kv_block_core_s(s.device, s.dtypes[2], s.directory, s.effort)
    taken_s -= nbytes * found.values["disk_read_core_s_per_byte"]
    found.put(
        f"sweeps of {_model(s)}, {moved_rows(s.effort)} rows with KV on disk beside those with KV in host memory: cores x difference of the computation / "
        "reads, less what their bytes take; at least the CPU time of reads alone",
        kv_block_core_s=max(found.values["kv_block_core_s"], taken_s),
    )


def _model(s: Setting) -> str:
    model = _described(streaming_arch(s.dtypes[2], s.effort))
    return f"{model}, {max(s.effort.rows)} rows in GPU batches of {min(s.effort.batch_rows)}"


def _described(arch: ModelArch) -> str:
    return f"{arch.num_layers} layers of {arch.num_experts} experts of {arch.expert_params / 1e6:.1f} M weights"


def _dtype(s: Setting, size: int) -> str:
    return str(s.dtypes[size]).removeprefix("torch.")


def _process(s: Setting, found: Found) -> None:
    source = f"python -m flexmoe.run with a small model in {_dtype(s, 2)}: peak resident memory less what was planned"
    found.put(source, process_bytes=process_bytes(s.device, s.dtypes[2]))


_IN_PASSES = (
    "memory",
    "copies",
    "KV loads and stores",
    "attention",
    "experts and attention modules",
    "overheads",
)
_ALONE = ("the disk", "latencies", "computing beside transfers", "the process")
STEPS: dict[str, Callable[[Setting, Found], None]] = {
    "the disk": _disk,
    "memory": _memory,
    "copies": _copies,
    "KV loads and stores": _kv,
    "attention": _attention,
    "experts and attention modules": _linear,
    "overheads": _overheads,
    "latencies": _latencies,
    "computing beside transfers": _streaming,
    "the process": _process,
}
