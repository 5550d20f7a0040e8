"""The bounds of `cost_model.sweep` on the seconds of a sweep, as constraints of the linear programme.

A lane's seconds and a shared resource's are linear in rows and bytes. The curves of the linear operations enter as the
straight pieces below them (`GemmRates.pieces`), the pipeline of an attention phase as the longest ways through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cost_model.lp import Programme

GIB = 1 << 30
_OPS_PER_LAYER = 2


def bound_sweep(programme: Programme, index: int) -> None:
    """Adds what sweep number ``index`` of the programme's phases takes at least."""
    _Sweep(programme, index).bound()


class _Sweep:
    """One kind of sweep. Factors are in the programme's unit of time (`Programme.second` per second)."""

    def __init__(self, programme: Programme, index: int):
        self.lp, self.phase = programme, programme.lines.phases[index]
        self.index, self.t = index, (programme.sweeps[index], -1.0)
        self.problem, self.costs = programme.problem, programme.lines.costs
        self.layers = self.problem.arch.num_layers
        phase = self.phase
        self.dense_s = phase.project_s + phase.attend_s
        on_device = {mode: 0.0 if mode == "cpu" else s for mode, s in phase.attention_s.items()}
        self.busy = self._rows({mode: self.dense_s + s for mode, s in on_device.items()})
        self.experts = self._largest("experts", self._expert_pieces())
        head = self._largest("head", self._head_pieces())
        self.outside = [
            *programme.every_row(phase.outside_s * programme.second),
            (programme.u, self.costs.host_s(0) * programme.second),
            (head, 1.0),
        ]

    def bound(self) -> None:
        """Adds all constraints."""
        lanes = self._lanes()
        if not self.lp.choice.overlap:
            self._at_most("serial", [term for lane in lanes.values() for term in lane])
            return
        for name, terms in self._resources(lanes):
            self._at_most(name, terms)
        streams = self.lp.choice.streams
        for phase in self._ways():
            way = [*_times(phase, self.layers), *self.outside]
            self._at_most("schedule", [*way, (self.experts, self.layers)])
            for late in self._late(lanes) if streams else ():
                self._at_most("slots", [*way, *late])

    def _at_most(self, name: str, terms: Sequence) -> None:
        self.lp.at_most_zero(*terms, self.t, name=name)

    def _rows(self, seconds: dict[str, float], *modes: str) -> list:
        """Seconds of the rows in these modes (default all), by mode."""
        return _times(self.lp.rows_by_mode(seconds, *modes), self.lp.second)

    def _lanes(self) -> dict[str, list]:
        """Busy seconds by lane, as `sweep.sweep_time` adds them up."""
        p, hw, layers = self.phase, self.problem.hardware, self.layers
        every = [self.lp.every_row(s * self.lp.second * layers) for s in (p.act_up_s, p.act_down_s)]
        from_disk = self._streamed("disk")
        up = self._streamed("cpu") + (from_disk if hw.device == "cuda" else [])
        return {
            "gpu": [*_times(self.busy, layers), (self.experts, layers), *self.outside],
            "cpu": self._rows(_times_each(p.cpu_s, layers), "cpu"),
            "h2d": _times(up, 1 / hw.gpu.h2d_bytes_per_s),
            "h2d/kv": [*self._rows(_times_each(p.load_s, layers)), *every[0]],
            "d2h": [*self._rows(_times_each(p.store_s, layers)), *every[1]],
            "disk_read": _times(from_disk, 1 / hw.disk_read_bytes_per_s),
            "disk_read/kv": self._rows(_times_each(p.read_s, layers)),
            "disk_write": self._rows(_times_each(p.write_s, layers)),
        }

    def _streamed(self, tier: str) -> list:
        """Bytes of a tier's weights that a sweep needs; the embedding, which stays where it is, is a part of every tier."""
        units = self.lp.units
        embed = units.bytes_between(0, len(units.order), "embed") / self.lp.total_bytes
        return [(self.lp.weights[tier], (1 - embed) * GIB * self.lp.second)]

    def _resources(self, lanes: dict[str, list]) -> list[tuple[str, list]]:
        """Seconds of each lane and of each resource that lanes share, as `sweep` has them."""
        hw, gpu = self.problem.hardware, self.problem.hardware.gpu
        found = [(name, terms) for name, terms in lanes.items() if "/" not in name and name not in ("h2d", "disk_read")]
        found.append(("disk_read", lanes["disk_read"] + lanes["disk_read/kv"]))
        if hw.device == "cpu":
            shares = self.costs.lane_share
            cores = [term for name, terms in lanes.items() for term in _times(terms, shares[name])]
            return [*found, ("h2d", lanes["h2d"]), ("h2d", lanes["h2d/kv"]), ("cores", cores)]
        up, down = lanes["h2d"] + lanes["h2d/kv"], lanes["d2h"]
        both = min(
            gpu.h2d_duplex_bytes_per_s / gpu.h2d_bytes_per_s, gpu.d2h_duplex_bytes_per_s / gpu.d2h_bytes_per_s, 1.0
        )
        slower = min(1.0, 1 / both - 1)  # beyond 1 the bound would not be convex
        moved = [
            *_times(up, gpu.h2d_bytes_per_s / hw.host_bytes_per_s),
            *_times(down, gpu.d2h_bytes_per_s / hw.host_bytes_per_s),
            *self._rows({"cpu": self.phase.attended_bytes * self.layers / hw.host_bytes_per_s}, "cpu"),
        ]
        links = [("h2d", up), ("pcie", up + _times(down, slower)), ("pcie", down + _times(up, slower))]
        return [*found, *links, ("host memory", moved)]

    def _ways(self) -> list[list]:
        """Ways through the attention phase of a layer (`sweep._attention_s`), in seconds.

        GPU batches line up by mode: device, fetched, disk, CPU. Each is projected, and what it needs requested, before
        the batch in front of it is attended: so the first fetch waits for all of the device's batches but the last, and
        CPU attention for all fetches but the last. Of what comes first a part hides behind the experts before it.
        """
        p, rows, u = self.phase, self.lp.rows, self.lp.u
        batch = (
            min(self.lp.choice.gpu_batch_size / max(p.rows, 1e-9), self.lp.block) * self.lp.second
        )  # rows of the block
        moves = p.act_up_s + p.act_down_s + p.act_disk_s
        away = self.lp.every_row((moves - p.act_disk_s / 2) * batch / self.lp.block)
        moved = {mode: p.load_s[mode] + p.read_s[mode] for mode in rows}
        on_device = {mode: self.dense_s + p.attention_s[mode] for mode in rows}
        fetched = [mode for mode in ("fetch", "disk") if mode in rows]
        one_load = batch * max((moved[mode] for mode in fetched), default=0.0)
        ways = [list(self.busy), self.lp.every_row(moves * self.lp.second)]
        loads = self._rows(moved, *fetched) if fetched else []
        if "gpu" in rows:
            loads += [*self._rows(on_device, "gpu"), (u, -batch * (p.attend_s + p.attention_s["gpu"]))]
            hidden = [[]]
        else:
            hidden = [[(self.experts, -1.0)], [(u, -one_load)]]
        if fetched:
            ways += [[*loads, *part, (u, batch * p.attend_s)] for part in hidden]
        if "cpu" in rows:
            others = [mode for mode in rows if mode != "cpu"]
            last = batch * max((p.attend_s + p.attention_s[mode] for mode in others), default=0.0)
            on_cpu = [*self._rows(p.cpu_s, "cpu"), (u, batch * (self.dense_s + p.store_s["cpu"]))]
            ways.append([*(self._rows(on_device, *others) if others else []), (u, -last), *on_cpu])
            if fetched:
                ways += [[*loads, *part, (u, -one_load), *on_cpu] for part in hidden]
        return [way + away for way in ways]

    def _late(self, lanes: dict[str, list]) -> list[list]:
        """Link seconds of the units that find no slot during the attention phases: those of all, less the slots'.

        One expert is computed after the last of them; the next layer's first KV comes over the same link meanwhile.
        """
        hw, gpu, arch = self.problem.hardware, self.problem.hardware.gpu, self.problem.arch
        units = self.lp.units
        in_slots = self.layers * units.prefix_bytes[-1] / len(units.order) * self.lp.second
        beside = [(self.experts, self.layers / arch.num_experts)]
        reads = lanes["disk_read"]
        if hw.device == "cpu":
            fastest = max(gpu.h2d_bytes_per_s, hw.disk_read_bytes_per_s)
            return [[*lanes["h2d"], *reads, (self.lp.slots, -in_slots / fastest), *beside]]
        rates = [(lanes["h2d"], gpu.h2d_bytes_per_s)]
        if self.lp.choice.disk_weights:
            rates.append((reads, hw.disk_read_bytes_per_s))
        return [[*terms, (self.lp.slots, -in_slots / rate), *beside] for terms, rate in rates]

    # Curves.

    def _largest(self, name: str, pieces: list[tuple[float, float]]):
        """A variable of at least the largest of (seconds of a nominal block, constant seconds)."""
        variable = self.lp.variable(f"{name}_{self.index}")
        for slope, constant in pieces:
            rows = self.lp.every_row(slope * self.lp.second / self.lp.block)
            self.lp.at_most_zero(*rows, (self.lp.u, constant * self.lp.second), (variable, -1.0))
        return variable

    def _expert_pieces(self) -> list[tuple[float, float]]:
        """A mean layer's experts, as `sweep._experts_s`; how many are touched is that of the nominal block."""
        arch, costs = self.problem.arch, self.costs
        curve = self.problem.hardware.gpu.experts[self.problem.number_bytes]
        tokens = self.phase.tokens * self.lp.block
        dense = len(arch.dense_layers) / arch.num_layers
        touched = max(1.0, costs.touched(tokens))
        dispatch = (1 - dense) * (arch.num_experts + _OPS_PER_LAYER) * costs.op_s
        if dense:
            elements = arch.expert_params_in(arch.dense_layers[0])
            dispatch += dense * (1 + _OPS_PER_LAYER) * costs.op_s
            slope, constant = max(curve.pieces(elements), key=lambda piece: piece[0] * tokens + piece[1])
            beside = dense * slope * tokens, dense * constant + dispatch
        else:
            beside = 0.0, dispatch
        return [
            ((1 - dense) * slope * tokens * arch.top_k + beside[0], (1 - dense) * touched * constant + beside[1])
            for slope, constant in curve.pieces(arch.expert_params)
        ]

    def _head_pieces(self) -> list[tuple[float, float]]:
        arch, op_s = self.problem.arch, self.costs.op_s
        curve = self.problem.hardware.gpu.experts[self.problem.number_bytes]
        chunks, logits = arch.num_head_chunks, self.phase.logits * self.lp.block
        return [
            (chunks * slope * logits, chunks * (constant + op_s) + 2 * op_s)
            for slope, constant in curve.pieces(arch.embed_params / chunks)
        ]


def _times(terms: Sequence, factor: float) -> list:
    return [(variable, value * factor) for variable, value in terms]


def _times_each(values: dict[str, float], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in values.items()}
