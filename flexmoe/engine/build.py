"""What an engine computes with: homes and ways of weights, KV and activations, and the executor over them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from cost_model.memory.memory_plan import sampling_bytes
from flexmoe.engine.config import GIB, EngineConfig, EnginePlan
from flexmoe.engine.executor import Executor
from flexmoe.engine.hidden_states import Activations
from flexmoe.engine.router_counter import RouterCounter
from flexmoe.kv.cache import KVCache, KVShape
from flexmoe.kv.transfers import KVBuffers, KVLanes
from flexmoe.models.loader import Model
from flexmoe.system.device import keep_freed_memory
from flexmoe.system.machine import make_directory
from flexmoe.system.trace import Recorder
from flexmoe.weights.sources import WeightSource
from flexmoe.weights.store import EmbeddingTable, WeightStore
from flexmoe.weights.supply import WeightFeed
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


def build_parts(model: Model, config: EngineConfig, plan: EnginePlan, closing: contextlib.ExitStack) -> EngineParts:
    """Allocate and load all that a plan has.

    Args:
        closing: is told how to close each part, also of those that were built when a later one could not be.

    Raises:
        StorageError: the offload directory cannot be written, or a weight not be read.
        InfeasibleError: the system refuses the memory.
    """
    keep_freed_memory()
    if plan.written_bytes:
        make_directory(config.offload_dir)
    if config.gpu_mem is not None:
        plan.device.cap_memory(int(config.gpu_mem * GIB))
    recorder, arch = Recorder(config.keep_spans), model.arch
    units, source = SweepUnits.of(plan.sizes.placement.tier_of), model.source(config.offload_dir)
    store, feed = _weights(model, config, plan, recorder, units, source, closing)
    cache, kv = _kv(model, config, plan, recorder, closing)
    counts = plan.sizes
    activations = Activations(
        plan.device, recorder, counts.activation_tiers, counts.batch_tokens, arch.hidden, plan.dtype, config.offload_dir
    )
    closing.callback(activations.close)
    router_counter = RouterCounter(arch, plan.device.torch, coactivation=config.router_stats)
    executor = Executor(
        device=plan.device,
        recorder=recorder,
        family=model.family,
        units=units,
        feed=feed,
        embed=EmbeddingTable(store, source, EMBEDDING, counts.max_tokens),
        kv=kv,
        activations=activations,
        activation_tiers=counts.activation_tiers,
        router_counter=router_counter,
        max_tokens=counts.max_tokens,
        score_bytes=sampling_bytes(arch, config.policy),
        dtype=plan.dtype,
        overlap=config.policy.overlap,
    )
    return EngineParts(
        recorder=recorder,
        store=store,
        feed=feed,
        cache=cache,
        kv=kv,
        activations=activations,
        router_counter=router_counter,
        executor=executor,
    )


def _weights(
    model: Model,
    config: EngineConfig,
    plan: EnginePlan,
    recorder: Recorder,
    units: SweepUnits,
    source: WeightSource,
    closing: contextlib.ExitStack,
) -> tuple[WeightStore, WeightFeed]:
    policy, counts = config.policy, plan.sizes
    store = WeightStore(plan.device, recorder, source, counts.placement.tier_of, plan.dtype, policy.pin_weight)
    closing.callback(store.close)
    store.load()
    recorder.reset_totals()  # a run's rates do not count what loading moved
    known = None if config.expert_usage is None else config.expert_usage.shares
    feed = WeightFeed(store, model.arch, units, counts, kind=config.expert_cache, known=known, overlap=policy.overlap)
    closing.callback(feed.close)
    feed.start()
    return store, feed


def _kv(
    model: Model, config: EngineConfig, plan: EnginePlan, recorder: Recorder, closing: contextlib.ExitStack
) -> tuple[KVCache, KVLanes]:
    arch, counts = model.arch, plan.sizes
    shape = KVShape(layers=arch.num_layers, kv_heads=arch.num_kv_heads, head_dim=arch.head_dim, dtype=plan.dtype)
    cache = KVCache(plan.device, shape, counts.kv_blocks, counts.tails, config.offload_dir)
    buffers = KVBuffers(
        staging_blocks=counts.fetch_blocks, batch_tokens=counts.batch_tokens, write_blocks=counts.write_blocks
    )
    kv = KVLanes(plan.device, recorder, cache, buffers, arch.num_heads, arch.sliding_window)
    closing.callback(kv.close)
    return cache, kv
