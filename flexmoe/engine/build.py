"""What an engine computes with: homes and transfers of weights, KV and activations, the scheduler and the executor."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import asdict, dataclass
from typing import Any

from cost_model.memory.memory_plan import scored_at_once
from flexmoe.debugging.records import DebugRecords, SpanRecorder
from flexmoe.debugging.watch import Watch
from flexmoe.debugging.watched import WatchedDispatch, WatchedFamily
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.engine.executor import Executor
from flexmoe.engine.hidden_states import Activations
from flexmoe.engine.length_estimate import LengthEstimate
from flexmoe.engine.router_counter import RouterCounter
from flexmoe.engine.scheduler import Row, Scheduler
from flexmoe.kernels.expert_dispatch import ExpertDispatch
from flexmoe.kernels.family import Family
from flexmoe.kv.cache import KVCache, KVShape
from flexmoe.kv.transfers import KVBuffers, KVLanes
from flexmoe.models.loader import Model
from flexmoe.system.device import keep_freed_memory
from flexmoe.system.direct_io import PIECE_BYTES, SHARED_PIECE_BYTES
from flexmoe.system.machine import make_directory
from flexmoe.system.trace import Recorder
from flexmoe.weights.store import EmbeddingTable, WeightStore
from flexmoe.weights.supply import WeightFeed
from policies.common.memory_units import GIB
from policies.schedule import SweepUnits
from policies.units import EMBEDDING


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """The parts of an engine; each is described where it is defined."""

    recorder: Recorder
    store: WeightStore
    feed: WeightFeed
    cache: KVCache
    kv: KVLanes
    activations: Activations
    router_counter: RouterCounter
    executor: Executor
    length_estimate: LengthEstimate
    scheduler: Scheduler
    _resources: contextlib.ExitStack

    @classmethod
    def build(cls, model: Model, config: EngineConfig, plan: EnginePlan) -> EngineParts:
        """Allocate and load all that a plan has. When it raises, whatever was built before is closed.

        Raises:
            StorageError: the offload directory cannot be written, or a weight not be read.
            InfeasibleError: the system refuses the memory.
        """
        keep_freed_memory()
        if plan.written_bytes:
            make_directory(config.offload_dir)
        plan.device.cap_memory(None if config.gpu_mem is None else int(config.gpu_mem * GIB))
        with contextlib.ExitStack() as resources:
            return _Builder(model, config, plan, resources).parts()

    def close(self) -> None:
        """Stop the threads and close the files; a second call does nothing."""
        self._resources.close()


class _Builder:
    """Makes the parts one after another, and tells ``resources`` how each is closed as soon as it is there."""

    def __init__(self, model: Model, config: EngineConfig, plan: EnginePlan, resources: contextlib.ExitStack):
        self._model, self._config, self._plan, self._resources = model, config, plan, resources
        self._recorder: Recorder = Recorder(config.keep_spans)
        self._watch = self._watched()
        self._source = model.source(config.offload_dir, plan.dtype)
        self._units = SweepUnits.of(plan.allocation.placement.tier_of)

    def _watched(self) -> Watch | None:
        """What sees the tensors, where that is asked for; nothing of it is there otherwise."""
        config = self._config
        if config.debug_records is None:
            return Watch(check=True) if config.check_finite else None
        self._recorder = recorder = SpanRecorder(config.keep_spans)
        records = DebugRecords(config.debug_records, _described(self._model, config, self._plan), recorder)
        watch = Watch(check=config.check_finite, records=records)
        self._resources.callback(watch.close)
        return watch

    def parts(self) -> EngineParts:
        store = self._store()
        feed = self._feed(store)
        cache = self._cache()
        kv = self._kv(cache)
        activations = self._activations()
        counter = RouterCounter(self._model.arch, self._plan.device.torch, coactivation=self._config.router_stats)
        length_estimate, scheduler = self._scheduler(cache)
        return EngineParts(
            recorder=self._recorder,
            store=store,
            feed=feed,
            cache=cache,
            kv=kv,
            activations=activations,
            router_counter=counter,
            executor=self._executor(store, feed, kv, activations, counter),
            length_estimate=length_estimate,
            scheduler=scheduler,
            _resources=self._resources.pop_all(),
        )

    def _store(self) -> WeightStore:
        plan, pin = self._plan, self._config.policy.pin_weight
        tiers = plan.allocation.placement.tier_of
        piece = SHARED_PIECE_BYTES if plan.allocation.shares_disk else PIECE_BYTES
        store = WeightStore(plan.device, self._recorder, self._source, tiers, plan.dtype, pin, piece)
        self._resources.callback(store.close)
        store.load()
        self._recorder.reset_totals()  # a run's rates do not count what loading moved
        return store

    def _feed(self, store: WeightStore) -> WeightFeed:
        config, usage = self._config, self._config.known_usage
        feed = WeightFeed(
            store,
            self._model.arch,
            self._units,
            self._plan.allocation,
            kind=config.expert_cache,
            known=None if usage is None else usage.shares,
            overlap=config.policy.overlap,
        )
        self._resources.callback(feed.close)
        feed.start()
        return feed

    def _cache(self) -> KVCache:
        arch, plan = self._model.arch, self._plan
        shape = KVShape(
            layers=arch.num_layers,
            kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            dtype=plan.dtype,
            groups=arch.kv_groups,
            compressed=self._config.policy.compress_cache,
        )
        cache = KVCache(plan.device, shape, plan.allocation.kv_pages, plan.allocation.tails, self._config.offload_dir)
        self._resources.callback(cache.close_file)
        return cache

    def _kv(self, cache: KVCache) -> KVLanes:
        arch, allocation = self._model.arch, self._plan.allocation
        buffers = KVBuffers(
            staging_pages=allocation.fetch_pages,
            batch_tokens=allocation.batch_tokens,
            write_pages=allocation.write_pages,
            gather_pages=allocation.gather_pages,
        )
        kv = KVLanes(self._plan.device, self._recorder, cache, buffers, arch.num_heads, arch.sinks)
        self._resources.callback(kv.close)
        return kv

    def _activations(self) -> Activations:
        plan, allocation = self._plan, self._plan.allocation
        activations = Activations(
            plan.device,
            self._recorder,
            allocation.activation_tiers,
            allocation.batch_tokens,
            self._model.arch.hidden,
            plan.dtype,
            self._config.offload_dir,
        )
        self._resources.callback(activations.close)
        return activations

    def _scheduler(self, cache: KVCache) -> tuple[LengthEstimate, Scheduler]:
        config = self._config

        def running() -> list[Row]:
            scheduler = weak()
            return [] if scheduler is None else scheduler.running

        length_estimate = LengthEstimate(running, open_rows=config.gen_len is None)
        expected_end = length_estimate.expected_end if config.reserve == "p95" else None
        past, caching = self._plan.allocation.recompute_past, config.prefix_caching
        scheduler = Scheduler(config.policy, cache, expected_end, past, caching)
        # Weak, so that the memory of an engine goes with its last user and does not wait for the garbage collector.
        weak = weakref.ref(scheduler)
        return length_estimate, scheduler

    def _executor(
        self,
        store: WeightStore,
        feed: WeightFeed,
        kv: KVLanes,
        activations: Activations,
        router_counter: RouterCounter,
    ) -> Executor:
        plan, allocation, policy = self._plan, self._plan.allocation, self._config.policy
        family, experts = self._mathematics()
        return Executor(
            device=plan.device,
            recorder=self._recorder,
            family=family,
            units=self._units,
            feed=feed,
            embed=EmbeddingTable(store, self._source, EMBEDDING, allocation.max_tokens),
            kv=kv,
            activations=activations,
            router_counter=router_counter,
            experts=experts,
            max_tokens=allocation.max_tokens,
            scored_at_once=scored_at_once(
                self._model.arch,
                policy,
                allocation,
                device=plan.device.torch.type,
                compute_bytes=plan.dtype.itemsize,
            ),
            dtype=plan.dtype,
            overlap=policy.overlap,
            half_blocks=policy.halves,
            watch=self._watch,
        )

    def _mathematics(self) -> tuple[Family, ExpertDispatch]:
        """The model's mathematics and the dispatch of its experts, both seen by the watch if there is one."""
        family, chunk = self._model.family, self._config.policy.expert_chunk
        device, experts = self._plan.device, self._model.arch.num_experts
        if self._watch is None:
            return family, ExpertDispatch(device, experts, chunk)
        return WatchedFamily(family, self._watch), WatchedDispatch(device, experts, chunk, self._watch)


def _described(model: Model, config: EngineConfig, plan: EnginePlan) -> dict[str, Any]:
    """What is run, for whoever reads the records of debug mode."""
    return {
        "model": model.arch.fingerprint(),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(plan.device.torch),
        "policy": asdict(config.policy),
        "layers": model.arch.num_layers,
        "dense_layers": sorted(model.arch.dense_layers),
        "experts": model.arch.num_experts,
        "experts_per_token": model.arch.top_k,
    }
