"""The linear programme: where everything lives and how many rows run, for one discrete choice, in one solution.

Tokens per second, G B / T, are a ratio of two linear functions of block size and placement. Charnes and Cooper (1962):
with every variable multiplied by u = T₀ / T the ratio becomes linear, so that the best block size comes with the best
placement. Rows and bytes enter as amounts, never as a share times a block. Letters are those of `lp_model`.

What a row costs is read off `job_phases`, `op_costs` and `memory_plan` (`linearize`); the bounds on a sweep are those of
`cost_model.timing.sweep_bounds` (`lp_sweep`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_model.memory.allocation import slot_bytes
from cost_model.model.weight_units import unit_slack_bytes
from cost_model.planner.constraints import Choice, Fixed
from cost_model.planner.lp_model import Model, Price, Terms
from cost_model.planner.lp_sweep import bound_sweep
from cost_model.timing.problem import Problem
from policies.common.memory_units import GIB
from policies.placement import TIERS

#: The tier that holds the KV of a row, by mode.
_HOMES = {"gpu": "gpu", "fetch": "cpu", "cpu": "cpu", "disk": "disk"}
#: One slot is filled while another is used.
_LEAST_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """The best that a choice can give if units, blocks and batches could be cut at will.

    Attributes:
        choice: what was taken as given.
        tokens_per_s: generated tokens per second.
        rows: of the block, by how they are attended (`sweep_load.MODES`).
        weight_bytes: by tier.
        slots: weight slots on the compute device.
        prices: of what binds, dearest first.
    """

    choice: Choice
    tokens_per_s: float
    rows: Mapping[str, float]
    weight_bytes: Mapping[str, float]
    slots: float
    prices: tuple[Price, ...]

    @property
    def block_size(self) -> float:
        """Rows in flight."""
        return sum(self.rows.values())


class Programme:
    """The linear programme of one choice.

    Args:
        problem, choice: what is planned, and what is taken as given.
        fixed: shares that the user has decided.
    """

    def __init__(self, problem: Problem, choice: Choice, fixed: Fixed):
        self.problem, self.choice, self.fixed = problem, choice, fixed
        self.model = Model(problem, choice, fixed.expert_order)
        self._normalize()
        self._place_weights()
        self._bound_slots()
        self._bound_rows()
        self._place_kv()
        self._bound_memory()
        for index in range(len(self.model.sweeps)):
            bound_sweep(self.model, index)

    def solve(self) -> Relaxed | None:
        """The optimum; None where nothing fits."""
        m = self.model
        if not m.solve():
            return None
        return Relaxed(
            choice=self.choice,
            tokens_per_s=m.tokens_per_s,
            rows={mode: m.amount(rows) * m.block for mode, rows in m.rows.items()},
            weight_bytes={tier: m.amount(weights) * GIB for tier, weights in m.weights.items()},
            slots=m.amount(m.slots),
            prices=m.prices(),
        )

    def _normalize(self) -> None:
        """(1) Σ N_i (u t_i / t₀) / N = 1, as T = Σ N_i t_i and u = T₀ / T.

        (2) Maximize G u B: tokens per second are G B / T = G (u B) / T₀.
        """
        m, phases = self.model, self.model.lines.phases
        sweeps = sum(phase.sweeps for phase in phases)
        m.equals_one([(variable, phase.sweeps / sweeps) for variable, phase in zip(m.sweeps, phases)])
        m.maximize(m.every_row(m.lines.tokens))

    def _place_weights(self) -> None:
        """(3) Σ w_τ = W: each weight has one home. (4) w_τ = share · W where the user has decided.

        (5) w_disk = 0 without disk weights; w_gpu ≥ W where nothing is streamed.
        """
        m, fixed = self.model, self.fixed
        all_gib = m.total_bytes / GIB
        m.is_zero([*((weights, 1.0) for weights in m.weights.values()), (m.u, -all_gib)])
        for tier, share in (("gpu", fixed.w_gpu_percent), ("cpu", fixed.w_cpu_percent)):
            if share is not None:
                m.is_zero([(m.weights[tier], 1), (m.u, -share / 100 * all_gib)])
        if not self.choice.disk_weights:
            m.at_most_zero([(m.weights["disk"], 1)])
        if not self.choice.streams:
            m.at_most_zero([(m.weights["gpu"], -1), (m.u, all_gib)])

    def _bound_slots(self) -> None:
        """(6) 2 ≤ k ≤ units, at least 2; k as the user has decided; k = 0 where nothing is streamed."""
        m, given = self.model, self.fixed.weight_slots
        if not self.choice.streams:
            m.at_most_zero([(m.slots, 1)])
        elif given is not None:
            m.is_zero([(m.slots, 1), (m.u, -given)])
        else:
            m.at_most_zero([(m.slots, -1), (m.u, _LEAST_SLOTS)])
            m.at_most_zero([(m.slots, 1), (m.u, -max(_LEAST_SLOTS, len(m.units.order)))])

    def _bound_rows(self) -> None:
        """(7) 1 ≤ B ≤ the most rows of the choice; B = batches · rows per batch where the user has decided the batches."""
        m, batches = self.model, self.fixed.num_gpu_batches
        m.at_most_zero([*m.every_row(-1.0), (m.u, 1)])
        if self.choice.most_rows is not None:
            m.at_most_zero([*m.every_row(1.0), (m.u, -self.choice.most_rows)])
        if batches is not None:
            m.is_zero([*m.every_row(1.0), (m.u, -batches * self.choice.gpu_batch_size)])

    def _place_kv(self) -> None:
        """(8) Σ x_m over the modes at home in τ = share · B. (9) x_cpu = a (x_cpu + x_fetch), a attended on the CPU."""
        m, fixed = self.model, self.fixed
        for tier, share in (("gpu", fixed.cache_gpu_percent), ("cpu", fixed.cache_cpu_percent)):
            if share is not None:
                m.is_zero(m.rows_by_mode({mode: (_HOMES[mode] == tier) - share / 100 for mode in m.rows}))
        if fixed.cpu_attention_percent is not None:
            a = fixed.cpu_attention_percent / 100
            m.is_zero(m.rows_by_mode({mode: {"cpu": 1 - a, "fetch": -a}.get(mode, 0.0) for mode in m.rows}))

    def _bound_memory(self) -> None:
        """(10) Σ bytes of a budget's tiers ≤ budget: KV and the rest per row, weights as computed with, k b of slots.

        Two half-blocks hold a layer in slots of their own, the streamed weights over the layers.

        (11) The workspace is the largest of its buffers, each a line in B; the gathered KV the largest over the modes.
        """
        m = self.model
        used = {tier: [*self._row_bytes(tier), *self._weight_bytes(tier)] for tier in TIERS}
        if self.choice.streams:
            used["gpu"].append((m.slots, slot_bytes(self.problem.arch, m.units.place(0, 0)) / GIB))
            if self.choice.half_blocks > 1:
                held = 1 / self.problem.arch.num_layers
                used["gpu"] += [(m.weights[tier], held) for tier in ("cpu", "disk")]
        workspace = [(m.every_row(line.per_row / GIB), line) for line in m.lines.workspace]
        gathered = [(self._rows_of(mode, line.per_row), line) for mode, line in m.lines.gathered.items()]
        for name, lines in (("workspace", workspace), ("gathered", gathered)):
            largest = m.largest(name, ([*rows, (m.u, line.fixed / GIB)] for rows, line in lines))
            used["gpu"].append((largest, 1.0))
        for name, budget in self.problem.hardware.budgets().items():
            if budget is not None:
                terms = [term for tier in name.split("+") for term in used[tier]]
                m.at_most_zero([*terms, (m.u, -budget / GIB)], name=f"{name} memory", is_memory=True)

    def _weight_bytes(self, tier: str) -> Terms:
        """Of each weight byte at home in the tier: as stored, with the slack of its unit; on the device as computed with."""
        m, arch = self.model, self.problem.arch
        slack = 1 + unit_slack_bytes(arch) * len(m.units.order) / m.total_bytes
        on_device = slack * arch.computed_bytes(m.total_bytes, self.problem.dtype_bytes) / m.total_bytes
        return [(m.weights[tier], {"gpu": on_device, "cpu": slack, "disk": 1.0}[tier])]

    def _row_bytes(self, tier: str) -> Terms:
        """Of the rows: what is common to all modes, and KV by mode; fetched KV and that from disk share a staging buffer."""
        m, kv = self.model, self.model.lines.kv
        common = m.lines.common[tier]
        own = sum(kv[mode][tier].fixed for mode in ("gpu", "cpu") if mode in kv)
        staging = max((kv[mode][tier].fixed for mode in ("fetch", "disk") if mode in kv), default=0.0)
        terms = [(m.u, (common.fixed + own + staging) / GIB), *m.every_row(common.per_row / GIB)]
        return terms + [term for mode in kv for term in self._rows_of(mode, kv[mode][tier].per_row)]

    def _rows_of(self, mode: str, nbytes: float) -> Terms:
        return [(self.model.rows[mode], nbytes * self.model.block / GIB)]
