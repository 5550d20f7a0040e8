"""Experts on demand: their own numbers whatever brings them, no more of them than were routed to, and hits as the policy has them."""

import os
import random
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cost_model.memory.allocation import residency
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.routing.on_demand import entry_bytes
from flexmoe import LLM, SamplingParams
from flexmoe.errors import InfeasibleError, StorageError, UsageError
from flexmoe.models.loader import load_model
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder
from flexmoe.weights import supply, transfers
from flexmoe.weights.eviction import LFU, LRU, Usage
from flexmoe.weights.expert_cache import ExpertCache
from flexmoe.weights.slots import Fetch
from flexmoe.weights.store import WeightStore
from flexmoe.weights.stream import WeightStream
from flexmoe.weights.supply import WeightFeed
from policies import Policy, Workload
from policies.schedule import SweepUnits
from policies.units import UnitId, expert_unit
from scripts.support.belady import belady, best_static
from tests.support.drawn import drawn
from tests.support.tiny import GEN_LEN, assert_greedy, offload
from tests.support.tiny_units import within

pytestmark = pytest.mark.usefixtures("loads_cost_their_bytes")
PERCENTS = {"cpu": (0, 100), "disk": (0, 0), "mixed": (30, 30)}


@contextmanager
def fed(
    directory,
    percents=(0, 0),
    *,
    group=None,
    experts=6,
    staged=False,
    monkeypatch=None,
    pin=True,
    on_disk=(),
    staging=4,
    **options,
):
    """A feed of a checkpoint with room for some experts, and the numbers of every expert; units ``on_disk`` are there whatever
    the percents say."""
    if staged:
        monkeypatch.setattr(supply, "WeightStream", lambda *a, **kw: WeightStream(*a, **kw, staged=True))
    model = load_model(str(directory)).grouped(group)
    arch, device = model.arch, Device("cpu")
    source = model.source(directory)
    resident = WeightStore(device, Recorder(), source, {u.id: "gpu" for u in units_of(arch)}, torch.float32)
    resident.load()
    tier_of = residency(arch).place(*percents).tier_of | dict.fromkeys(on_disk, "disk")
    store, units = WeightStore(device, Recorder(), source, tier_of, torch.float32, pin), SweepUnits.of(tier_of)
    store.load()
    feed = WeightFeed(
        store, arch, units, SimpleNamespace(slots=2, staging_slots=staging, cache_experts=experts), **options
    )
    feed.start()
    expected = {}
    for unit in (step.unit for layer in units.experts for step in layer):
        tensors = resident.resident(unit)
        for place, e in enumerate(unit.experts):
            expected[unit.layer, e] = tensors["gate_up"][place], tensors["down"][place]
    try:
        yield SimpleNamespace(feed=feed, arch=arch, store=store, expected=expected, tier_of=tier_of)
    finally:
        within(10, feed.close)
        store.close()
        resident.close()


def whole(weights):
    """gate_up and down of a single expert, as one tensor each however they lie."""
    pieces = [weights[role] for role in ("gate_up.0", "gate_up.1") if role in weights]
    up = weights["gate_up"][0] if "gate_up" in weights else torch.cat(pieces)
    return up, weights["down"][0] if "down" in weights else weights["down.0"]


def ask(run, layer, experts, tokens=1):
    """Route to these experts and take what comes; returns their numbers in the order in which they came."""
    counts = [int(e in experts) for e in range(run.arch.num_experts)]
    run.feed.routed(layer, counts, tokens)
    run.feed.request(layer)
    came = []
    for some in run.feed.experts():
        for expert, weights in some.items():
            for got, expected in zip(whole(weights), run.expected[layer, expert], strict=True):
                assert torch.equal(got, expected), (layer, expert)
        came += some
    return came


def streamed_of(run, layer):
    return np.flatnonzero(run.feed._rule.streamed[layer]).tolist()


#: Of the names, groups, places, ways and orders every pair is quick.
@pytest.mark.parametrize(
    "name, group, percents, staged, overlap",
    drawn(
        list(product(("qwen3", "qwen3-packed", "mixtral-packed"), (1, 3), PERCENTS, (False, True), (True, False))),
        pairs=combinations(range(5), 2),
    ),
)
def test_every_expert_comes_with_its_own_numbers(name, group, percents, staged, overlap, variants, monkeypatch):
    rng = random.Random(7)
    options = {"group": group, "staged": staged, "overlap": overlap, "monkeypatch": monkeypatch}
    with fed(variants(name).directory, PERCENTS[percents], **options) as run:
        layers = sorted(run.feed.begin(1))
        assert layers and not any(run.arch.is_dense(layer) for layer in layers)
        for _ in range(12):
            for layer in layers:
                choices = streamed_of(run, layer)
                wanted = rng.sample(choices, rng.randint(0, min(8, len(choices))))
                assert sorted(within(10, lambda w=wanted, at=layer: ask(run, at, w))) == sorted(wanted)
        counts = run.feed.metrics()
        assert counts["hits"] + counts["loads"] == counts["lookups"] > 0 < counts["hits"]
        assert counts["loads"] - counts["evictions"] <= 6 and counts["experts"] == 3


def test_unpinned_homes_pass_through_staging(variants, monkeypatch):
    options = {"group": 3, "staged": True, "pin": False, "monkeypatch": monkeypatch}
    with fed(variants("qwen3").directory, (0, 100), **options) as run:
        layers = sorted(run.feed.begin(1))
        assert run.feed._kept_staging == 2 and len(run.feed._stream.staging) == 4
        for layer in layers * 3:
            assert within(10, lambda at=layer: ask(run, at, [1, 4, 5, 9])) is not None


@pytest.mark.parametrize(
    "on_disk, staging",
    [
        ((UnitId("attention", 1),), 1),
        ((UnitId("head", 4),), 1),
        ((UnitId("expert", 2, 0),), 1),
        ((UnitId("attention", 1), UnitId("expert", 2, 0)), 2),
        ((UnitId("attention", 1), UnitId("attention", 2), UnitId("expert", 2, 0)), 2),
    ],
    ids=["attention", "head", "expert", "attention and expert", "two attentions and expert"],
)
def test_few_units_on_disk_leave_staging_to_whoever_needs_it(on_disk, staging, variants, monkeypatch):
    options = {"on_disk": on_disk, "staging": staging, "group": 1, "staged": True, "monkeypatch": monkeypatch}
    with fed(variants("qwen3").directory, (0, 100), **options) as run:
        sparse = [layer for layer in range(run.arch.num_layers) if layer not in run.arch.dense_layers]
        for _ in range(3):
            run.feed.begin(1)
            for unit in run.feed._always:
                within(10, lambda u=unit: run.feed.get(u))
                run.feed.release(unit)
            for layer in sparse:
                within(10, lambda at=layer: ask(run, at, [0, 1]))
            run.feed.end()


def test_cached_experts_come_first_and_cost_no_transfer(variants, monkeypatch):
    read, real = [], WeightStore.read_expert

    def read_expert(self, expert, buffer, on_done=None):
        read.append((expert, len(buffer)))
        return real(self, expert, buffer, on_done)

    monkeypatch.setattr(WeightStore, "read_expert", read_expert)
    with fed(variants("qwen3").directory, group=3) as run:
        run.feed.begin(1)
        assert ask(run, 0, [8, 3]) == ask(run, 0, [3, 8]) == [3, 8]
        assert ask(run, 0, [2, 8]) == [8, 2]
        assert [expert for expert, _ in read] == [UnitId("expert", 0, e) for e in (3, 8, 2)]
        assert read[-1][1] < run.store.layouts[expert_unit(0, range(3))].host_bytes / 2


def test_more_experts_than_there_is_room_for_take_turns(variants):
    with fed(variants("qwen3").directory, experts=2) as run:
        run.feed.begin(1)
        assert within(10, lambda: ask(run, 0, range(16))) == list(range(16))
        assert run.feed.metrics()["experts"] == 1


class AtOnce:
    """A loader whose experts are there as soon as they are asked for."""

    def fetch(self, layer, expert, slot):
        return Fetch(UnitId("expert", layer, expert), slot)

    def load(self, layer, expert, fetch):
        fetch.done()

    def places(self, layer, expert):
        return {}


SHAPES = {
    "mixtral": ("Mixtral-8x7B", 8, 16),
    "qwen3": ("Qwen3-30B-A3B", 12, 384),
}  # name, layers, experts that can stay


def zipf_trace(arch, tokens, sweeps, topics, seed=0):
    """Tokens per expert of every layer of every sweep; each layer has favourites of its own, and each topic others."""
    rng = np.random.default_rng(seed)
    law = np.log(1 / np.arange(1, arch.num_experts + 1))
    orders = [[rng.permutation(arch.num_experts) for _ in range(arch.num_layers)] for _ in range(topics)]
    for sweep in range(sweeps):
        for layer, order in enumerate(orders[sweep * topics // sweeps]):
            drawn = np.empty((tokens, arch.num_experts))
            drawn[:, order] = law + rng.gumbel(size=drawn.shape)
            chosen = np.argpartition(-drawn, arch.top_k, axis=1)[:, : arch.top_k]
            yield layer, np.bincount(chosen.ravel(), minlength=arch.num_experts)


def hits_on(shape, tokens, sweeps, topics, kind="lfu"):
    """Hits of a policy in the runtime's cache, and the trace, and how many experts can stay."""
    name, layers, room = SHAPES[shape]
    arch = replace(ModelArch.from_name(name), num_layers=layers)
    usage, transient = Usage(arch), 4
    policy = LFU(usage) if kind == "lfu" else LRU(usage)
    memory = torch.empty(room + transient, dtype=torch.uint8)
    cache = ExpertCache(Device("cpu"), AtOnce(), memory, 1, policy, transient, torch.float32)
    trace = []
    for layer, counts in zipf_trace(arch, tokens, sweeps, topics):
        usage.add(layer, counts, tokens)
        needed = np.flatnonzero(counts).tolist()
        cache.request(layer, needed)
        assert sorted(e for some in cache.experts() for e in some) == needed
        trace.append([(layer, e) for e in needed])
    assert len(cache) == room
    return cache.counts.hits, trace, room


@pytest.mark.parametrize(
    "shape, tokens, sweeps",
    [
        ("mixtral", 1, 1200),
        ("qwen3", 1, 300),
        pytest.param("mixtral", 4, 600, marks=pytest.mark.slow),
        pytest.param("qwen3", 4, 200, marks=pytest.mark.slow),
    ],
)
def test_the_default_has_nine_tenths_of_the_hits_of_the_best_static_set(shape, tokens, sweeps):
    hits, trace, room = hits_on(shape, tokens, sweeps, topics=1)
    assert 0.9 * best_static(trace, room).hits <= hits <= belady(trace, room + 4).hits


@pytest.mark.parametrize(
    "shape, tokens, sweeps",
    [
        ("mixtral", 4, 600),
        ("qwen3", 4, 200),
        pytest.param("mixtral", 1, 1200, marks=pytest.mark.slow),
        pytest.param("qwen3", 1, 600, marks=pytest.mark.slow),
    ],
)
def test_when_favourites_change_half_way_the_default_beats_static_and_lru(shape, tokens, sweeps):
    hits, trace, room = hits_on(shape, tokens, sweeps, topics=2)
    recent, same, _ = hits_on(shape, tokens, sweeps, topics=2, kind="lru")
    assert same == trace
    assert hits > 1.02 * max(best_static(trace, room).hits, recent)


def test_recency_evicts_as_it_does_on_paper(variants):
    """The same requests replayed by hand over a list of what is held."""
    rng, capacity = np.random.default_rng(3), 8
    with fed(variants("qwen3").directory, experts=capacity, kind="lru") as run:
        layers = sorted(run.feed.begin(1))
        held, hits = [], 0
        policy = run.feed._cache._eviction
        for _ in range(60):
            for layer in layers:
                wanted = sorted(set((rng.zipf(1.5, 5) - 1).clip(0, 15).tolist()))
                ask(run, layer, wanted)
                hits += sum((layer, e) in held for e in wanted)
                for e in wanted:
                    if (layer, e) in held:
                        continue
                    if len(held) < capacity:
                        held.append((layer, e))
                        continue
                    others = [at for at in held if at not in {(layer, w) for w in wanted}]
                    held[held.index(min(others, key=lambda at: policy.scores[at]))] = (layer, e)
        assert 0 < hits == run.feed.metrics()["hits"] < run.feed.metrics()["lookups"]


def test_a_static_cache_never_lets_go_of_what_it_keeps(variants):
    known = np.tile(np.linspace(1, 0, 16), (4, 1))
    with fed(variants("qwen3").directory, experts=12, kind="static", known=known) as run:
        layers, rng = sorted(run.feed.begin(1)), random.Random(1)
        kept = np.argwhere(np.isinf(run.feed._cache._eviction.scores)).tolist()
        assert len(kept) == run.feed.metrics()["experts"] == 6
        for layer, expert in kept:
            ask(run, layer, [expert])
        for _ in range(10):
            for layer in layers:
                ask(run, layer, rng.sample(range(16), 9))
        before = run.feed.metrics()["hits"]
        for layer, expert in kept:
            ask(run, layer, [expert])
        assert run.feed.metrics()["hits"] == before + len(kept)


def test_while_all_are_streamed_only_the_room_beyond_the_slots_keeps_its_experts(variants):
    with fed(variants("qwen3").directory, group=3, experts=5) as run:
        feed = run.feed
        assert feed._borrowed_bytes == 0, "two slots are kept for the stream"
        layers = sorted(feed.begin(1))
        ask(run, layers[0], [1, 2, 3])
        assert feed.begin(100_000) == frozenset()
        for unit in feed._all:  # everything streams, in order, with its own numbers
            assert within(5, lambda u=unit: feed.get(u)) is not None
            feed.release(unit)
        assert sorted(feed.begin(1)) == layers
        before = feed.metrics()["hits"]
        ask(run, layers[0], [1, 2, 3])
        assert feed.metrics()["hits"] == before + 3


def test_experts_in_borrowed_slots_are_dropped_when_the_stream_reclaims_them(variants, monkeypatch):
    monkeypatch.setattr(supply, "KEPT_SLOTS", 0)
    with fed(variants("qwen3").directory, group=8, experts=2) as run:
        feed = run.feed
        assert feed._borrowed_bytes > 0 and len(feed._cache._entries) > 4
        feed._always = []  # nothing else is streamed, so the stream needs no slot
        layers = sorted(feed.begin(1))
        wanted = list(range(len(feed._cache._entries)))
        for _ in range(3):
            feed.begin(1)
            ask(run, layers[0], wanted)
            feed.begin(100_000)
            for unit in feed._all:
                within(5, lambda u=unit: feed.get(u))
                feed.release(unit)
        assert 0 < feed.metrics()["hits"] <= 2 * 3


def test_a_static_cache_keeps_its_experts_even_when_its_transient_slots_are_needed(variants):
    known = np.tile(np.linspace(1, 0, 16), (4, 1))
    with fed(variants("qwen3").directory, experts=8, kind="static", known=known) as run:
        layer = min(run.feed.begin(1))
        kept = [e for at, e in np.argwhere(np.isinf(run.feed._cache._eviction.scores)).tolist() if at == layer]
        assert kept and run.feed.metrics()["experts"] == 4
        others = [10, 11, 12, 13]
        for wanted in (kept, others, [*others, 14], kept):  # the transient slots are full of what the layer needs
            before = run.feed.metrics()["hits"]
            assert sorted(within(5, lambda w=wanted: ask(run, layer, w))) == wanted
        assert run.feed.metrics()["hits"] == before + len(kept)


def test_loads_of_an_interrupted_sweep_do_not_reach_what_comes_after(variants, monkeypatch):
    monkeypatch.setattr(supply, "KEPT_SLOTS", 0)
    real = os.preadv

    def slow(fd, buffers, offset):
        time.sleep(0.01)
        return real(fd, buffers, offset)

    with fed(variants("qwen3").directory, group=8, experts=2) as run:
        feed = run.feed
        feed._always = []
        layer = min(feed.begin(1))
        monkeypatch.setattr(os, "preadv", slow)
        feed.routed(layer, [1] * 16, 1)
        feed.request(layer)  # and nobody takes them
        assert feed.begin(100_000) == frozenset()
        for unit in feed._all:
            got = within(5, lambda u=unit: feed.get(u))
            if (unit.kind, unit.layer) == ("expert", layer):
                for place, e in enumerate(range(8)[: len(got) // 3]):
                    assert torch.equal(
                        got[f"down.{place}"] if f"down.{place}" in got else got["down"][place],
                        run.expected[layer, e + unit.first][1],
                    )
            feed.release(unit)


def test_a_transfer_thread_that_is_stopped_between_taking_a_slot_and_its_copy_ends(variants, monkeypatch):
    real = transfers.Fetch

    def late(*arguments, **named):
        fetch = real(*arguments, **named)
        time.sleep(0.05)
        return fetch

    monkeypatch.setattr(transfers, "Fetch", late)
    with fed(variants("qwen3").directory, (0, 100), group=3) as run:
        for tokens in (1, 100_000) * 3:
            within(10, lambda t=tokens: run.feed.begin(t))
            run.feed.end()


def test_a_failed_read_reaches_whoever_asks_and_again(variants, monkeypatch):
    def failing(fd, buffers, offset):
        raise OSError(5, "Input/output error")

    with fed(variants("qwen3").directory) as run:
        run.feed.begin(1)
        ask(run, 0, [1])
        monkeypatch.setattr(os, "preadv", failing)
        for _ in range(2):
            with pytest.raises(StorageError, match="Input/output error"):
                within(5, lambda: ask(run, 0, [2, 3]))


# In an engine.


@pytest.fixture
def make(variants, tmp_path):
    made = []

    def call(percent=(0, 0, 100, 0, 100, 0), *, name="qwen3", rows=2, group=3, overlap=True, **options):
        policy = Policy.from_percent(
            percent,
            gpu_batch_size=rows,
            num_gpu_batches=1,
            prompt_len=60,
            gen_len=GEN_LEN,
            prefill_tokens=1000,
            experts_per_unit=group,
            overlap=overlap,
        )
        options = offload(tmp_path) | {"workload": Workload(prompt_len=60, gen_len=GEN_LEN)} | options
        made.append(LLM(variants(name).directory, policy=policy, **options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


def run_rows(llm, variant, rows, max_tokens=GEN_LEN):
    outputs = llm.generate(variant.prompts[:rows], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    for row, output in enumerate(outputs):
        assert_greedy(variant, row, list(output.outputs[0].token_ids), variant.expected(row, max_tokens))
    return llm.metrics()


def test_experts_that_no_token_was_routed_to_are_not_moved(make, variants):
    llm = make(rows=1)
    loaded = sum(v["bytes"] for k, v in llm.metrics()["lanes"].items() if k.startswith("disk_read"))
    metrics = run_rows(llm, variants("qwen3"), 1)
    cache, arch = metrics["expert_cache"], llm.model.arch
    sparse = arch.num_layers - len(arch.dense_layers)
    assert cache["on_demand_sweeps"] == metrics["sweeps"]
    assert cache["lookups"] <= metrics["tokens_per_sweep"][0] * arch.top_k * sparse + (metrics["sweeps"] - 1) * (
        arch.top_k * sparse
    )
    read = sum(v["bytes"] for k, v in metrics["lanes"].items() if k.startswith("disk_read")) - loaded
    everything = sum(u.stored_bytes for u in units_of(arch) if u.kind != "embed")
    assert read < 0.7 * metrics["sweeps"] * everything
    assert cache["hits"] > 0 < cache["mean_load_s"]


def test_an_engine_goes_on_exactly_after_a_sweep_that_was_broken_off(make, variants, monkeypatch):
    variant, real, left = variants("qwen3"), LFU.used, [5]
    llm = make(rows=2)

    def used(self, layer, experts):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("broken off")

    monkeypatch.setattr(LFU, "used", used)
    for _ in range(3):
        left[0] = 5
        with pytest.raises(RuntimeError, match="broken off"):
            llm.generate(variant.prompts[:2], SamplingParams(max_tokens=4))
    monkeypatch.setattr(LFU, "used", real)
    run_rows(llm, variant, 4)


@pytest.mark.parametrize("kind", ["lfu", "lru", "off"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "serial"])
def test_every_cache_generates_the_same(kind, overlap, make, variants):
    metrics = run_rows(make(expert_cache=kind, overlap=overlap), variants("qwen3"), 4)
    assert (metrics["expert_cache"]["lookups"] == 0) == (kind == "off")


def test_a_budget_for_the_device_becomes_room_for_experts(make, variants):
    small = make(rows=1)
    planned = small.engine.plan.memory.total("gpu")
    budget = (planned + 10.5 * entry_bytes(small.engine.model.arch)) / 2**30
    large = make(rows=1, gpu_mem=budget)
    assert large.engine.plan.allocation.cache_experts == 10
    assert large.engine.plan.memory.parts["gpu"]["expert cache"] == 10 * entry_bytes(small.engine.model.arch)
    assert large.engine.plan.memory.total("gpu") <= budget * 2**30
    caches = [run_rows(llm, variants("qwen3"), 1)["expert_cache"] for llm in (small, large)]
    assert caches[0]["experts"] + 5 <= caches[1]["experts"] <= caches[0]["experts"] + 10
    assert caches[1]["hit_rate"] > caches[0]["hit_rate"]


def test_the_cache_takes_no_more_than_there_are_streamed_experts(make):
    llm = make(percent=(50, 0, 100, 0, 100, 0), gpu_mem=4)
    arch, tier_of = llm.engine.model.arch, llm.engine.plan.allocation.placement.tier_of
    streamed = sum(
        unit.count
        for unit, tier in tier_of.items()
        if unit.kind == "expert" and tier != "gpu" and not arch.is_dense(unit.layer)
    )
    assert llm.engine.plan.allocation.cache_experts == streamed


def test_a_block_of_many_tokens_streams_everything(make, variants):
    llm = make(rows=16)
    metrics = run_rows(llm, variants("qwen3"), 16, 2)
    assert metrics["expert_cache"]["on_demand_sweeps"] < metrics["sweeps"]


def test_a_static_cache_keeps_what_another_run_used(make, variants, tmp_path):
    arch = make().model.arch
    counts = np.zeros((arch.num_layers, arch.num_experts), dtype=np.int64)
    for layer in set(range(arch.num_layers)) - set(arch.dense_layers):
        counts[layer, : arch.top_k] = 100
    usage = ExpertUsage(model=arch.fingerprint(), tokens=100, counts=counts)
    usage.save(tmp_path / "usage.json")
    llm = make(rows=1, expert_cache="static", expert_usage=tmp_path / "usage.json", gpu_mem=1)
    cache = llm.engine.feed._cache
    kept = np.isinf(cache._eviction.scores)
    assert kept[:, : arch.top_k][usage.counts[:, 0] > 0].all()
    assert run_rows(llm, variants("qwen3"), 1)["expert_cache"]["policy"] == "static"


def test_a_cache_that_cannot_be_is_refused_with_the_reason(make, variants, tmp_path):
    with pytest.raises(UsageError, match="lfu, lru, static, off"):
        make(expert_cache="fifo")
    with pytest.raises(UsageError, match="give its expert usage"):
        make(expert_cache="static")
    arch = replace(make().model.arch, num_experts=8, group=None)
    counts = np.zeros((arch.num_layers, 8), dtype=np.int64)
    counts[[layer for layer in range(arch.num_layers) if not arch.is_dense(layer)], : arch.top_k] = 1
    ExpertUsage(model=arch.fingerprint(), tokens=1, counts=counts).save(tmp_path / "usage.json")
    with pytest.raises(InfeasibleError, match="num_experts"):
        make(expert_usage=str(tmp_path / "usage.json"))
