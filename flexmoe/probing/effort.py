"""How much is measured: sizes, token counts and seconds. Tests run the whole probe at a fraction of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flexmoe.system.memory import available_host_bytes
from policies.common.memory_units import GIB, MIB

_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """An attention module: hidden size, query and KV heads, head size."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What the probe may spend.

    Attributes:
        buffer_bytes: host memory held at once; on CUDA also the GPU memory of the weights.
        point_s: seconds per measured number, of all passes together.
        curve_s: a weight size whose curve over tokens would take longer than this is left out.
        tokens: token counts of the curves, by device type.
        experts: (hidden, width) of the experts measured, rising.
        modules: attention modules measured, rising; one at least has the hidden size of an expert.
        cycle_bytes: weights are taken in turn from so many bytes, more than a cache holds.
        copy_bytes: a copied unit, by device type.
        link_bytes: units of the curves of reads and copies, as far as the buffers hold them.
        decode_rows, fetched_rows: rows of a decode call, and of a batch whose KV is loaded.
        contexts: shortest and longest context of a row.
        prompts: run lengths of the prefill calls.
        disk_bytes: largest file, if a tenth of the free space is not less; `least_disk_bytes` is the smallest.
        kv_blocks: KV blocks of each size on disk, if the file is then no larger.
        disk_s: seconds after which writing stops, and reading.
        layers, rows, batch_rows: the sweeps of a tiny model from which the overheads follow: all combinations.
        sweeps: how many of each.
        passes: on device cpu, how often what the cores' speed decides is measured, at different times: a shared machine changes
            that speed by half within a second. What counts is the mean.
    """

    buffer_bytes: int = GIB
    point_s: float = 0.1
    curve_s: float = 12.0
    tokens: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"cpu": _TOKENS, "cuda": (*_TOKENS, 2048, 4096, 8192)}
    )
    experts: tuple[tuple[int, int], ...] = ((256, 896), (512, 1792), (1024, 3584), (4096, 14336))
    modules: tuple[Heads, ...] = (
        Heads(hidden=256, heads=4, kv_heads=1, head_dim=64),
        Heads(hidden=512, heads=8, kv_heads=2, head_dim=64),
        Heads(hidden=1024, heads=8, kv_heads=2, head_dim=128),
        Heads(hidden=4096, heads=32, kv_heads=8, head_dim=128),
    )
    cycle_bytes: int = 256 * MIB
    copy_bytes: Mapping[str, int] = field(default_factory=lambda: {"cpu": 128 * MIB, "cuda": 336 * MIB})
    link_bytes: tuple[int, ...] = (MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    decode_rows: int = 128
    fetched_rows: int = 16
    contexts: tuple[int, int] = (256, 640)
    prompts: tuple[int, ...] = (128, 256, 512)
    disk_bytes: int = 2 * GIB
    least_disk_bytes: int = 64 * MIB
    kv_blocks: int = 2048
    disk_s: float = 10.0
    layers: tuple[int, ...] = (2, 6)
    rows: tuple[int, ...] = (8, 64, 256)
    batch_rows: tuple[int, ...] = (16, 256)
    sweeps: int = 15
    passes: int = 3

    def bounded(self, *limits: int | None) -> Effort:
        """The same with buffers no larger than an eighth of the available host memory and the given limits."""
        within = [limit for limit in limits if limit is not None]
        return replace(self, buffer_bytes=min(self.buffer_bytes, available_host_bytes() // 8, *within))
