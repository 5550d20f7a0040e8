"""What one more row costs: the equations of `job_phases`, `op_costs` and `plan_memory` as straight lines around a nominal block.

For one discrete choice all that a sweep takes is nearly linear in the rows of each mode. The lines are read off the
equations themselves, at a nominal block size, so that the programme follows them when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.model.weight_units import expert_units, head_chunks
from cost_model.planner.constraints import Choice
from cost_model.timing.attention_phase import DOWN, UP, hidden_states_s
from cost_model.timing.job_phases import job_phases
from cost_model.timing.problem import Problem
from cost_model.timing.sweep_load import MODES, BatchLoad, RowGroup
from policies.placement import TIERS
from policies.schedule import in_first_half

_PRICED_APART = ("weights", "slots", "workspace")
#: Where the workspace is met, in nominal blocks: it is the largest of several buffers.
_POINTS = (0.25, 0.5, 1, 2, 4)
#: Operations that the main thread hands to others with a GPU batch's projection, by mode (`cost_model.timing.attention_phase`).
_HANDED_ON = {"gpu": 0, "fetch": 2, "disk": 3, "cpu": 2}
_FEW_BATCHES = 3
#: Of a block's rows, those that the first half-block has at most: of three GPU batches two.
_MOST_IN_FIRST = in_first_half(3) / 3


@dataclass(frozen=True, slots=True)
class Line:
    """``fixed`` + ``per_row`` · rows."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, x0: float, y0: float, x1: float, y1: float) -> Line:
        """Through two points; through the origin and the second one where both are the same."""
        slope = y1 / x1 if x0 == x1 else (y1 - y0) / (x1 - x0)
        return cls(y1 - slope * x1, slope)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSlopes:
    """One kind of sweep; per row of the block, of whatever age, and in seconds of one layer where it is seconds.

    Attributes:
        sweeps: how many of them the job, or the period, has.
        rows: rows that take part.
        tokens, logits: tokens that advance; rows that get a token.
        outside_s: embedding and sampling, of the sweep.
        host_s: bookkeeping of the sweep, at least.
        project_s, attend_s: dense parts before and after attention in any mode, dispatch included.
        experts_s: of a mean layer with all its experts; the largest of these lines. How many are touched is that of the
            nominal block.
        head_s: of the sweep; the largest of these lines.
        attention_s: attention on the device and dispatch of what goes with it; like the next ones by mode (`MODES`).
        cpu_s, attended_s: CPU attention, and its results up.
        load_s, read_s, store_s, write_s: KV up, from disk, down, to disk.
        act_s: hidden states of the batches that live elsewhere, by user of `cost_model.timing.contention`.
    """

    sweeps: float
    rows: float
    tokens: float
    logits: float
    outside_s: float
    host_s: float
    project_s: float
    attend_s: float
    experts_s: tuple[Line, ...]
    head_s: tuple[Line, ...]
    attention_s: Mapping[str, float]
    cpu_s: Mapping[str, float]
    attended_s: Mapping[str, float]
    load_s: Mapping[str, float]
    read_s: Mapping[str, float]
    store_s: Mapping[str, float]
    write_s: Mapping[str, float]
    act_s: Mapping[str, float]

    @property
    def device_s(self) -> dict[str, float]:
        """The compute device's part of attention, by mode; that of rows attended on the CPU is the dense part alone."""
        dense_s = self.project_s + self.attend_s
        return {mode: dense_s + (0.0 if mode == "cpu" else s) for mode, s in self.attention_s.items()}

    @property
    def act_up_s(self) -> float:
        """Hidden states on their way to the device."""
        return sum(self.act_s[user] for user in UP)

    @property
    def act_down_s(self) -> float:
        """Hidden states on their way home."""
        return sum(self.act_s[user] for user in DOWN)


class Slopes:
    """All lines of a choice.

    Attributes:
        rows: the nominal block size that was met.
        costs: of the nominal policy.
        tokens: generated per row of the block, in the job or the period.
        phases: its sweeps.
        common: bytes by tier without weights, slots and workspace, whatever the modes.
        kv: bytes by mode and tier.
        gathered: device bytes of KV gathered for attention, by mode; the largest one counts.
        workspace: device bytes; the largest allocation.
    """

    def __init__(self, problem: Problem, choice: Choice):
        # The capacity follows from the block here; a given one limits the rows instead.
        self.problem, self.choice = replace(problem, kv_tokens=None), choice
        problem = self.problem
        policy = choice.policy(problem.workload, choice.rows, "gpu")
        allocation = problem.allocate(policy)
        self.rows = policy.block_size
        self.costs = problem.costs(policy, allocation)
        timeline = job_phases(policy, allocation, problem.workload)
        self.tokens = timeline.tokens / self.rows
        self.phases = [
            self._phase(p.sweeps, p.load.seen(problem.arch).groups["gpu"], p.load.logits)
            for p in timeline.phases
            if p.sweeps > 0
        ]
        self._read_bytes()

    def _phase(self, sweeps: float, group: RowGroup, logits: float) -> PhaseSlopes:
        costs, rows = self.costs, self.rows
        project_s, attend_s = self._dense(group)
        batches = max(1.0, group.rows / self.choice.gpu_batch_size)
        cut = {mode: self._batch_of(group, batches, mode) for mode in MODES}
        hidden = BatchLoad(tokens=group.tokens / batches)
        away, _ = self._away()

        def by_mode(seconds: Callable[[BatchLoad], float]) -> dict[str, float]:
            return {mode: seconds(batch) * batches / rows for mode, batch in cut.items()}

        op_s = costs.op_s * batches / rows
        attention_s, loads_s, attended_s = map(by_mode, (costs.attend_s, costs.load_kv_s, costs.attended_s))
        return PhaseSlopes(
            sweeps=sweeps,
            rows=group.rows / rows,
            tokens=group.tokens / rows,
            logits=logits / rows,
            outside_s=batches * costs.embed_s(hidden) / rows + op_s + costs.sample_s(logits) / rows,
            host_s=(costs.host_s(group.rows) - costs.host_s(0) - self._booked_s(group.rows)) / rows,
            project_s=project_s / rows + (1 + away) * op_s,
            attend_s=attend_s / rows + (1 + away) * op_s,
            experts_s=self._experts(group.tokens),
            head_s=self._head(logits, group.prompt_tokens),
            attention_s={mode: attention_s[mode] + count * op_s for mode, count in _HANDED_ON.items()},
            cpu_s=by_mode(costs.cpu_attend_s),
            attended_s=attended_s,
            load_s={mode: loads_s[mode] - attended_s[mode] for mode in cut},
            read_s=by_mode(costs.read_kv_s),
            store_s=by_mode(costs.store_kv_s),
            write_s=by_mode(costs.write_kv_s),
            act_s={user: seconds * batches / rows for user, seconds in self._hidden_states(hidden).items()},
        )

    def _booked_s(self, rows: float) -> float:
        """What the host does beside the device for the rows of the first of two half-blocks, at most."""
        return self.costs.booked_s(_MOST_IN_FIRST * rows) if self.choice.half_blocks > 1 else 0.0

    def _experts(self, tokens: float) -> tuple[Line, ...]:
        """The pieces below the curve of an expert, times the experts touched; dense layers by the piece that decides. Two
        half-blocks compute each of them twice, over half of the tokens."""
        arch, costs, halves = self.problem.arch, self.costs, self.choice.half_blocks
        tokens /= halves
        dense = len(arch.dense_layers) / arch.num_layers
        sparse, touched = 1 - dense, max(1.0, costs.touched(tokens))
        beside_slope, beside_s = 0.0, sparse * (expert_units(arch) + 1) * costs.op_s
        if dense:
            pieces = self._expert_curve.pieces(arch.dense_params)
            slope, constant = max(pieces, key=lambda piece: piece[0] * tokens + piece[1])
            constant += costs.unpack_s("dense", arch.dense_params)
            beside_slope, beside_s = dense * slope, beside_s + dense * (constant + 2 * costs.op_s)
        per_row, unpacked_s = tokens / self.rows, costs.unpack_s("expert", arch.expert_params)
        return tuple(
            Line(
                halves * (sparse * touched * (constant + unpacked_s) + beside_s),
                halves * (sparse * slope * arch.top_k + beside_slope) * per_row,
            )
            for slope, constant in costs.unit_rates(tokens).pieces(arch.expert_params)
        )

    def _head(self, logits: float, prompt_tokens: float) -> tuple[Line, ...]:
        """The pieces below the curve of a chunk, times the chunks, with the operations before and after them, and what prompts
        take that are scored."""
        arch, op_s = self.problem.arch, self.costs.op_s
        chunks = head_chunks(arch)
        elements = arch.embed_params / chunks
        scored_s = self.costs.head_s(0.0, elements, prompt_tokens)
        return tuple(
            Line(chunks * (constant + op_s) + 2 * op_s, chunks * (slope * logits + scored_s) / self.rows)
            for slope, constant in self._expert_curve.pieces(elements)
        )

    @property
    def _expert_curve(self) -> GemmRates:
        return self.problem.hardware.gpu.experts[self.problem.dtype_bytes]

    def _hidden_states(self, batch: BatchLoad) -> dict[str, float]:
        """Seconds that those of a mean GPU batch take, by user of `cost_model.timing.contention`."""
        away, on_disk = self._away()
        parts = {"cpu": away - on_disk, "disk": on_disk}
        moved = {tier: hidden_states_s(self.costs, batch, tier) for tier in parts}
        return {user: sum(part * moved[tier][user] for tier, part in parts.items()) for user in (*UP, *DOWN)}

    def _away(self) -> tuple[float, float]:
        """Parts of the GPU batches whose hidden states live elsewhere, and of those on disk."""
        gpu, cpu = self.choice.act_percents
        return 1 - gpu / 100, max(0.0, 1 - (gpu + cpu) / 100)

    def _batch_of(self, group: RowGroup, batches: float, mode: str) -> BatchLoad:
        """A GPU batch in a mode, without what it adds to the dense part."""
        batch = BatchLoad()
        batch.new[mode] = group.tokens / batches
        batch.context[mode] = group.decode_context / batches
        batch.past[mode] = (group.decode_context - group.decode_rows + group.prompt_past) / batches
        batch.pairs[mode] = group.pairs / batches
        return batch

    def _dense(self, group: RowGroup) -> tuple[float, float]:
        """(seconds before attention, seconds after it) of a layer.

        Rows that decode come first; prompts make batches of their own, or are the end of the last one.
        """
        size, decode, prompts = self.choice.gpu_batch_size, group.decode_rows, group.prompt_rows
        cut = [(max(1.0, decode / size), decode)] if decode else []
        if prompts:
            many = max(1.0, prompts / size) if prompts >= size or not decode else 0.0
            cut.append((many, group.prompt_tokens))
        project = attend = 0.0
        for many, tokens in cut:
            beside = 0.0 if many else decode / cut[0][0]
            batches = many or 1.0
            for load, sign in ((BatchLoad(tokens=tokens / batches + beside), 1), (BatchLoad(tokens=beside), -1)):
                project += sign * batches * self.costs.project_s(load)
                attend += sign * batches * self.costs.attend_s(load)
        return project, attend

    def _read_bytes(self) -> None:
        near = [self._bytes(self.rows * factor, "gpu") for factor in _POINTS]
        near = sorted(dict(near).items())
        spaces = [(rows, parts["gpu"].get("workspace", 0)) for rows, parts in near]
        self.workspace = [Line.through(*a, *b) for a, b in pairwise(spaces)] or [Line.through(*spaces[0] * 2)]
        (rows_0, parts_0), (rows_1, parts_1) = (near * 2)[-2:] if len(near) == 1 else near[-2:]
        self.common = {
            tier: Line.through(rows_0, _rest(parts_0[tier], kv=False), rows_1, _rest(parts_1[tier], kv=False))
            for tier in TIERS
        }
        self.kv, self.gathered = {}, {}
        few = self.rows <= _FEW_BATCHES * self.choice.gpu_batch_size
        for mode in self.choice.modes:
            # Buffers of fetched KV are as large as a GPU batch needs, or all rows: among few batches, in proportion to them.
            factors = (1, 1) if few and mode in ("fetch", "disk") else (1, 2)
            (rows_0, parts_0), (rows_1, parts_1) = (self._bytes(self.rows * factor, mode) for factor in factors)
            self.kv[mode] = {
                tier: Line.through(rows_0, _rest(parts_0[tier], kv=True), rows_1, _rest(parts_1[tier], kv=True))
                for tier in TIERS
            }
            gathered = [parts["gpu"].get("kv gathered", 0) for parts in (parts_0, parts_1)]
            self.gathered[mode] = Line.through(rows_0, gathered[0], rows_1, gathered[1])

    def _bytes(self, rows: float, mode: str) -> tuple[int, Mapping[str, Mapping[str, int]]]:
        policy = self.choice.policy(self.problem.workload, max(1.0, rows), mode)
        return policy.block_size, self.problem.memory(policy, self.problem.allocate(policy)).parts


def _rest(items: Mapping[str, int], *, kv: bool) -> int:
    """Bytes of the items that are KV, or of those that are not, without those that have lines of their own."""
    own = ("kv gathered", *_PRICED_APART)
    return sum(size for name, size in items.items() if name not in own and name.startswith("kv") == kv)
