"""The machines that ship with the planner, `cost_model/hardware/machines/*.json`, each value with its source.

A card's numbers come from its datasheet and from published measurements; what neither tells is derived here by one rule
for all cards, and the rule is the source. A probe of the machine at hand knows better.
"""

from __future__ import annotations

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import Gpu, Hardware
from cost_model.memory.allocation import KV_TRANSFERS
from cost_model.memory.memory_plan import allocator_bytes
from flexmoe.system.direct_io import SHARED_PIECE_BYTES
from policies.common.memory_units import GIB
from scripts.machines.cards import DESKTOP, MACHINES_BY_NAME, Card, Drive, Host
from scripts.machines.flexllmgen import t4_flexllmgen

GEMM_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
#: Weights of one expert and of one attention module of Mixtral 8x7B.
EXPERT_ELEMENTS, DENSE_ELEMENTS = 3 * 4096 * 14336, 41_984_000
CONTEXT_BYTES = GIB // 2
MEMORY_SHARE, DUPLEX_SHARE, CPU_ATTENTION_SHARE = 0.8, 0.85, 0.5
#: Passes over host memory of a copy within it: a read, a write, and the read of the line that is written.
COPY_PASSES = 3
#: Passes over device memory of attention: blocks gathered (2), unseen slots cleared (2), and the fused kernel's read.
ATTENTION_PASSES = 5
PREFILL_SHARE = 0.4
INT8_ATTENTION_SOURCE = "not measured: a token of compressed KV takes what one of 16 bits takes"
DISK_CORE_S_PER_BYTE, KV_BLOCK_CORE_S, OP_S, ROW_S, SWEEP_S, HANDOFF_S = 5e-11, 10e-6, 30e-6, 30e-6, 2e-3, 100e-6
#: The process beside what is planned: Python and torch with what they keep; with CUDA also its libraries and its context.
PROCESS_BYTES = {"cpu": GIB // 2, "cuda": 2 * GIB}
PROCESS_SOURCES = {
    "cpu": "estimate: 0.31 to 0.38 GiB on two cores (benchmarks/memory.md), and threads of more cores",
    "cuda": "estimate: 0.4 GiB of Python and torch, the rest for CUDA's libraries and the host's part of its context",
}
#: Of weights on their way up before a small copy: two pieces.
PIECES_BEFORE_BYTES = 24 << 20


def roofline(peak_flops_per_s: float, memory_bytes_per_s: float, dtype_bytes: int, elements: int) -> GemmRates:
    """The lower of the peak and of what reading the weights once allows."""
    rates = tuple(min(peak_flops_per_s, 2 * tokens * memory_bytes_per_s / dtype_bytes) for tokens in GEMM_TOKENS)
    return GemmRates(tokens=GEMM_TOKENS, weight_elements=(elements,), flops_per_s=(rates,))


def curves(peaks: dict[int, float], memory_bytes_per_s: float) -> dict[str, dict[int, GemmRates]]:
    """`Gpu.experts` and `Gpu.dense` from the peak per size of a number."""
    sizes = {"experts": EXPERT_ELEMENTS, "dense": DENSE_ELEMENTS}
    return {
        kind: {each: roofline(peak, memory_bytes_per_s, each, elements) for each, peak in peaks.items()}
        for kind, elements in sizes.items()
    }


#: Of host or device memory for a scored logit: it is widened (6), searched for what is not finite (16) and for the largest (4),
#: and exponentials are taken and summed (20).
SCORE_BYTES = 46
SCORE_SOURCE = (
    f"estimate: {SCORE_BYTES} bytes of memory_bytes_per_s for each logit, which is passed over in float32 several times"
)


def one_after_other(*rates: float) -> float:
    """The rate of bytes that pass several stages in turn."""
    return 1 / sum(1 / rate for rate in rates)


def cuda_machine(name: str, card: Card, host: Host) -> Hardware:
    """A machine with a GPU."""
    memory, link = MEMORY_SHARE * card.memory_bytes_per_s, card.link_bytes_per_s
    packed = one_after_other(host.memory_bytes_per_s / COPY_PASSES, link)
    gpu = Gpu(
        name=card.label,
        memory_bytes=int(card.memory_gib * GIB),
        reserved_bytes=round((card.memory_gib - card.visible_gib) * GIB)
        + CONTEXT_BYTES
        + allocator_bytes(int(card.visible_gib * GIB)),
        **curves({2: card.half_flops_per_s, 4: card.single_flops_per_s}, memory),
        memory_bytes_per_s=memory,
        h2d_bytes_per_s=link,
        d2h_bytes_per_s=link,
        h2d_duplex_bytes_per_s=DUPLEX_SHARE * link,
        d2h_duplex_bytes_per_s=DUPLEX_SHARE * link,
        kv_load_bytes_per_s=round(packed),
        kv_store_bytes_per_s=round(packed),
        attention_bytes_per_s=memory / ATTENTION_PASSES,
        attention_flops_per_s=PREFILL_SHARE * card.half_flops_per_s,
        op_s=OP_S,
        score_s=SCORE_BYTES / memory,
        h2d_busy_latency_s=PIECES_BEFORE_BYTES / link,
    )
    return machine(name, "cuda", gpu, host, card_sources(card))


def card_sources(card: Card) -> dict[str, str]:
    """Where the values of a `Gpu` come from."""
    peaks = f"16 bits: {card.half_flops_per_s / 1e12:g} TFLOP/s, {card.half_source}. "
    peaks += f"32 bits: {card.single_flops_per_s / 1e12:g} TFLOP/s, estimate: {card.single_source}"
    rule = f"estimate: roofline of that peak and of reading the weights once at memory_bytes_per_s. {peaks}."
    alone = "the copy within host memory (a third of host_bytes_per_s), then over the link, one after the other"
    return {
        "memory_bytes": "datasheet, as GiB",
        "reserved_bytes": f"what CUDA does not show of it (torch reports {card.visible_gib:g} GiB), 0.5 GiB for the "
        "context and kernels, estimate, and what is kept for the allocator: 2 %, and 256 MiB at least",
        "experts": f"{rule} Gather, activation and scatter are not counted.",
        "dense": rule,
        "memory_bytes_per_s": f"estimate: 80 % of the datasheet's {card.memory_bytes_per_s / 1e9:g} GB/s",
        "h2d_bytes_per_s": card.link_source,
        "d2h_bytes_per_s": f"estimate: as up. {card.link_source}",
        "h2d_duplex_bytes_per_s": "estimate: 85 % of the rate alone",
        "d2h_duplex_bytes_per_s": "estimate: 85 % of the rate alone",
        "kv_load_bytes_per_s": f"estimate: {alone}",
        "kv_store_bytes_per_s": f"estimate: {alone}, backwards",
        "attention_bytes_per_s": "estimate: a fifth of memory_bytes_per_s: blocks are gathered (two passes), unseen slots "
        "cleared (two), and the fused kernel reads them",
        "attention_flops_per_s": "estimate: 40 % of the 16-bit peak of experts",
        "score_s": SCORE_SOURCE,
    }


def cpu_machine(name: str, host: Host) -> Hardware:
    """A machine whose cores are the compute device."""
    copy = round(host.memory_bytes_per_s / COPY_PASSES)
    gpu = Gpu(
        name="16-core desktop",
        memory_bytes=int(host.memory_gib * GIB),
        reserved_bytes=0,
        **curves({2: host.cores * 160e9, 4: host.cores * 60e9}, host.memory_bytes_per_s),
        memory_bytes_per_s=host.memory_bytes_per_s,
        h2d_bytes_per_s=copy,
        d2h_bytes_per_s=copy,
        h2d_duplex_bytes_per_s=copy / 2,
        d2h_duplex_bytes_per_s=copy / 2,
        kv_load_bytes_per_s=copy,
        kv_store_bytes_per_s=copy,
        attention_bytes_per_s=CPU_ATTENTION_SHARE * host.memory_bytes_per_s,
        attention_flops_per_s=host.cores * host.core_flops_per_s,
        op_s=OP_S,
        score_s=SCORE_BYTES / host.memory_bytes_per_s,
    )
    rule = (
        "estimate: roofline of reading the weights once at host_bytes_per_s, and of the cores. 16 bits: 160 GFLOP/s a "
    )
    rule += "core, 40 % of what two cores reach (benchmarks/cpu.md); 32 bits: 60, half of theirs (benchmarks/cpu-attention.txt)."
    third = "estimate: a copy within host memory passes over it three times: a third of host_bytes_per_s"
    halves = dict.fromkeys(("h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s"), f"{third}, shared by two")
    copies = ("h2d_bytes_per_s", "d2h_bytes_per_s", "kv_load_bytes_per_s", "kv_store_bytes_per_s")
    sources = {"memory_bytes": "as host_memory_bytes", "reserved_bytes": "there is no CUDA context"}
    sources |= {"experts": rule, "dense": rule, "memory_bytes_per_s": "as host_bytes_per_s"}
    sources |= dict.fromkeys(copies, third) | halves
    sources["attention_bytes_per_s"] = "as cpu_attention_bytes_per_s"
    sources["attention_flops_per_s"] = "as cpu_attention_flops_per_s"
    sources["score_s"] = SCORE_SOURCE
    return machine(name, "cpu", gpu, host, sources)


def machine(name: str, device: str, gpu: Gpu, host: Host, gpu_sources: dict[str, str]) -> Hardware:
    """The host's part, the same for both devices."""
    disk = host.disk
    sources = {
        **gpu_sources,
        "op_s": "estimate",
        "unpack_s": "not measured: reads and writes at memory_bytes_per_s",
        **dict.fromkeys(("int8_attention", "cpu_int8_attention"), INT8_ATTENTION_SOURCE),
        "h2d_busy_latency_s": "a thread copies what it is asked for"
        if device == "cpu"
        else "estimate: two pieces of 12 MiB of weights are before it",
        "cores": "chosen: a common machine of its kind",
        "host_memory_bytes": "chosen: a common machine of its kind; nominal, so take off what the system needs",
        "host_bytes_per_s": host.memory_source,
        "disk_bytes": "chosen: a common machine of its kind",
        "disk_read_bytes_per_s": disk.source,
        "disk_write_bytes_per_s": disk.source,
        "h2d_core_s_per_byte": "estimate: a core copies" if device == "cpu" else "the device's own engines copy",
        "disk_read_core_s_per_byte": "estimate: 0.05 core-seconds a GB, as direct reads bypass the page cache",
        "disk_write_core_s_per_byte": "estimate: as reads",
        **kv_block_sources(disk),
        "cpu_attention_bytes_per_s": "estimate: half of host_bytes_per_s; the native kernel reaches 44 to 48 % of the rate "
        "of torch.sum on two cores (benchmarks/cpu-attention.txt)",
        "cpu_attention_flops_per_s": host.core_source,
        "process_bytes": PROCESS_SOURCES[device],
        "row_s": "estimate",
        "sweep_s": "estimate",
    }
    return Hardware(
        name=name,
        device=device,
        gpus=(gpu,),
        cores=host.cores,
        host_memory_bytes=int(host.memory_gib * GIB),
        host_bytes_per_s=host.memory_bytes_per_s,
        disk_bytes=int(host.disk_gib * GIB),
        disk_read_bytes_per_s=disk.read_bytes_per_s,
        disk_write_bytes_per_s=disk.write_bytes_per_s,
        h2d_core_s_per_byte=1 / gpu.h2d_bytes_per_s if device == "cpu" else 0.0,
        disk_read_core_s_per_byte=DISK_CORE_S_PER_BYTE,
        disk_write_core_s_per_byte=DISK_CORE_S_PER_BYTE,
        kv_block_read_s=1 / disk.reads_per_s / KV_TRANSFERS,
        kv_block_core_s=KV_BLOCK_CORE_S,
        kv_block_write_s=1 / disk.writes_per_s / KV_TRANSFERS,
        disk_latency_s=1 / disk.reads_per_s,
        disk_busy_latency_s=1 / disk.reads_per_s + SHARED_PIECE_BYTES / disk.read_bytes_per_s,
        handoff_s=HANDOFF_S,
        cpu_attention_bytes_per_s=CPU_ATTENTION_SHARE * host.memory_bytes_per_s,
        cpu_attention_flops_per_s=host.cores * host.core_flops_per_s,
        row_s=ROW_S,
        sweep_s=SWEEP_S,
        sources=sources,
        process_bytes=PROCESS_BYTES[device],
    )


def kv_block_sources(disk: Drive) -> dict[str, str]:
    """Where the costs of a KV block on disk come from."""
    rule = "estimate: {:,.0f} {} of 4 KiB a second at random places, one after the other, of which the runtime has {} under way; {}"
    return {
        "kv_block_read_s": rule.format(disk.reads_per_s, "reads", KV_TRANSFERS, disk.source),
        "kv_block_core_s": "estimate: about what flexmoe.probe finds on two virtual cores",
        "kv_block_write_s": rule.format(disk.writes_per_s, "writes", KV_TRANSFERS, disk.source),
        "disk_latency_s": f"estimate: one read of 4 KiB at a random place; {disk.source}",
        "disk_busy_latency_s": "estimate: as disk_latency_s, behind one piece of 1 MiB of a weight",
        "handoff_s": "estimate: about what flexmoe.probe finds on two virtual cores",
        "disk_read_beside_compute": "a drive in the machine itself; that of a virtual machine is served by its host's cores: 1",
    }


def all_machines() -> list[Hardware]:
    """Every machine that ships with the package."""
    cuda = [cuda_machine(name, card, host) for name, (card, host) in MACHINES_BY_NAME.items()]
    return [*cuda, t4_flexllmgen(), cpu_machine("cpu", DESKTOP)]
