"""What the engine does, as numbers that any thread may read: they are copied between sweeps, once a second at most."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexmoe.batch.bottleneck import bottleneck
from flexmoe.engine.engine import Engine
from flexmoe.errors import UsageError
from flexmoe.serving.work.batch_run import BatchRun, key_of
from flexmoe.serving.work.models import Loaded
from flexmoe.system.machine import cpu_name, usable_cores
from flexmoe.system.memory import resident_bytes

_INTERVAL_S, _EXPERTS_INTERVAL_S = 1.0, 5.0
#: Samples that are kept, and those over which a rate is a mean.
_KEPT, _RECENT = 600, 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Counts at one moment; differences of two are what was done between them."""

    time_s: float
    wall_s: float
    sweeps: int
    rows: int
    prompt_tokens: int
    generated_tokens: int
    lanes_s: dict[str, float]
    batch_rows: dict[str, int]

    @classmethod
    def of(cls, engine: Engine, now_s: float, runs: Sequence[BatchRun] = ()) -> _Sample:
        totals, last = engine.sweeps.totals, engine.sweeps.since(len(engine.sweeps) - 1)
        return cls(
            time_s=now_s,
            wall_s=totals.wall_s,
            sweeps=len(engine.sweeps),
            rows=last[0].rows if last else 0,
            prompt_tokens=totals.prompt_tokens,
            generated_tokens=totals.generated_tokens,
            lanes_s={lane: total.busy_s for lane, total in engine.recorder.totals().items()},
            batch_rows=_batch_rows(engine, runs),
        )

    def since(self, before: _Sample) -> dict[str, Any]:
        """Rates and shares between the two."""
        wall_s = max(self.wall_s - before.wall_s, 1e-9)
        lanes = {lane: (busy_s - before.lanes_s.get(lane, 0.0)) / wall_s for lane, busy_s in self.lanes_s.items()}
        return {
            "time": round(self.time_s, 3),
            "rows_in_flight": self.rows,
            "batches": self._rows_of_batches(before),
            "sweeps": self.sweeps - before.sweeps,
            "prompt_tokens_per_s": (self.prompt_tokens - before.prompt_tokens) / wall_s,
            "generated_tokens_per_s": (self.generated_tokens - before.generated_tokens) / wall_s,
            "lanes": {lane: round(min(1.0, max(0.0, share)), 4) for lane, share in lanes.items()},
        }

    def _rows_of_batches(self, before: _Sample) -> dict[str, int]:
        """Rows in flight of each batch that had some at one of the two."""
        return {name: self.batch_rows.get(name, 0) for name in before.batch_rows | self.batch_rows}


class EngineStats:
    """Numbers of the engine that is loaded, and of those before it.

    Args:
        clock: seconds since 1970.

    Attributes:
        loads, failures: engines that were loaded, and that failed.
        version: another one whenever `performance` has changed.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._samples: deque[_Sample] = deque(maxlen=_KEPT)
        self._history: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._before = {"prompt_tokens": 0, "generated_tokens": 0, "sweeps": 0}
        self._model: dict[str, Any] | None = None
        self._memory: dict[str, Any] = {}
        self._experts: dict[str, Any] = {}
        self._experts_s = 0.0
        self._left: dict[str, dict[str, Any]] = {}
        self.loads = self.failures = self.version = 0
        self._failure: str | None = None
        self._machine = _machine()

    def loaded(self, loaded: Loaded, seconds: float) -> None:
        """A model was loaded, in so many seconds."""
        plan, predicted = loaded.llm.engine.plan, loaded.plan.predicted
        model = {
            "id": loaded.served.id,
            "load_s": seconds,
            "policy": asdict(loaded.plan.policy),
            "device": str(plan.device.torch),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "block_size": loaded.plan.policy.block_size,
            "largest_row_tokens": loaded.llm.largest_row_tokens,
            "predicted": None,
            "planned": loaded.served.options.plans_itself,
            "advice": None if loaded.served.options.plans_itself else [],
        }
        if predicted is not None:
            job_s = max(predicted.job_s, 1e-9)
            lanes = {lane: min(1.0, seconds / job_s) for lane, seconds in predicted.lanes_s.items()}
            model["predicted"] = {"generated_tokens_per_s": predicted.tokens_per_s, "lanes": lanes}
        tiers = {
            tier: {
                "planned_bytes": plan.memory.total(tier),
                "budget_bytes": plan.budgets.get(tier),
                "items": dict(plan.memory.parts[tier]),
            }
            for tier in plan.memory.parts
        }
        with self._lock:
            self.loads, self.version = self.loads + 1, self.version + 1
            self._model, self._memory, self._experts = model, tiers, {}
            self._forget_samples()
            self._samples.append(_Sample.of(loaded.llm.engine, self._clock()))

    def unloaded(self) -> None:
        """No model is loaded."""
        with self._lock:
            if self._samples:
                last = self._samples[-1]
                for name in self._before:
                    self._before[name] += getattr(last, name)
            self._forget_samples()
            self._model, self._memory, self._experts, self._left = None, {}, {}, {}
            self.version += 1

    def advised(self, model: str, advice: Sequence[str]) -> None:
        """What would help most was found for a model; it counts as long as that model is loaded."""
        with self._lock:
            if self._model is not None and self._model["id"] == model:
                self._model = self._model | {"advice": list(advice)}
                self.version += 1

    def failed(self, message: str) -> None:
        """The engine failed, or could not be made."""
        with self._lock:
            self.failures, self.version = self.failures + 1, self.version + 1
            self._failure = message

    def swept(self, loaded: Loaded, runs: Sequence[BatchRun]) -> None:
        """A sweep is over.

        Args:
            runs: the batches that wait or run, in the order of their turn.
        """
        now_s = self._clock()
        if self._samples and now_s - self._samples[-1].time_s < _INTERVAL_S:
            return
        sample = _Sample.of(loaded.llm.engine, now_s, runs)
        experts = None
        if now_s - self._experts_s >= _EXPERTS_INTERVAL_S:
            self._experts_s, experts = now_s, _experts(loaded.llm.engine)
        with self._lock:
            self._history.append(sample.since(self._samples[-1]))
            self._samples.append(sample)
            self.version += 1
            self._experts = experts or self._experts
            self._left = self._times_left(runs, loaded.served.id)

    def memory(self) -> dict[str, Any]:
        """Planned bytes of each tier with its budget, and what the process holds."""
        with self._lock:
            return {
                "model": self._model and self._model["id"],
                "tiers": self._memory,
                "process_bytes": resident_bytes(),
            }

    def experts(self) -> dict[str, Any]:
        """How often each expert of each layer was chosen since the model was loaded."""
        with self._lock:
            return {"model": self._model and self._model["id"], **(self._experts or {"layers": []})}

    def performance(self) -> dict[str, Any]:
        """Speed, lanes over time with their prediction, the policy, the bottleneck, and when each batch will be done."""
        with self._lock:
            samples = list(self._samples)
            recent = samples[-1].since(samples[max(0, len(samples) - 1 - _RECENT)]) if len(samples) > 1 else None
            return {
                "model": self._model,
                "now": recent,
                "history": list(self._history),
                "totals": self._totals(),
                "bottleneck": self._bottleneck(),
                "batches": self._left,
                "loads": self.loads,
                "failures": self.failures,
                "last_failure": self._failure,
                "machine": self._machine,
            }

    def totals(self) -> dict[str, int]:
        """Tokens and sweeps since the server started."""
        with self._lock:
            return self._totals()

    def _forget_samples(self) -> None:
        self._samples.clear()
        self._history.clear()

    def _totals(self) -> dict[str, int]:
        last = self._samples[-1] if self._samples else None
        return {name: count + (getattr(last, name) if last else 0) for name, count in self._before.items()}

    def _bottleneck(self) -> str:
        if len(self._samples) < 2:
            return "none, as nothing ran"
        first, last = self._samples[max(0, len(self._samples) - 1 - _RECENT)], self._samples[-1]
        busy = {lane: {"busy_s": s - first.lanes_s.get(lane, 0.0)} for lane, s in last.lanes_s.items()}
        return bottleneck({"wall_s": last.wall_s - first.wall_s, "lanes": busy})

    def _times_left(self, runs: Sequence[BatchRun], model: str) -> dict[str, dict[str, Any]]:
        """Seconds until each batch of the model is done, at the speed of the last samples."""
        first, last = self._samples[max(0, len(self._samples) - 1 - _RECENT)], self._samples[-1]
        tokens = last.prompt_tokens + last.generated_tokens - first.prompt_tokens - first.generated_tokens
        rate, ahead, left = tokens / max(last.time_s - first.time_s, 1e-9), 0.0, {}
        for run in sorted(runs, key=lambda each: (-each.record.priority, each.record.seq)):
            if run.model == model:
                ahead += run.tokens_left
                left[run.id] = {"seconds_left": ahead / rate if rate else None, "tokens_left": run.tokens_left}
        return left


def _batch_rows(engine: Engine, runs: Sequence[BatchRun]) -> dict[str, int]:
    """Rows that each batch has in flight; batches without one are left out."""
    names, rows = {run.key: run.id for run in runs}, Counter[str]()
    for request_id, count in engine.rows_in_flight().items():
        if (name := names.get(key_of(request_id))) is not None:
            rows[name] += count
    return dict(rows)


def _machine() -> dict[str, Any]:
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cores": usable_cores(), "memory_bytes": memory_bytes, "gpu": gpu}


def _experts(engine: Engine) -> dict[str, Any] | None:
    layers = []
    for layer in range(engine.model.arch.num_layers):
        try:
            found = engine.router_counter.layer(layer)
        except UsageError:  # it is dense, or nothing has been routed yet
            continue
        layers.append({"layer": layer, "tokens": found.tokens, "counts": found.counts.tolist()})
    return {"layers": layers} if layers else None
