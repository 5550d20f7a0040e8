"""The bounds of `cost_model.timing.sweep_bounds` on the seconds of a sweep, as constraints of the linear programme.

A thread's seconds and a shared resource's are linear in rows and bytes. The curves of the linear operations enter as the
straight pieces below them (`GemmRates.pieces`), the pipeline of an attention phase as the longest paths through it
(`_Paths`). Where a bound is not convex, the programme has a lower one. Letters are those of `lp_model`; t is t_i
of the sweep that is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pulp import LpVariable

from cost_model.model.weight_units import expert_units
from cost_model.planner.linearize import Line, PhaseSlopes
from cost_model.planner.lp_model import Model, Term, Terms, times
from cost_model.timing.contention import USERS, Resources
from cost_model.timing.sweep_bounds import THREADS, beside_shares
from policies.common.memory_units import GIB

#: Busy seconds by user of `cost_model.timing.contention`.
_Busy = Mapping[str, Terms]


def bound_sweep(model: Model, index: int) -> None:
    """Adds what sweep number ``index`` of the programme's phases takes at least."""
    _Sweep(model, index).bound()


class _Sweep:
    """One kind of sweep. Factors are in the programme's unit of time (`Model.per_s`)."""

    def __init__(self, model: Model, index: int):
        self.lp, self.phase, self.index = model, model.lines.phases[index], index
        self.t: Term = (model.sweeps[index], -1.0)
        self.problem, self.costs = model.problem, model.lines.costs
        self.layers = self.problem.arch.num_layers
        self.experts: Term = (self._largest("experts", self.phase.experts_s), 1.0)
        head: Term = (self._largest("head", self.phase.head_s), 1.0)
        self.computed = [*model.every_row(self.phase.outside_s * model.per_s), head]
        host_s = self.costs.host_s(0)
        self.host = [*model.every_row(self.phase.host_s * model.per_s), (model.u, host_s * model.per_s)]
        self.outside = [*self.computed, *self.host]

    def bound(self) -> None:
        """Adds all constraints.

        (12) Without overlap t ≥ Σ of all users' seconds. With it, t is at least
        (13) the seconds of each thread, Σ over its users,
        (14) those of each shared resource, Σ weight · user's seconds,
        (16) the chain of operations, layers · (path + experts) + what is outside the layers, for each attention path; of two
             half-blocks, that of one of them, as the other one marches beside it,
        (17) and each link with the time that it stands still (`_bound_slots`).
        """
        busy = self._busy()
        if not self.lp.choice.overlap:
            self._at_most("serial", [term for terms in busy.values() for term in terms])
            return
        for name, users in THREADS.items():
            self._at_most(name, [term for user in users for term in busy.get(user, ())])
        for name, terms in self._resources(busy):
            self._at_most(name, terms)
        paths, beside = _Paths(self.lp, self.phase, self.experts).all(), self._beside(busy)
        layers = self.layers / self.lp.choice.half_blocks
        for path in paths:
            self._at_most("schedule", [*times([*path, self.experts], layers), *self.outside, *beside])
        if self.lp.choice.streams:
            for path in paths if self.lp.choice.half_blocks == 1 else [self._of_a_batch()]:
                self._bound_slots(path, busy)

    def _bound_slots(self, path: Terms, busy: _Busy) -> None:
        """(17) t ≥ link + layers · idle + outside, and the same with idle of one layer only.

        While a layer attends no slot is freed: a link fills the k that are free, and rests for idle = path - k b / rate.
        Where that is negative, only one layer counts.
        """
        for link, ahead in self._links(busy):
            idle = [*path, *ahead]
            self._at_most("slots", [*link, *idle, *self.outside])
            self._at_most("slots", [*link, *times(idle, self.layers), *self.outside])

    def _of_a_batch(self) -> Terms:
        """Attention of one GPU batch, and a unit of experts: all that two half-blocks do while no slot is freed."""
        rows = self.lp.choice.gpu_batch_size / max(self.phase.rows, 1e-9)
        dense_s = rows * (self.phase.project_s + self.phase.attend_s) * self.lp.per_s
        return [(self.lp.u, dense_s), (self.experts[0], 1 / expert_units(self.problem.arch))]

    def _largest(self, name: str, lines: Iterable[Line]) -> LpVariable:
        """(18) y ≥ slope · B + constant for each straight piece below a convex curve of seconds."""
        lp, per_s = self.lp, self.lp.per_s
        pieces = ([*lp.every_row(line.per_row * per_s), (lp.u, line.fixed * per_s)] for line in lines)
        return lp.largest(f"{name}_{self.index}", pieces)

    def _at_most(self, name: str, terms: Terms) -> None:
        """The seconds of the terms are at most t."""
        self.lp.at_most_zero([*terms, self.t], name=name)

    def _busy(self) -> _Busy:
        """Busy seconds by user, as `sweep_bounds.sweep_time` adds them up: those of a layer times the layers."""
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
        on_device = self.lp.rows_s(p.device_s)
        return {
            "gpu": [*times([*on_device, self.experts], layers), *self.computed],
            "host": self.host,
            "h2d": times(up, 1 / self.costs.stream_bytes_per_s["h2d"]),
            "disk_read": times(from_disk, 1 / self.costs.stream_bytes_per_s["disk_read"]),
            "stage": times(
                self._streamed("cpu"), 1 / self.costs.stream_bytes_per_s["h2d"] * self.costs.stages_host_units
            ),
            **{user: times(self.lp.rows_s(seconds), layers) for user, seconds in by_mode.items()},
            **{user: self.lp.every_row(s * self.lp.per_s * layers) for user, s in p.act_s.items()},
        }

    def _streamed(self, tier: str) -> Terms:
        """Bytes of a tier's weights that a sweep needs; the embedding, which stays where it is, is a part of every tier."""
        units = self.lp.units
        embed = units.bytes_between(0, len(units.order), "embed") / self.lp.total_bytes
        return [(self.lp.weights[tier], (1 - embed) * GIB * self.lp.per_s)]

    def _resources(self, busy: _Busy) -> list[tuple[str, Terms]]:
        """(14) Seconds of each shared resource, with the weights that `Resources` gives each user.

        (15) The link is slower by σ while both directions run: max(up + σ down, down + σ up). Beyond σ = 1 that is not convex.
        """
        resources = Resources(self.costs)
        used: dict[str, dict[str, float]] = {}
        for user in (user for user in USERS if user in busy):
            for name, weight in resources.seconds({user: 1.0}).items():
                used.setdefault(name, {})[user] = weight
        link = used.pop("pcie", None)
        found = [(name, _weighted(busy, weights)) for name, weights in used.items()]
        if link:
            up, down = (
                _weighted(busy, {user: weight for user, weight in link.items() if user.startswith(direction)})
                for direction in ("h2d", "d2h")
            )
            slower = min(1.0, resources.seconds({"h2d": 1.0, "d2h/act": 1.0})["pcie"] - 1)
            found += [("pcie", up + times(down, slower)), ("pcie", down + times(up, slower))]
        return found

    def _beside(self, busy: _Busy) -> Terms:
        """Seconds that copies and readers take from the cores that compute on device cpu (`SweepForm`)."""
        if self.problem.hardware.device != "cpu":
            return []
        shares = beside_shares(Resources(self.costs))
        return _weighted(busy, {user: share for user, share in shares.items() if user in busy})

    def _links(self, busy: _Busy) -> list[tuple[Terms, Terms]]:
        """Of each link of the weight stream, (its seconds, less those of what may come before a slot is freed: - k b / rate)."""
        hw, units, lp = self.problem.hardware, self.lp.units, self.lp
        unit = units.prefix_bytes[-1] / len(units.order) * lp.per_s
        rates = self.costs.stream_bytes_per_s
        used = [user for user in rates if user == "h2d" or lp.choice.disk_weights]
        if hw.device == "cuda":
            staged = {"h2d": 0, "disk_read": self.costs.allocation.staging_slots}
            unit_s = {user: unit / rates[user] for user in used}
            return [(busy[user], [(lp.slots, -unit_s[user]), (lp.u, -staged[user] * unit_s[user])]) for user in used]
        each = unit / max(rates.values())
        links = [busy[user] for user in used]
        if len(used) > 1:  # few slots hold units of either host memory or disk, and one link rests
            held = [(lp.slots, -2 * self.layers * each), (lp.u, 2 * self.layers * each)]
            links.append([*busy["h2d"], *busy["disk_read"], *held])
        return [(link, [(lp.slots, -each)]) for link in links]


class _Paths:
    """The longest paths through the attention phase of a layer (`AttentionPhase.seconds`), in seconds."""

    def __init__(self, lp: Model, phase: PhaseSlopes, experts: Term):
        self.lp, self.phase, self.experts_late = lp, phase, (experts[0], -1.0)
        self.moved = {mode: phase.load_s[mode] + phase.read_s[mode] for mode in lp.rows}
        self.fetched = [mode for mode in ("fetch", "disk") if mode in lp.rows]

    def all(self) -> list[Terms]:
        """(19) The device computes, after the hidden states are up; (20) one thread brings them up and down; and the rest."""
        p, lp = self.phase, self.lp
        rows = min(lp.choice.gpu_batch_size / max(p.rows, 1e-9), lp.block)  # rows of the block in a GPU batch
        computed = [*lp.rows_s(p.device_s), *lp.every_row(p.act_up_s * lp.per_s)]
        hidden = lp.every_row((p.act_up_s + p.act_down_s) * lp.per_s)
        return [computed, hidden, *(self._of_one_batch() if rows >= lp.block else self._of_many(rows))]

    def _of_one_batch(self) -> list[Terms]:
        """All rows are projected, then attended when the KV is there and the CPU is done.

        (21) KV, which comes during the experts before, then attention: moved - experts + after.
        (22) Projection, the CPU's queries, attention and results, then what is left on the device.
        """
        p, lp = self.phase, self.lp
        after = {mode: p.attend_s + (0.0 if mode == "cpu" else p.attention_s[mode]) for mode in lp.rows}
        loads = [*lp.rows_s(self.moved, *self.fetched)] if self.fetched else []
        on_cpu = lp.rows_s({"cpu": p.cpu_s["cpu"] + p.store_s["cpu"] + p.attended_s["cpu"]}, "cpu")
        return [
            [*loads, *lp.rows_s(after), self.experts_late],
            [*lp.every_row(p.project_s * lp.per_s), *on_cpu, *lp.rows_s(after)],
        ]

    def _of_many(self, rows: float) -> list[Terms]:
        """GPU batches of so many rows line up by mode: device, fetched, disk, CPU.

        Each is projected, and what it needs requested, before the batch in front of it is attended: so the first fetch
        waits for all of the device's batches but the last, and CPU attention for all fetches but the last.

        (23) All loads late, then the last batch attended. (24) The first projected and sent down, all CPU attention, its
        results up; (25) the same after the other batches on the device; (26) the same after all loads but the last, where they
        do not come beside the other half-block.
        """
        p, lp, batch_s = self.phase, self.lp, rows * self.lp.per_s
        late_loads = self._late_loads(batch_s) if self.fetched else []
        paths = [[*late, (lp.u, batch_s * p.attend_s)] for late in late_loads]
        if "cpu" not in lp.rows:
            return paths
        others = [mode for mode in lp.rows if mode != "cpu"]
        last = max((p.attend_s + p.attention_s[mode] for mode in others), default=0.0)
        first_s = p.project_s + p.attend_s + p.store_s["cpu"] + p.attended_s["cpu"]
        on_cpu = [*lp.rows_s(p.cpu_s, "cpu"), (lp.u, batch_s * first_s)]
        paths.append(on_cpu)
        if others:
            paths.append([*lp.rows_s(p.device_s, *others), (lp.u, -batch_s * last), *on_cpu])
        if lp.choice.half_blocks > 1:
            return paths
        last_load: Term = (lp.u, -batch_s * self._one_load_s())
        return paths + [[*late, last_load, *on_cpu] for late in late_loads]

    def _late_loads(self, batch_s: float) -> list[Terms]:
        """Paths to the end of all loads: the first one long before, or after the device's own batches or the experts."""
        p, lp = self.phase, self.lp
        loads = lp.rows_s(self.moved, *self.fetched)
        ahead: Terms = [*loads, (lp.u, -batch_s * self._one_load_s())]
        if "gpu" not in lp.rows:
            return [ahead, [*loads, self.experts_late]]
        last = batch_s * (p.attend_s + p.attention_s["gpu"])
        return [ahead, [*loads, *lp.rows_s(p.device_s, "gpu"), (lp.u, -last)]]

    def _one_load_s(self) -> float:
        """Per row of a batch, of the mode in which it takes longest."""
        return max((self.moved[mode] for mode in self.fetched), default=0.0)


def _weighted(busy: _Busy, weights: Mapping[str, float]) -> Terms:
    return [term for user, weight in weights.items() if weight for term in times(busy[user], weight)]
