"""The GPUs and hosts of the machines that ship with the planner, as their datasheets and published measurements have them.

`derived` derives the rest. Visible memory is the "total capacity" of torch's out-of-memory messages.
"""

from __future__ import annotations

from dataclasses import dataclass

ANCHOR = "input of the project's table of physical limits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A disk: bytes/s of long transfers; 4 KiB at random places per second by one thread, one after the other."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    reads_per_s: float
    writes_per_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU. ``*_source`` says where the value beside it comes from.

    Args:
        label: the product's name.
        memory_gib, visible_gib: its nominal memory, and what CUDA shows of it.
        memory_bytes_per_s: the datasheet's.
        half_flops_per_s, single_flops_per_s: what large products reach in 16 and in 32 bits.
        link_bytes_per_s: pinned copies in one direction.
    """

    label: str
    memory_gib: float
    visible_gib: float
    memory_bytes_per_s: float
    half_flops_per_s: float
    half_source: str
    single_flops_per_s: float
    single_source: str
    link_bytes_per_s: float
    link_source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine around it."""

    cores: int
    memory_gib: float
    memory_bytes_per_s: float
    memory_source: str
    disk_gib: float
    disk: Drive
    core_flops_per_s: float
    core_source: str


GEN3 = Drive(
    read_bytes_per_s=3.5e9,
    write_bytes_per_s=2.3e9,
    reads_per_s=15e3,
    writes_per_s=55e3,
    source="datasheet of an NVMe Gen3 x4 drive (Samsung 970 PRO)",
)
GEN4 = Drive(
    read_bytes_per_s=7.0e9,
    write_bytes_per_s=5.0e9,
    reads_per_s=22e3,
    writes_per_s=60e3,
    source="datasheet of an NVMe Gen4 x4 drive (Samsung 980 PRO)",
)
PCIE4 = "measured with nvbandwidth on an A100 behind PCIe Gen4 x16: 24.8 GB/s (NVIDIA developer forum, 352186)"
PCIE5 = f"{ANCHOR}; Gen5 x16 at the share of the raw rate that Gen4 x16 reaches"
CORE_AVX2 = "estimate: 40 GFLOP/s a core, half of the peak of AVX2 in float32"
DDR5_SERVER = {"memory_bytes_per_s": 150e9, "memory_source": ANCHOR, "disk": GEN4, "disk_gib": 3400}
CORES = {"core_flops_per_s": 40e9, "core_source": CORE_AVX2}

MACHINES_BY_NAME = {
    "t4": (
        Card(
            label="NVIDIA T4",
            memory_gib=16,
            visible_gib=14.56,
            memory_bytes_per_s=320e9,
            half_flops_per_s=21e12,
            half_source=f"{ANCHOR}; the datasheet's 65 are capped by its 70 W: 24 measured with "
            "cuBLAS (NVIDIA developer forum, 264462)",
            single_flops_per_s=4e12,
            single_source="half of the datasheet's 8.1, as it is capped by its 70 W",
            link_bytes_per_s=12e9,
            link_source=f"{ANCHOR}, for PCIe Gen3 x16",
        ),
        Host(
            cores=24, memory_gib=192, memory_bytes_per_s=80e9, memory_source=ANCHOR, disk_gib=1500, disk=GEN3, **CORES
        ),
    ),
    "l4": (
        Card(
            label="NVIDIA L4",
            memory_gib=24,
            visible_gib=22.03,
            memory_bytes_per_s=300e9,
            half_flops_per_s=60e12,
            half_source="estimate: half of the datasheet's 121 without sparsity, as it is capped by its 72 W",
            single_flops_per_s=15e12,
            single_source="half of the datasheet's 30.3, as it is capped by its 72 W",
            link_bytes_per_s=25e9,
            link_source=f"PCIe Gen4 x16; {PCIE4}",
        ),
        Host(
            cores=24,
            memory_gib=192,
            memory_bytes_per_s=80e9,
            memory_source="as the T4's host, a cloud machine alike",
            disk_gib=1500,
            disk=GEN4,
            **CORES,
        ),
    ),
    "a5000": (
        Card(
            label="NVIDIA RTX A5000",
            memory_gib=24,
            visible_gib=23.68,
            memory_bytes_per_s=768e9,
            half_flops_per_s=75e12,
            half_source=f"{ANCHOR}; the datasheet has 111 without sparsity",
            single_flops_per_s=19e12,
            single_source="70 % of the datasheet's 27.8",
            link_bytes_per_s=25e9,
            link_source=f"{ANCHOR}; {PCIE4}",
        ),
        Host(
            cores=32, memory_gib=512, memory_bytes_per_s=140e9, memory_source=ANCHOR, disk_gib=3400, disk=GEN4, **CORES
        ),
    ),
    "rtx3090": (
        Card(
            label="NVIDIA GeForce RTX 3090",
            memory_gib=24,
            visible_gib=23.69,
            memory_bytes_per_s=936e9,
            half_flops_per_s=60e12,
            half_source="estimate: 85 % of the whitepaper's 71 (accumulating in float32, no sparsity)",
            single_flops_per_s=25e12,
            single_source="70 % of the whitepaper's 35.6",
            link_bytes_per_s=25e9,
            link_source=f"PCIe Gen4 x16; {PCIE4}",
        ),
        Host(
            cores=16,
            memory_gib=128,
            memory_bytes_per_s=43e9,
            memory_source="estimate: 85 % of the 51.2 of two channels of DDR4-3200",
            disk_gib=1800,
            disk=GEN4,
            **CORES,
        ),
    ),
    "rtx4090": (
        Card(
            label="NVIDIA GeForce RTX 4090",
            memory_gib=24,
            visible_gib=23.64,
            memory_bytes_per_s=1008e9,
            half_flops_per_s=130e12,
            half_source=f"{ANCHOR}; the whitepaper has 165 (float32 accumulation, no sparsity)",
            single_flops_per_s=57e12,
            single_source="70 % of the whitepaper's 82.6",
            link_bytes_per_s=25e9,
            link_source=f"{ANCHOR}; {PCIE4}",
        ),
        Host(
            cores=16,
            memory_gib=128,
            memory_bytes_per_s=65e9,
            memory_source=f"{ANCHOR}, two channels of DDR5",
            disk_gib=1800,
            disk=GEN4,
            **CORES,
        ),
    ),
    "a100": (
        Card(
            label="NVIDIA A100 80GB SXM",
            memory_gib=80,
            visible_gib=79.15,
            memory_bytes_per_s=2039e9,
            half_flops_per_s=217e12,
            half_source="estimate: 80 % of the 271 of the best shape (stas00/ml-engineering, MAMF table); "
            "the datasheet has 312",
            single_flops_per_s=14e12,
            single_source="70 % of the datasheet's 19.5, as TF32 is not used",
            link_bytes_per_s=24.8e9,
            link_source=PCIE4,
        ),
        Host(
            cores=32,
            memory_gib=256,
            memory_bytes_per_s=140e9,
            memory_source="as the A5000's host, eight channels of DDR4",
            disk_gib=3400,
            disk=GEN4,
            **CORES,
        ),
    ),
    "h100": (
        Card(
            label="NVIDIA H100 SXM",
            memory_gib=80,
            visible_gib=79.14,
            memory_bytes_per_s=3350e9,
            half_flops_per_s=500e12,
            half_source=f"{ANCHOR}; the best shape reaches 794 (stas00/ml-engineering, MAMF table), "
            "the datasheet has 989",
            single_flops_per_s=47e12,
            single_source="70 % of the datasheet's 67, as TF32 is not used",
            link_bytes_per_s=50e9,
            link_source=PCIE5,
        ),
        Host(cores=32, memory_gib=512, **DDR5_SERVER, **CORES),
    ),
    "h200": (
        Card(
            label="NVIDIA H200 SXM",
            memory_gib=141,
            visible_gib=139.8,
            memory_bytes_per_s=4800e9,
            half_flops_per_s=500e12,
            half_source=f"{ANCHOR}; the cores are the H100's, whose best shape reaches 794",
            single_flops_per_s=47e12,
            single_source="70 % of the datasheet's 67, as TF32 is not used",
            link_bytes_per_s=50e9,
            link_source=PCIE5,
        ),
        Host(cores=32, memory_gib=512, **DDR5_SERVER, **CORES),
    ),
}

DESKTOP = Host(
    cores=16,
    memory_gib=32,
    memory_bytes_per_s=65e9,
    memory_source=f"{ANCHOR}, two channels of DDR5",
    disk_gib=1800,
    disk=GEN4,
    core_flops_per_s=80e9,
    core_source="estimate: 80 GFLOP/s a core, half of what the native kernel reaches (benchmarks/cpu-attention.txt)",
)
