"""The bounds of `cost_model.timing.sweep_bounds` on the seconds of a sweep, as constraints of the linear programme.

A thread's seconds and a shared resource's are linear in rows and bytes. The curves of the linear operations enter as the
straight pieces below them (`GemmRates.pieces`), the pipeline of an attention phase as the longest ways through it. Where
a bound is not convex, the programme has a lower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cost_model.timing.contention import USERS, Resources
from cost_model.timing.sweep_bounds import THREADS, beside_shares
from policies.common.units import GIB

if TYPE_CHECKING:
    from cost_model.planner.lp import Programme


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
        self.computed = [*programme.every_row(phase.outside_s * programme.second), (head, 1.0)]
        self.host = [
            *programme.every_row(phase.host_s * programme.second),
            (programme.u, self.costs.host_s(0) * programme.second),
        ]
        self.outside = [*self.computed, *self.host]

    def bound(self) -> None:
        """Adds all constraints."""
        busy = self._busy()
        if not self.lp.choice.overlap:
            self._at_most("serial", [term for terms in busy.values() for term in terms])
            return
        for name, users in THREADS.items():
            self._at_most(name, [term for user in users for term in busy.get(user, ())])
        for name, terms in self._resources(busy):
            self._at_most(name, terms)
        ways, beside = self._ways(), self._beside(busy)
        for way in ways:
            self._at_most("schedule", [*_times(way, self.layers), *self.outside, (self.experts, self.layers), *beside])
        for link, ahead in self._streams(busy) if self.lp.choice.streams else ():
            for way in ways:
                idle = [*way, *ahead]
                self._at_most("slots", [*link, *idle, *self.outside])
                self._at_most("slots", [*link, *_times(idle, self.layers), *self.outside])

    def _at_most(self, name: str, terms: Sequence) -> None:
        self.lp.at_most_zero(*terms, self.t, name=name)

    def _rows(self, seconds: dict[str, float], *modes: str) -> list:
        """Seconds of the rows in these modes (default all), by mode."""
        return _times(self.lp.rows_by_mode(seconds, *modes), self.lp.second)

    def _busy(self) -> dict[str, list]:
        """Busy seconds by user of `cost_model.timing.contention`, as `sweep.sweep_time` adds them up."""
        p, hw, layers = self.phase, self.problem.hardware, self.layers
        from_disk = self._streamed("disk")
        up = self._streamed("cpu") + (from_disk if hw.device == "cuda" else [])
        by_mode = {
            "cpu": p.cpu_s,
            "h2d/kv": p.load_s,
            "h2d/attended": p.attended_s,
            "d2h": p.store_s,
            "disk_read/kv": p.read_s,
            "disk_write": p.write_s,
        }
        return {
            "gpu": [*_times(self.busy, layers), (self.experts, layers), *self.computed],
            "host": self.host,
            "h2d": _times(up, 1 / hw.gpu.h2d_bytes_per_s),
            "disk_read": _times(from_disk, 1 / hw.disk_read_bytes_per_s),
            **{user: _times(self._rows(seconds), layers) for user, seconds in by_mode.items()},
            **{user: self.lp.every_row(s * self.lp.second * layers) for user, s in p.act_s.items()},
        }

    def _streamed(self, tier: str) -> list:
        """Bytes of a tier's weights that a sweep needs; the embedding, which stays where it is, is a part of every tier."""
        units = self.lp.units
        embed = units.bytes_between(0, len(units.order), "embed") / self.lp.total_bytes
        return [(self.lp.weights[tier], (1 - embed) * GIB * self.lp.second)]

    def _resources(self, busy: dict[str, list]) -> list[tuple[str, list]]:
        """Seconds of each resource that is shared, with the weights that `Resources` gives each user."""
        resources = Resources(self.costs)
        alone = {user: resources.seconds({user: 1.0}) for user in USERS if user in busy}
        used: dict[str, dict[str, float]] = {}
        for user, seconds in alone.items():
            for name, weight in seconds.items():
                used.setdefault(name, {})[user] = weight
        link = used.pop("pcie", None)
        found = [(name, _weighted(busy, weights)) for name, weights in used.items()]
        if link:  # while both directions run, each is slower
            up, down = (
                _weighted(busy, {user: weight for user, weight in link.items() if user.startswith(way)})
                for way in ("h2d", "d2h")
            )
            slower = min(1.0, resources.seconds({"h2d": 1.0, "d2h/act": 1.0})["pcie"] - 1)  # beyond 1: not convex
            found += [("pcie", up + _times(down, slower)), ("pcie", down + _times(up, slower))]
        return found

    def _beside(self, busy: dict[str, list]) -> list:
        """Seconds that copies and readers take from the cores that compute on device cpu (`SweepForm`)."""
        if self.problem.hardware.device != "cpu":
            return []
        shares = beside_shares(Resources(self.costs))
        return _weighted(busy, {user: share for user, share in shares.items() if user in busy})

    def _streams(self, busy: dict[str, list]) -> list[tuple[list, list]]:
        """Of each link of the weight stream, (its seconds, less those of what may come before a slot is freed)."""
        hw, units, lp = self.problem.hardware, self.lp.units, self.lp
        unit = units.prefix_bytes[-1] / len(units.order) * lp.second
        rates = {"h2d": hw.gpu.h2d_bytes_per_s, "disk_read": hw.disk_read_bytes_per_s}
        used = [user for user in rates if user == "h2d" or lp.choice.disk_weights]
        staged = {"h2d": 0, "disk_read": self.costs.allocation.staging_slots}
        if hw.device == "cuda":
            return [
                (busy[user], [(lp.slots, -unit / rates[user]), (lp.u, -staged[user] * unit / rates[user])])
                for user in used
            ]
        each = unit / max(rates.values())
        links = [busy[user] for user in used]
        if len(used) > 1:  # few slots hold units of either host memory or disk, and one link rests
            held = [(lp.slots, -2 * self.layers * each), (lp.u, 2 * self.layers * each)]
            links.append([*busy["h2d"], *busy["disk_read"], *held])
        return [(link, [(lp.slots, -each)]) for link in links]

    def _ways(self) -> list[list]:
        """Ways through the attention phase of a layer (`AttentionPhase.seconds`), in seconds."""
        p, second = self.phase, self.lp.second
        batch = min(
            self.lp.choice.gpu_batch_size / max(p.rows, 1e-9), self.lp.block
        )  # rows of the block in a GPU batch
        ways = [
            [*self.busy, *self.lp.every_row(p.act_up_s * second)],
            self.lp.every_row((p.act_up_s + p.act_down_s) * second),
        ]
        return ways + (self._ways_of_one_batch() if batch >= self.lp.block else self._ways_of_many(batch))

    def _moved(self) -> dict[str, float]:
        """Seconds per row that KV takes to the device."""
        return {mode: self.phase.load_s[mode] + self.phase.read_s[mode] for mode in self.lp.rows}

    def _ways_of_one_batch(self) -> list[list]:
        """All rows are projected, then attended when the KV is there and the CPU is done; the KV comes during the experts."""
        p, second = self.phase, self.lp.second
        after = {mode: p.attend_s + (0.0 if mode == "cpu" else p.attention_s[mode]) for mode in self.lp.rows}
        loads = [*self._rows(self._moved(), "fetch", "disk"), *self._rows(after), (self.experts, -1.0)]
        on_cpu = self._rows({"cpu": p.cpu_s["cpu"] + p.store_s["cpu"] + p.attended_s["cpu"]}, "cpu")
        return [loads, [*self.lp.every_row(p.project_s * second), *on_cpu, *self._rows(after)]]

    def _ways_of_many(self, batch: float) -> list[list]:
        """GPU batches of ``batch`` rows line up by mode: device, fetched, disk, CPU.

        Each is projected, and what it needs requested, before the batch in front of it is attended: so the first fetch
        waits for all of the device's batches but the last, and CPU attention for all fetches but the last. Of what comes
        first a part hides behind the experts before it.
        """
        p, rows, u = self.phase, self.lp.rows, self.lp.u
        batch *= self.lp.second
        moved = self._moved()
        on_device = {mode: self.dense_s + p.attention_s[mode] for mode in rows}
        fetched = [mode for mode in ("fetch", "disk") if mode in rows]
        one_load = batch * max((moved[mode] for mode in fetched), default=0.0)
        loads = self._rows(moved, "fetch", "disk")
        late_loads = [[*loads, (u, -one_load)]]
        if "gpu" in rows:
            last = batch * (p.attend_s + p.attention_s["gpu"])
            late_loads.append([*loads, *self._rows(on_device, "gpu"), (u, -last)])
        else:
            late_loads.append([*loads, (self.experts, -1.0)])
        ways = [[*each, (u, batch * p.attend_s)] for each in late_loads] if fetched else []
        if "cpu" in rows:
            others = [mode for mode in rows if mode != "cpu"]
            last = batch * max((p.attend_s + p.attention_s[mode] for mode in others), default=0.0)
            on_cpu = [*self._rows(p.cpu_s, "cpu"), (u, batch * (self.dense_s + p.store_s["cpu"] + p.attended_s["cpu"]))]
            ways.append(on_cpu)
            if others:
                ways.append([*self._rows(on_device, *others), (u, -last), *on_cpu])
            if fetched:
                ways += [[*each, (u, -one_load), *on_cpu] for each in late_loads]
        return ways

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
        tokens = self.phase.tokens * self.lp.block
        dense = len(arch.dense_layers) / arch.num_layers
        touched = max(1.0, costs.touched(tokens))
        dispatch = (1 - dense) * (arch.expert_units + 1) * costs.op_s
        if dense:
            dispatch += dense * 2 * costs.op_s
            curve = self.problem.hardware.gpu.experts[self.problem.dtype_bytes]
            slope, constant = max(curve.pieces(arch.dense_params), key=lambda piece: piece[0] * tokens + piece[1])
            beside = dense * slope * tokens, dense * constant + dispatch
        else:
            beside = 0.0, dispatch
        return [
            ((1 - dense) * slope * tokens * arch.top_k + beside[0], (1 - dense) * touched * constant + beside[1])
            for slope, constant in costs.unit_rates(tokens).pieces(arch.expert_params)
        ]

    def _head_pieces(self) -> list[tuple[float, float]]:
        arch, op_s = self.problem.arch, self.costs.op_s
        curve = self.problem.hardware.gpu.experts[self.problem.dtype_bytes]
        chunks, logits = arch.num_head_chunks, self.phase.logits * self.lp.block
        return [
            (chunks * slope * logits, chunks * (constant + op_s) + 2 * op_s)
            for slope, constant in curve.pieces(arch.embed_params / chunks)
        ]


def _times(terms: Sequence, factor: float) -> list:
    return [(variable, value * factor) for variable, value in terms]


def _weighted(busy: dict[str, list], weights: dict[str, float]) -> list:
    return [term for user, weight in weights.items() if weight for term in _times(busy[user], weight)]
