"""What a sweep costs beside its arithmetic: per sweep, per row and per operation of the schedule.

Sweeps of a tiny model are timed with the engine itself. What its experts, attention modules and attention take at those
shapes is measured apart and taken off, because the curves of `gemms` hold the cost of those calls already; the rest is
fitted to (1, rows, operations) with coefficients of at least zero.

Legend: E experts, K chosen experts, B rows.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.models.loader import Model
from flexmoe.models.registry import family
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.probing.attention import AttentionCase
from flexmoe.probing.effort import Effort, Heads
from flexmoe.probing.gemms import bench_arch, dense_bench, expert_bench
from flexmoe.probing.timing import WeightArena, noise, repeat_s
from flexmoe.sampling.logprobs import PromptScores
from flexmoe.system.device import Device
from flexmoe.weights.sources import DummySource
from policies.policy import Policy
from policies.schedule import SweepShape, SweepUnits, sweep
from policies.workload import Workload

_HEADS, _FFN, _EXPERTS, _VOCAB = Heads(hidden=64, heads=4, kv_heads=1, head_dim=16), 96, 4, 256
_CONTEXT = 256
#: Scored positions at a time, vocabulary entries of a piece, pieces, and most probable tokens of each position.
_SCORED, _SCORED_PIECE, _SCORED_PIECES, _SCORED_TOP = 64, 4096, 4, 1
_WARM = 3
#: Seconds after which no further sweep is timed, once so many have been.
_MOST_S, _LEAST_SWEEPS = 3.0, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Seconds per sweep, per row of a sweep, and per operation of its schedule."""

    sweep_s: float
    row_s: float
    op_s: float


class _SmallPattern(DummySource):
    _PATTERN_BYTES = 1 << 20


class _TinyModel(Model):
    """A model whose random weights take no time to make."""

    __slots__ = ()

    def source(self, offload_dir: Path, dtype: torch.dtype | None = None) -> DummySource:
        return _SmallPattern(self.family.parts(()), self.stored_dtype, offload_dir)


def overheads(device: Device, dtype: torch.dtype, directory: Path, effort: Effort) -> Overheads:
    """Measure and fit.

    Args:
        directory: of the engine's disk tier.
    """
    arena = WeightArena(device, dtype, 4 << 20)
    features, rest_s, whole_s = [], [], []
    for layers, batch_rows in itertools.product(effort.layers, effort.batch_rows):
        arch = bench_arch(_HEADS, _FFN, layers=layers, experts=_EXPERTS, vocab=_VOCAB)
        for rows in effort.rows:
            each_s = timed_sweeps(device, arch, dtype, rows, batch_rows, directory, effort.sweeps).sweep_s
            batches = gpu_batches(rows, batch_rows)
            features.append((1, rows, _operations(arch, len(batches))))
            whole_s.append(each_s)
            rest_s.append(each_s - _arithmetic_s(device, arch, dtype, arena, batches, effort))
    # Relative to the sweep, so that a large one does not drown the small ones.
    sweep_s, row_s, op_s = nonnegative_fit(np.array(features, dtype=float), np.array(rest_s), np.array(whole_s))
    return Overheads(sweep_s=sweep_s, row_s=row_s, op_s=op_s)


@torch.inference_mode()
def score_s(device: Device, effort: Effort) -> float:
    """Seconds per vocabulary entry of a scored position, as the engine scores a prompt: a few positions at a time, a piece of
    the vocabulary after the other, the most probable tokens found on the way. The product is not among them."""
    logits_CV = noise(device, torch.float32, _SCORED, _SCORED_PIECE)
    targets = torch.zeros(_SCORED, dtype=torch.int64, device=device.torch)

    def score() -> None:
        scores = PromptScores(targets, _SCORED_TOP)
        for piece in range(_SCORED_PIECES):
            scores.add(slice(0, _SCORED), piece * _SCORED_PIECE, logits_CV.clone())

    return repeat_s(device, score, effort.point_s) / (_SCORED_PIECES * logits_CV.numel())


def nonnegative_fit(features: np.ndarray, values: np.ndarray, scale: np.ndarray) -> list[float]:
    """Coefficients of at least zero with the least sum of squared errors relative to ``scale``.

    Every set of free coefficients is tried, as there are few.

    Args:
        features: ``[points, k]`` with a small k.
        values: ``[points]``.
        scale: ``[points]``, above zero.
    """
    features, values, count = features / scale[:, None], values / scale, features.shape[1]
    best, best_error = np.zeros(count), float(np.square(values).sum())
    for size in range(1, count + 1):
        for free in itertools.combinations(range(count), size):
            found = np.linalg.lstsq(features[:, free], values, rcond=None)[0]
            error = float(np.square(features[:, free] @ found - values).sum())
            if found.min() >= 0 and error < best_error:
                best, best_error = np.zeros(count), error
                best[list(free)] = found
    return [float(value) for value in best]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Median seconds of a sweep, and the lanes' mean busy seconds in one."""

    sweep_s: float
    lanes_s: dict[str, float]


def timed_sweeps(
    device: Device,
    arch: ModelArch,
    dtype: torch.dtype,
    rows: int,
    batch_rows: int,
    directory: Path,
    sweeps: int,
    *,
    weights: tuple[float, float] = (100, 0),
    cache: tuple[float, float] = (100, 0),
    context: int = _CONTEXT,
    warm: int = _WARM,
) -> Timed:
    """Sweeps in which every row decodes.

    Args:
        weights, cache: percents of weights and of KV in the compute device's and in host memory.
        context: tokens of a row at first.
        warm: sweeps before those that are timed.
    """
    last = context + warm + sweeps + 2
    policy = Policy.from_percent(
        (*weights, *cache, 100, 0),
        gpu_batch_size=batch_rows,
        num_gpu_batches=len(gpu_batches(rows, batch_rows)),
        prompt_len=context,
        gen_len=last - context,
        prefill_tokens=1,
    )
    config = EngineConfig(
        policy=policy,
        workload=Workload(prompt_len=context, gen_len=last - context),
        kv_tokens=rows * (last + 16),
        device=str(device.torch),
        dtype=str(dtype).removeprefix("torch."),
        offload_dir=directory,
        longest_row=last,
    )
    model = _TinyModel(
        arch=arch,
        family=family(arch),
        stored_dtype=dtype,
        config={},
        generation_config={},
        directory=None,
        checkpoint=None,
    )
    engine = Engine(model, config)
    try:
        params = SamplingParams(max_tokens=last - context, ignore_eos=True)
        for row in range(rows):
            prompt = tuple((7 * row + at) % arch.vocab_size for at in range(context))
            engine.enter_aged(
                EngineRequest(request_id=str(row), prompt_token_ids=prompt, params=params), [row % _VOCAB]
            )
        for _ in range(warm):
            engine.step()
        engine.recorder.reset_totals()
        done = _run_timed(engine, sweeps)
        totals = engine.recorder.totals()
        return Timed(
            sweep_s=statistics.median(each.wall_s for each in engine.sweeps.since(warm)),
            lanes_s={lane: total.worker_s / done for lane, total in totals.items()},
        )
    finally:
        engine.close()


def _run_timed(engine: Engine, sweeps: int) -> int:
    """Runs so many sweeps, or fewer where they take long; returns how many."""
    begin = time.perf_counter()
    for done in range(1, sweeps + 1):
        engine.step()
        if done >= _LEAST_SWEEPS and time.perf_counter() - begin > _MOST_S:
            return done
    return sweeps


def gpu_batches(rows: int, batch_rows: int) -> list[int]:
    """Rows of each GPU batch."""
    return [min(batch_rows, rows - start) for start in range(0, rows, batch_rows)]


def _operations(arch: ModelArch, batches: int) -> int:
    """Operations of a sweep in which everything is resident."""
    units = SweepUnits.of({unit.id: "gpu" for unit in units_of(arch)})
    return sum(1 for _ in sweep(SweepShape(units=units, activation_tiers=("gpu",) * batches)))


def _arithmetic_s(
    device: Device, arch: ModelArch, dtype: torch.dtype, arena: WeightArena, batches: Sequence[int], effort: Effort
) -> float:
    """Seconds of a sweep that the planner's rates account for: experts, attention modules, KV that attention reads."""
    tokens = max(1, sum(batches) * arch.top_k // arch.num_experts)
    spend = (effort.point_s / 2, 1, 3)
    with expert_bench(device, arch, dtype, arena, tokens, effort) as seconds:
        experts_s = arch.num_experts * seconds(tokens, *spend)
    sizes = {count: batches.count(count) for count in batches}
    with dense_bench(device, arch, dtype, arena, max(batches), effort) as seconds:
        dense_s = sum(times * seconds(count, *spend) for count, times in sizes.items())
    attention_s = sum(times * _reading_s(device, dtype, count, effort) for count, times in sizes.items())
    return arch.num_layers * (experts_s + dense_s + attention_s)


def _reading_s(device: Device, dtype: torch.dtype, rows: int, effort: Effort) -> float:
    """What attention over so many rows takes beyond the call itself, whose cost is that of an operation."""
    heads = (_HEADS.heads, _HEADS.kv_heads, _HEADS.head_dim)
    call, full = (
        AttentionCase(device, False, dtype, heads, [1] * count, [context] * count).seconds(effort.point_s / 4)
        for count, context in ((1, 1), (rows, _CONTEXT))
    )
    return max(0.0, full - call)
