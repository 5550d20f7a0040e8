"""The physical limit of ANCHORS as a function, with its names: what no runtime can beat on the given bytes and rates.

    t_sweep = max{ (W_streamed + KV_over_PCIe) / pcie,
                   (W_streamed + KV_read) / host_dram,
                   flops_per_token · tokens / gpu_flops,
                   KV_attended_on_cpu / cpu_attention_rate,
                   (W_on_disk + KV_on_disk) / nvme }

In the overlapped steady state B rows of all ages are in flight: a sweep generates B tokens and prefills B · s / n.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf

from cost_model.model.arch import ModelArch
from cost_model.timing.sweep_load import MODES
from policies.policy import Workload

#: What ANCHORS takes off the GPU before experts are resident (Mixtral 8x7B, decimal bytes).
DENSE_BYTES, SLOT_BYTES, WORK_BYTES = 3.2e9, 1.4e9, 2.5e9
ALL_ON_CPU = {"cpu": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine reaches, in bytes/s and FLOP/s.

    Args:
        pcie: host to GPU, pinned.
        host_dram: reads of host memory by all who read it.
        gpu_flops: (tokens of one expert, FLOP/s) in rising order; between the points it is interpolated.
        cpu_attention: KV bytes attended on the CPU.
        nvme: disk reads.
    """

    pcie: float
    host_dram: float
    gpu_flops: tuple[tuple[float, float], ...]
    cpu_attention: float = inf
    nvme: float = inf

    def gpu_flops_at(self, tokens_per_expert: float) -> float:
        """FLOP/s of an expert's products over so many tokens."""
        points = self.gpu_flops
        right = bisect_left([tokens for tokens, _ in points], tokens_per_expert)
        if right == 0 or right == len(points):
            return points[min(right, len(points) - 1)][1]
        (t0, r0), (t1, r1) = points[right - 1 : right + 1]
        return r0 + (r1 - r0) * (tokens_per_expert - t0) / (t1 - t0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one sweep moves and computes; bytes and tokens."""

    w_streamed: float
    w_on_disk: float
    kv_over_pcie: float
    kv_read: float
    kv_attended_on_cpu: float
    tokens: float
    kv_on_disk: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit, and where it comes from: ``terms`` are the seconds of each lane."""

    tokens_per_s: float
    rows: float
    terms: Mapping[str, float]
    traffic: Traffic

    @property
    def bound_by(self) -> str:
        """The lane that decides."""
        return max(self.terms, key=self.terms.__getitem__)

    def to_json(self) -> dict:
        """For the record."""
        return {**asdict(self), "terms": dict(self.terms), "bound_by": self.bound_by}


def sweep_terms(arch: ModelArch, traffic: Traffic, rates: Rates) -> dict[str, float]:
    """Seconds of every lane in one sweep; the sweep takes the maximum."""
    per_expert = traffic.tokens * arch.top_k / arch.num_experts
    return {
        "pcie": (traffic.w_streamed + traffic.kv_over_pcie) / rates.pcie,
        "host_dram": (traffic.w_streamed + traffic.kv_read) / rates.host_dram,
        "gpu_flops": arch.flops_per_token * traffic.tokens / rates.gpu_flops_at(per_expert),
        "cpu_attention": traffic.kv_attended_on_cpu / rates.cpu_attention,
        "nvme": (traffic.w_on_disk + traffic.kv_on_disk) / rates.nvme,
    }


def steady_limit(
    arch: ModelArch,
    workload: Workload,
    rates: Rates,
    *,
    rows: float,
    w_streamed: float,
    w_on_disk: float = 0.0,
    kv_shares: Mapping[str, float] = ALL_ON_CPU,
) -> Limit:
    """The overlapped limit with these bytes.

    Args:
        rows: rows in flight, of all ages; their mean context is s + n/2.
        w_streamed: weight bytes that cross PCIe in a sweep.
        w_on_disk: those of them that are read from the disk first.
        kv_shares: part of the KV by how it is attended (`cost_model.timing.sweep_load.MODES`).
    """
    s, n = workload.prompt_len, workload.gen_len
    kv = rows * (s + n / 2) * arch.kv_bytes_per_token(arch.dtype_bytes)
    of = {mode: kv * kv_shares.get(mode, 0.0) for mode in MODES}
    traffic = Traffic(
        w_streamed=w_streamed,
        w_on_disk=w_on_disk,
        kv_over_pcie=of["fetch"] + of["disk"],
        kv_read=of["fetch"] + of["disk"] + of["cpu"],
        kv_attended_on_cpu=of["cpu"],
        tokens=rows * (1 + s / n),
        kv_on_disk=of["disk"],
    )
    terms = sweep_terms(arch, traffic, rates)
    return Limit(tokens_per_s=rows / max(terms.values()), rows=rows, terms=terms, traffic=traffic)


def machine_limit(
    arch: ModelArch,
    workload: Workload,
    rates: Rates,
    *,
    gpu_bytes: float,
    host_bytes: float,
    disk_bytes: float = 0.0,
    dense_bytes: float = DENSE_BYTES,
) -> Limit:
    """The overlapped end-to-end limit of a machine at the best share of the weights on disk.

    Args:
        gpu_bytes: GPU memory.
        host_bytes: host memory that weights and KV may have (ANCHORS' table takes 0.95 of it).
        disk_bytes: weights that may lie on disk.
        dense_bytes: weights that are no experts; they are on the GPU.
    """
    s, n = workload.prompt_len, workload.gen_len
    experts = arch.num_layers * arch.num_experts * arch.expert_bytes
    resident = min(experts, max(0.0, gpu_bytes - dense_bytes - SLOT_BYTES - WORK_BYTES))
    streamed = experts - resident
    row_bytes = (s + n / 2) * arch.kv_bytes_per_token(arch.dtype_bytes)
    limits = []
    for on_disk in range(0, int(min(disk_bytes, streamed)) + 1, arch.expert_bytes):
        rows = max(0.0, host_bytes - (streamed - on_disk)) / row_bytes
        limits.append(steady_limit(arch, workload, rates, rows=rows, w_streamed=streamed, w_on_disk=float(on_disk)))
    return max(limits, key=lambda limit: limit.tokens_per_s)
