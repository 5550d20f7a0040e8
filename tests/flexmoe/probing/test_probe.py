"""The probe: what it measures is what the runtime does, it takes no more than it may, and leaves nothing behind."""

import contextlib
import json
import math
import os
import resource
import statistics
import sys
import time
import weakref
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cost_model.hardware.cache import last_measured
from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import Gpu, Hardware
from flexmoe.cli import probe as command
from flexmoe.engine import executor
from flexmoe.errors import FlexMoEError, InfeasibleError, StorageError
from flexmoe.kernels.expert_weights import ExpertWeights
from flexmoe.models.sparse.mixtral import Mixtral
from flexmoe.probing import (
    attention,
    cache,
    copies,
    disk,
    effort,
    facts,
    gemms,
    kv,
    latency,
    measure,
    sweeps,
)
from flexmoe.probing.cache import cached_probe
from flexmoe.probing.effort import Effort, Heads
from flexmoe.probing.measure import probe
from flexmoe.probing.timing import CURVE_ROUNDS, WeightArena, mean_of_rounds
from flexmoe.progress import Steps
from flexmoe.system import device as device_module
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder
from policies.common.directories import cache_directory
from policies.common.memory_units import MIB
from tests.support.pretend_cuda import PretendCuda

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = (1, 4, 16)
TINY = Effort(
    buffer_bytes=8 * MIB,
    point_s=0.001,
    tokens={"cpu": TOKENS, "cuda": TOKENS},
    experts=((32, 48), (64, 96)),
    modules=(Heads(hidden=32, heads=4, kv_heads=1, head_dim=8), Heads(hidden=64, heads=4, kv_heads=1, head_dim=16)),
    cycle_bytes=MIB,
    copy_bytes={"cpu": MIB, "cuda": MIB},
    link_bytes=(16 << 10, MIB // 4, MIB // 2, 64 * MIB),
    decode_rows=4,
    fetched_rows=2,
    contexts=(20, 40),
    prompts=(16,),
    disk_bytes=4 * MIB,
    least_disk_bytes=4 * MIB,
    kv_blocks=64,
    disk_s=0.2,
    layers=(1, 2),
    rows=(2, 6),
    batch_rows=(2, 8),
    sweeps=2,
    passes=1,
)
HEADS = Heads(hidden=32, heads=4, kv_heads=2, head_dim=8)
CPU = Device("cpu")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """This machine, measured with hardly any effort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_ROUNDS", 2)  # each builds six engines
        patch.setattr(latency, "_SMALL_TRANSFERS", 8)
        return probe("cpu", tmp_path_factory.mktemp("disk") / "new", TINY)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("FLEXMOE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flexmoe"


@pytest.fixture
def probes(machine, monkeypatch):
    """Counts the measurements that `cached_probe` asks for; each gives ``machine``."""
    asked = []
    monkeypatch.setattr(cache, "_measured_apart", lambda *args: asked.append(args) or machine)
    return asked


def numbers(values):
    return {each.name: v for each in fields(values) if isinstance(v := getattr(values, each.name), (int, float))}


def test_every_rate_is_positive_and_finite(machine):
    measured = {**numbers(machine), **numbers(machine.gpu)}
    at_least_zero = {
        "reserved_bytes",
        "row_s",
        "sweep_s",
        "op_s",
        "h2d_core_s_per_byte",
        "disk_read_core_s_per_byte",
        "disk_write_core_s_per_byte",
        "kv_block_read_s",
        "kv_block_core_s",
        "kv_block_write_s",
        "disk_latency_s",
        "handoff_s",
        "h2d_busy_latency_s",
    }
    for name, value in measured.items():
        assert math.isfinite(value) and (value > 0 or name in at_least_zero and value == 0), name
    for curves in (machine.gpu.experts, machine.gpu.dense):
        assert set(curves) == {2, 4}
        for rates in curves.values():
            assert rates.tokens == TOKENS and len(rates.weight_elements) == 2
            assert np.isfinite(rates.flops_per_s).all() and np.min(rates.flops_per_s) > 0
    assert machine.gpu.experts[4].weight_elements == (3 * 32 * 48, 3 * 64 * 96)
    assert set(machine.gpu.grouped_experts) == {2, 4}
    for rates in machine.gpu.grouped_experts.values():
        assert rates.tokens == TOKENS and rates.weight_elements == machine.gpu.experts[4].weight_elements
        assert np.isfinite(rates.flops_per_s).all() and np.min(rates.flops_per_s) > 0


def test_every_field_says_where_it_comes_from(machine):
    named = {each.name for kind in (Gpu, Hardware) for each in fields(kind)}
    assert named - set(machine.sources) == {"device", "gpus", "sources", "cpu_budget_bytes"}
    assert torch.__version__ in machine.sources["name"]


def test_on_cpu_the_compute_device_is_the_cores_and_their_memory(machine):
    assert machine.device == "cpu" and machine.gpu.reserved_bytes == 0
    assert machine.gpu.memory_bytes == machine.host_memory_bytes
    assert machine.gpu.attention_bytes_per_s == machine.cpu_attention_bytes_per_s


@pytest.mark.slow
def test_cuda_branches_measure_everything_too(pretend, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(measure, "Device", PretendCuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 << 30, 32 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(facts, "process_gpu_bytes", lambda device: 1 << 19)
    found = probe("cuda", tmp_path, TINY)
    assert (found.gpu.name, found.gpu.memory_bytes) == ("T4", (24 << 30) + (1 << 19))
    assert "float16" in found.sources["experts"] and found.gpu.h2d_duplex_bytes_per_s > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_gpu_is_measured(tmp_path):
    found = probe("cuda", tmp_path, replace(TINY, point_s=0.01, copy_bytes={"cuda": 64 * MIB}, buffer_bytes=256 * MIB))
    assert found.device == "cuda" and found.gpu.memory_bytes > found.gpu.reserved_bytes > 100 * MIB
    assert found.gpu.h2d_bytes_per_s > 1e9 and found.gpu.memory_bytes_per_s > found.gpu.h2d_bytes_per_s
    assert found.gpu.attention_bytes_per_s != found.cpu_attention_bytes_per_s
    assert set(found.gpu.grouped_experts) == ({2} if torch.cuda.get_device_capability()[0] >= 8 else set())


def test_what_a_scored_logit_takes_is_measured(machine):
    assert 1e-11 < machine.gpu.score_s < 1e-5 and "logprobs" in machine.sources["score_s"]


def test_links_are_measured_by_the_size_of_what_is_moved(machine):
    assert [size for size, _ in machine.disk_read_curve] == [16 << 10, MIB // 4, MIB // 2]  # 64 MiB fit no buffer
    assert [size for size, _ in machine.gpu.h2d_curve] == [16 << 10, MIB // 4, MIB // 2]
    assert all(0 < rate < 1e13 for curve in (machine.disk_read_curve, machine.gpu.h2d_curve) for _, rate in curve)


# What is timed.


@pytest.mark.parametrize("count", [1, 7, 16])
def test_expert_is_timed_over_exactly_the_tokens_routed_to_it(count, monkeypatch):
    seen, real = [], Mixtral.feed_forward
    monkeypatch.setattr(
        Mixtral, "feed_forward", lambda self, x, w: seen.append((len(x), w._down.data_ptr())) or real(self, x, w)
    )
    arena = WeightArena(CPU, torch.float32, MIB)
    with gemms.expert_bench(CPU, gemms.bench_arch(HEADS, 48), torch.float32, arena, 16, TINY) as seconds:
        assert seconds(count, 0.05, 1, 30) > 0
    assert {n for n, _ in seen} == {count}
    assert len({weights for _, weights in seen}) > 20  # no cache holds what comes next


@pytest.mark.parametrize("count", [1, 2, 4, 16, 64])
def test_unit_is_timed_over_tokens_that_are_spread_over_its_experts(count, monkeypatch):
    lengths, bounds, real, grouped = [], [], Mixtral.feed_forward, ExpertWeights.grouped
    monkeypatch.setattr(Mixtral, "feed_forward", lambda self, x, w: lengths.append(len(x)) or real(self, x, w))
    monkeypatch.setattr(
        ExpertWeights, "grouped", lambda self, ends: bounds.append(ends.tolist()) or grouped(self, ends)
    )
    arena, arch = WeightArena(CPU, torch.float32, MIB), gemms.bench_arch(HEADS, 48, group=8)
    with gemms.unit_bench(CPU, arch, torch.float32, arena, 64, TINY) as seconds:
        assert seconds(count, 0.05, 1, 2) > 0  # a single call takes less than three times that
    ends = bounds[0]
    each = np.diff([0, *ends])
    assert len(bounds) == len(lengths) >= 3 and set(lengths) == {8 * count} == {ends[-1]}
    assert each.min() >= 1 and each.std() == pytest.approx(count**0.5 if count >= 4 else 0, rel=0.2)


def test_only_what_the_runtime_groups_is_measured_in_units(monkeypatch):
    arena, rates = WeightArena(CPU, torch.float32, MIB), gemms.grouped_expert_rates
    many = replace(TINY, tokens={"cpu": (16, 64, 65, 256)})
    assert rates(CPU, arena, torch.float32, many).tokens == (16, 64)
    assert rates(CPU, arena, torch.float32, replace(TINY, tokens={"cpu": (65,)})) is None
    assert rates(CPU, arena, torch.float32, replace(TINY, experts=((4096, 14336),))) is None, "as large as a unit"
    monkeypatch.setattr(gemms, "has_grouped_product", lambda device, dtype: False)
    assert rates(CPU, arena, torch.float32, TINY) is None


@pytest.mark.parametrize("count", [1, 16, 150])
def test_attention_module_is_timed_over_a_whole_batch_with_its_new_kv_and_routing(count, monkeypatch):
    calls, project, route = [], Mixtral.project, gemms.ExpertDispatch.route
    monkeypatch.setattr(
        Mixtral, "project", lambda self, h, w, rope, new: calls.append(len(h)) or project(self, h, w, rope, new)
    )
    monkeypatch.setattr(
        gemms.ExpertDispatch, "route", lambda self, ids, *rest: calls.append(len(ids)) or route(self, ids, *rest)
    )
    new_kv = gemms.KVLanes.new_kv

    def counted(self, layer, batch):
        new = new_kv(self, layer, batch)
        calls.append(new.stop - new.start)
        return new

    monkeypatch.setattr(gemms.KVLanes, "new_kv", counted)
    arena = WeightArena(CPU, torch.float32, MIB)
    with gemms.dense_bench(CPU, gemms.bench_arch(HEADS, 2), torch.float32, arena, 150, TINY) as seconds:
        assert seconds(count, 0.001, 0, 2) > 0
    assert set(calls) == {count} and len(calls) % 3 == 0


def test_token_counts_are_spread_as_random_routing_spreads_them():
    assert gemms.around(4, 8) == [4]
    counts = gemms.around(400, 8)
    assert np.mean(counts) == pytest.approx(400, abs=1) and np.std(counts) == pytest.approx(20, rel=0.2)
    assert len({n % 2 for n in counts}) == 2
    assert np.std(gemms.around(400, 8, experts=4)) == pytest.approx(10, rel=0.2), "the mean of four"


def test_rate_is_flops_over_seconds_and_costly_points_are_measured_once():
    asked = []

    def seconds(count, spend, warm, least):
        asked.append(count)
        return count * 1e-3

    rates = gemms._curve(1000, (1, 16, 4000), 0.02, seconds)
    assert rates == pytest.approx([2e6] * 3)
    assert len(asked) == 1 + 8 + 1 and asked[-1] == 4000


def test_weights_that_take_too_long_or_too_much_memory_are_left_out():
    arena = WeightArena(CPU, torch.float32, MIB)
    assert len(gemms.expert_rates(CPU, arena, torch.float32, replace(TINY, curve_s=0.0)).weight_elements) == 1
    large = replace(TINY, experts=((32, 48), (256, 2048)))
    assert len(gemms.expert_rates(CPU, arena, torch.float32, large).weight_elements) == 1


def test_kv_rates_count_the_bytes_that_the_lanes_move(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(kv, "Recorder", lambda: recorder)
    bench = kv.KVBench(CPU, torch.bfloat16, [20, 33])
    try:
        bench._load()
        bench._arrived(0)
        loaded = recorder.totals()["h2d"].nbytes
        bench._store()
        stored = recorder.totals()["d2h"].nbytes
    finally:
        bench.close()
    token_bytes = 2 * 8 * 128 * 2
    assert (loaded, stored) == (53 * token_bytes, 2 * 64 * token_bytes) == (bench._past_bytes, bench._new_bytes)


def fixed_rates(nbytes_per_s, core_s_per_byte):
    each = disk.Transferred(nbytes=nbytes_per_s, seconds=1.0, core_s=core_s_per_byte * nbytes_per_s)
    return disk.DiskRates(read=each, write=each, direct=True)


@pytest.mark.parametrize("heads", kv.SHAPES)
def test_every_kv_block_is_read_and_written_on_its_own(heads, tmp_path, monkeypatch):
    moved = {"read_into": [], "write_from": []}
    for name, sizes in moved.items():
        way = getattr(disk.DirectFile, name)
        monkeypatch.setattr(
            disk.DirectFile, name, lambda self, b, *at, w=way, s=sizes: s.append((at[0], len(b))) or w(self, b, *at)
        )
    bench = kv.BlockBench(CPU, torch.bfloat16, heads, tmp_path, replace(TINY, disk_bytes=32 * MIB))
    try:
        bench.fill(60.0)
        assert bench.block_bytes == 16 * 2 * heads[0] * heads[1] * 2
        places = [block * bench.block_bytes for block in range(64)]
        assert sorted(moved["write_from"]) == [(at, bench.block_bytes) for at in places]
        assert min(bench.read_costs(1e-9)) > 0 and bench.write_s(1e-9) > 0
    finally:
        bench.close()
    read = [at for at, _ in moved["read_into"]]
    assert {size for _, size in moved["read_into"]} == {bench.block_bytes} and set(read) <= set(places)
    assert len(moved["write_from"]) - 64 == len(read) == len(set(read))  # one group of each, another time


def test_what_the_bytes_take_is_no_cost_of_a_kv_block(tmp_path, monkeypatch):
    monkeypatch.setattr(kv.BlockBench, "read_costs", lambda self, seconds: (1e-3, 5e-4))
    monkeypatch.setattr(kv.BlockBench, "write_s", lambda self, seconds: 1e-5)
    mean_bytes = (8192 + 65536) / 2
    found = kv.kv_block_costs(CPU, torch.bfloat16, tmp_path, TINY, fixed_rates(10**9, 1e-10))
    assert found.read_s == pytest.approx(1e-3 - mean_bytes / 1e9)
    assert found.read_core_s == pytest.approx(5e-4 - mean_bytes * 1e-10)
    assert found.write_s == 0.0 and list(tmp_path.iterdir()) == []


def test_reads_go_on_until_they_are_ended(tmp_path, monkeypatch):
    path, unit, seen = tmp_path / "file", disk.SYSTEM_PAGE_BYTES, []
    path.write_bytes(b"".join(bytes([number]) * unit for number in range(5)))
    read = disk.DirectFile.read_into
    monkeypatch.setattr(
        disk.DirectFile, "read_into", lambda self, b, at, needed: seen.append(at) or read(self, b, at, needed)
    )
    buffers, file = [CPU.host_buffer(unit) for _ in range(2)], disk.DirectFile(path)
    with contextlib.closing(latency.Reading(file, buffers, 5 * unit)):
        time.sleep(0.05)
    assert len(seen) > 10 and set(seen) == {unit * number for number in range(5)}
    assert {int(buffer[0]) for buffer in buffers} <= set(range(5))
    file.close()


def test_failed_read_is_raised_when_reading_ends(tmp_path):
    (tmp_path / "file").write_bytes(bytes(disk.SYSTEM_PAGE_BYTES))
    file = disk.DirectFile(tmp_path / "file")
    reads = latency.Reading(file, [CPU.host_buffer(disk.SYSTEM_PAGE_BYTES)], 2 * disk.SYSTEM_PAGE_BYTES)
    time.sleep(0.05)
    with pytest.raises(FlexMoEError, match="ends at byte"):
        reads.close()
    file.close()


def test_small_transfer_is_timed_alone_and_behind_large_ones(tmp_path, monkeypatch):
    read, reads = disk.DirectFile.read_into, []
    monkeypatch.setattr(
        disk.DirectFile, "read_into", lambda self, b, at, *rest: reads.append(len(b)) or read(self, b, at, *rest)
    )
    found = latency.disk_latency(CPU, tmp_path, TINY)
    assert found.alone_s > 0 and found.busy_s > 0 and list(tmp_path.iterdir()) == []
    first_large = reads.index(TINY.buffer_bytes // latency._PIECES)
    assert set(reads[:first_large]) == {latency._SMALL_BYTES} and first_large <= latency._SMALL_TRANSFERS
    assert 0 < reads[first_large:].count(latency._SMALL_BYTES) <= latency._SMALL_TRANSFERS


@pytest.mark.parametrize(
    "cpu_s, disk_s, expected", [(3.0, 1.5, {"cpu": 2.0, "disk": 0.5}), (0.9, 1.0, {"cpu": 0, "disk": 0})]
)
def test_streamed_byte_costs_the_core_seconds_by_which_sweeps_are_longer(
    cpu_s, disk_s, expected, tmp_path, monkeypatch
):
    percents = []

    def timed(*arguments, weights, context):
        percents.append(weights)
        seconds = {100: 1.0, 0: cpu_s}.get(weights[0], disk_s)
        return sweeps.Timed(sweep_s=seconds, lanes_s={})

    monkeypatch.setattr(latency, "timed_sweeps", timed)
    monkeypatch.setattr(latency, "usable_cores", lambda: 8)
    found = latency.streaming_core_s_per_byte(CPU, torch.bfloat16, tmp_path, TINY, 1e12)
    archs = latency.moved_archs(torch.bfloat16, TINY)
    per_byte = statistics.fmean(1 / arch.total_bytes for arch in archs)
    assert len(archs) == 2 and percents[:4] == [(100, 0), (0, 100), (50, 0), (100, 0)]
    assert found["cpu"] == pytest.approx(8 * expected["cpu"] * per_byte, rel=0.02)
    assert found["disk"] == pytest.approx(8 * expected["disk"] * 2 * per_byte, rel=0.1)


def test_slow_disk_gets_no_more_than_it_can_read_beside_computing(tmp_path, monkeypatch):
    percents, (arch, _) = [], latency.moved_archs(torch.bfloat16, TINY)
    monkeypatch.setattr(
        latency,
        "timed_sweeps",
        lambda *arguments, weights, context: percents.append(weights) or sweeps.Timed(sweep_s=1.0, lanes_s={}),
    )
    latency.streaming_core_s_per_byte(CPU, torch.bfloat16, tmp_path, TINY, 0.1 * arch.total_bytes)
    assert percents[2] == (pytest.approx(94.0), 0.0)


def test_weights_of_the_streamed_model_are_where_they_should_be(tmp_path):
    arch = latency.streaming_arch(torch.bfloat16, TINY)
    lanes = sweeps.timed_sweeps(CPU, arch, torch.bfloat16, 2, 2, tmp_path, 1, weights=(50, 25)).lanes_s
    assert lanes["h2d"] > 0 and lanes["disk_read"] > 0
    assert latency.handoff_s(CPU, torch.bfloat16, tmp_path, TINY) > 0


def test_attention_counts_kv_bytes_and_flops_of_real_tokens():
    decode = attention.AttentionCase(CPU, False, torch.bfloat16, (8, 2, 16), [1, 1], [20, 33])
    assert decode.kv_bytes == 53 * 2 * 2 * 16 * 2
    prefill = attention.AttentionCase(CPU, False, torch.bfloat16, (8, 2, 16), [16], [48])
    assert prefill.flops == 4 * 8 * 16 * 16 * (32 + 8)
    assert decode.seconds(0.001) > 0


def test_both_ways_are_copied_at_once():
    host, device = (torch.ones(3 << 16, dtype=torch.uint8) for _ in range(2))
    target, back = (torch.zeros(3 << 16, dtype=torch.uint8) for _ in range(2))
    up, down = copies.lane_rates(CPU, [copies.Lane(target, host), copies.Lane(back, device)], 0.01)
    assert up > 0 and down > 0 and torch.equal(target, host) and torch.equal(back, device)


def test_a_curve_of_copies_walks_through_its_buffers(monkeypatch):
    copied = []

    def counted(target, source):
        copied.append((len(target), target.ctypes.data, source.ctypes.data))
        target[:] = source

    monkeypatch.setattr(copies, "np", SimpleNamespace(copyto=counted))
    curve = copies.copy_curve(CPU, 3 << 20, (3 << 16, 3 << 18, 3 << 22), 0.01)
    assert [size for size, _ in curve] == [3 << 16, 3 << 18] and {size for size, *_ in copied} == {1 << 16, 1 << 18}
    small = [(target, source) for size, target, source in copied if size == 1 << 16]
    assert len({target for target, _ in small}) == len({source for _, source in small}) == 3 * 16


def test_a_curve_of_reads_takes_other_parts_of_the_file_in_turn(tmp_path, monkeypatch):
    reads, transfer = [], disk.transfer

    def counted(lane, file, buffers, nbytes, seconds, start=0):
        done = transfer(lane, file, buffers, nbytes, seconds, start)
        reads.append((lane, buffers[0].numel(), len(buffers), start, start + done.nbytes))
        return done

    monkeypatch.setattr(disk, "transfer", counted)
    found = disk.disk_rates(CPU, tmp_path, replace(TINY, point_s=0.0))
    rounds = reads[2:]
    assert [size for _, size, *_ in rounds] == [size for size, _ in found.curve] * CURVE_ROUNDS
    assert {(lane, slots) for lane, _, slots, *_ in rounds} == {("disk_read", 4)}
    assert all(0 <= start < end <= found.write.nbytes for *_, start, end in rounds)
    assert len({start for *_, start, _ in rounds}) > 3


def test_rounds_take_turns_and_the_mean_of_each_size_counts():
    asked, rates = [], iter([1.0, 5.0, 3.0, 4.0, 2.0, 6.0, 4.0, 6.0, 5.0, 9.0])
    assert mean_of_rounds((1, 2), lambda size: asked.append(size) or next(rates)) == ((1, 3.0), (2, 6.0))
    assert asked == [1, 2] * CURVE_ROUNDS and mean_of_rounds((), asked.append) == ()


@pytest.mark.parametrize("rows, batch_rows", [(2, 8), (6, 2)])
def test_operations_of_the_fit_are_those_that_a_sweep_runs(rows, batch_rows, tmp_path, monkeypatch):
    ran, sweep = [], executor.sweep
    monkeypatch.setattr(executor, "sweep", lambda *a, **k: (ran.append(op) or op for op in sweep(*a, **k)))
    arch = gemms.bench_arch(sweeps._HEADS, sweeps._FFN, layers=2, experts=4)
    assert sweeps.timed_sweeps(CPU, arch, torch.float32, rows, batch_rows, tmp_path, 2).sweep_s > 0
    assert len(ran) == (sweeps._WARM + 2) * sweeps._operations(arch, len(sweeps.gpu_batches(rows, batch_rows)))


def test_fit_finds_the_coefficients_and_none_is_negative():
    rng = np.random.default_rng(0)
    features = np.column_stack([np.ones(12), rng.integers(1, 300, 12), rng.integers(10, 300, 12)]).astype(float)
    truth = np.array([2e-4, 8e-6, 3e-5])
    values = features @ truth
    assert sweeps.nonnegative_fit(features, values, values) == pytest.approx(truth)
    found = sweeps.nonnegative_fit(features, features @ np.array([-1e-3, 0, 3e-5]), values)
    assert min(found) >= 0 and found[2] > 0
    assert sweeps.nonnegative_fit(features, -values, values) == [0, 0, 0]


# What is taken, and left behind.


def test_nothing_is_left_on_the_disk(tmp_path):
    disk.disk_rates(CPU, tmp_path, TINY)
    disk.disk_rates(CPU, tmp_path / "made" / "for it", TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [StorageError("broken"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_nothing_is_left_on_the_disk_when_it_is_interrupted(error, tmp_path, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(disk.DirectFile, "sync", fail)
    with pytest.raises(type(error)):
        disk.disk_rates(CPU, tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_at_most_a_tenth_of_the_free_space_is_written(tmp_path, monkeypatch):
    ends, write = [], disk.DirectFile.write_from
    monkeypatch.setattr(
        disk.DirectFile, "write_from", lambda self, b, at: ends.append(at + len(b)) or write(self, b, at)
    )
    monkeypatch.setattr(disk, "free_disk_bytes", lambda path: 85 * MIB)
    rates = disk.disk_rates(CPU, tmp_path, replace(TINY, disk_bytes=1 << 30))
    assert max(ends) <= 8.5 * MIB and rates.read.nbytes == rates.write.nbytes == max(ends)


def test_slow_disk_is_not_written_for_ever(tmp_path):
    few = disk.disk_rates(CPU, tmp_path, replace(TINY, disk_bytes=64 * MIB, disk_s=0.0))
    assert few.write.nbytes == few.read.nbytes == 4 * MIB  # one round of the buffers


@pytest.mark.slow
def test_host_buffers_stay_within_the_bound(tmp_path, monkeypatch):
    alive, peak, map_pages = {}, [0], device_module._map_pages

    def counted(size, shared):
        pages = map_pages(size, shared)
        alive[id(pages)] = size
        weakref.finalize(pages, alive.pop, id(pages))
        peak.append(sum(alive.values()))
        return pages

    monkeypatch.setattr(device_module, "_map_pages", counted)
    monkeypatch.setattr(effort, "available_host_bytes", lambda: 64 * MIB)
    greedy = replace(TINY, buffer_bytes=1 << 40, copy_bytes={"cpu": 1 << 40}, decode_rows=10**6, fetched_rows=10**6)
    probe("cpu", tmp_path, replace(greedy, disk_bytes=32 * MIB))
    assert MIB < max(peak) <= 9 * MIB


def test_memory_lock_limit_counts_only_where_the_driver_counts_it(monkeypatch):
    limits = {"now": (64 * MIB, 128 * MIB)}
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda what, to: limits.update(now=to))

    def pin(nbytes):
        if counted and nbytes > limits["now"][0]:
            raise InfeasibleError("the driver cannot lock it")

    device = SimpleNamespace(is_cuda=True, host_buffer=pin)
    for counted, expected in ((True, 64 * MIB), (False, None)):
        assert facts.pinned_limit_bytes(device) == expected
        assert limits["now"] == (64 * MIB, 128 * MIB)
    assert facts.pinned_limit_bytes(CPU) is None
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert facts.pinned_limit_bytes(device) is None


def test_busy_neighbours_are_reported(monkeypatch, caplog):
    busy = iter([100.0, 1000.0])
    monkeypatch.setattr(facts, "busy_core_s", lambda: next(busy))
    assert "other processes kept" in facts.Others().sentence() and "measure again" in caplog.text
    monkeypatch.setattr(facts, "busy_core_s", lambda: None)
    assert facts.Others().sentence() == ""


# The cache.


def test_machine_is_measured_once(own_cache, probes, machine, tmp_path):
    first, second = (cached_probe("cpu", tmp_path) for _ in range(2))
    assert len(probes) == 1 and len(list(own_cache.iterdir())) == 1
    assert first.gpu.experts == second.gpu.experts == machine.gpu.experts
    assert cache_directory() == own_cache and last_measured()[0].gpu.op_s == machine.gpu.op_s


@pytest.mark.parametrize(
    "change",
    [
        ("torch", "__version__", "9.9"),
        ("facts", "cpu_name", lambda: "another"),
        ("facts", "usable_cores", lambda: 999),
        ("facts", "device_name", lambda device: "another"),
        ("facts", "gpu_details", lambda device: {"driver": "another"}),
        ("facts", "filesystem", lambda path: "another"),
    ],
    ids=lambda change: change[1],
)
def test_machine_is_measured_again_when_something_changes(change, own_cache, probes, tmp_path, monkeypatch):
    cached_probe("cpu", tmp_path)
    where, name, value = change
    monkeypatch.setattr({"torch": torch, "facts": facts}[where], name, value)
    cached_probe("cpu", tmp_path)
    assert len(probes) == 2 and len(list(own_cache.iterdir())) == 2


def test_machine_is_measured_again_when_a_run_has_found_it_otherwise(own_cache, probes, tmp_path, caplog):
    cache.mark_stale("cpu", tmp_path, {"disk_read"})
    assert not own_cache.exists(), "nothing is kept that could be stale"
    cached_probe("cpu", tmp_path)
    cache.mark_stale("cpu", tmp_path, {"disk_read"})
    for _ in range(2):
        cached_probe("cpu", tmp_path)
    assert len(probes) == 2 and "not as measured in the last run" in caplog.text
    assert last_measured()[1].suffix == ".json"


def test_machine_is_measured_again_for_the_same_lane_once_a_day(own_cache, probes, tmp_path):
    def start(*lanes):
        cache.mark_stale("cpu", tmp_path, lanes)
        cached_probe("cpu", tmp_path)
        return len(probes)

    cached_probe("cpu", tmp_path)
    assert [start("disk_read"), start("disk_read"), start("gpu", "disk_read"), start("gpu")] == [2, 2, 3, 3]
    (again,) = own_cache.glob("*.again")
    os.utime(again, (again.stat().st_atime, again.stat().st_mtime - 90_000))
    assert start("gpu") == 4


def test_capacities_are_never_from_the_cache(own_cache, probes, tmp_path, monkeypatch):
    cached_probe("cpu", tmp_path)
    monkeypatch.setattr(facts, "process_limit_bytes", lambda: 123)
    monkeypatch.setattr(facts, "free_disk_bytes", lambda path: 456)
    found = cached_probe("cpu", tmp_path)
    assert (found.host_memory_bytes, found.gpu.memory_bytes, found.disk_bytes, len(probes)) == (123, 123, 456, 1)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"kind": "flexmoe.hardware", "schema_version": 99}'])
def test_unusable_cache_is_measured_again_and_replaced(content, own_cache, probes, tmp_path, caplog):
    cached_probe("cpu", tmp_path)
    (kept,) = own_cache.iterdir()
    kept.write_bytes(content)
    cached_probe("cpu", tmp_path)
    assert len(probes) == 2 and "measured again" in caplog.text
    assert json.loads(kept.read_text())["kind"] == "flexmoe.hardware"


def test_cache_that_cannot_be_written_costs_a_warning_only(probes, machine, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    assert cached_probe("cpu", tmp_path).gpu.op_s == machine.gpu.op_s
    assert "cannot be kept" in caplog.text


CHILD = """
import sys
print("a table")
print("measuring this machine, step 1 of 10: the disk", file=sys.stderr)
if {code}:
    sys.exit(print("flexmoe: the disk is full", file=sys.stderr) or {code})
import shutil
shutil.copy({source!r}, sys.argv[sys.argv.index("-o") + 1])
"""


def test_machine_is_measured_in_a_process_of_its_own(own_cache, machine, tmp_path, monkeypatch, caplog, capfd):
    machine.save(tmp_path / "machine.json")
    code = CHILD.format(code=0, source=str(tmp_path / "machine.json"))
    monkeypatch.setattr(cache, "_COMMAND", (sys.executable, "-c", code))
    with caplog.at_level("INFO"):
        found = cached_probe("cpu", tmp_path).gpu
    assert found == replace(machine.gpu, memory_bytes=found.memory_bytes)  # what is free is asked for anew
    assert "step 1 of 10: the disk" in caplog.text and capfd.readouterr().out == ""


@pytest.mark.parametrize("code, error", [(74, StorageError), (4, InfeasibleError), (1, FlexMoEError)])
def test_error_of_the_process_that_measures_is_raised_here(code, error, own_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_COMMAND", (sys.executable, "-c", CHILD.format(code=code, source="")))
    with pytest.raises(error, match="could not be measured: the disk is full"):
        cached_probe("cpu", tmp_path)
    assert not own_cache.exists()


# The command line.


def test_command_line_writes_the_file_and_prints_every_value(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "probe", lambda device, directory: machine)
    out = tmp_path / "machine.json"
    assert command.main(["-o", str(out), "--device", "cpu"]) == 0
    assert Hardware.load(out) == machine
    printed = capsys.readouterr().out
    for name in {**numbers(machine), **numbers(machine.gpu)}:
        assert f"\n{name} " in printed
    assert "experts, 2 bytes x" in printed and "GFLOP/s" in printed and str(out) in printed


@pytest.mark.slow
def test_progress_goes_to_stderr(tmp_path, monkeypatch, capsys):
    quick = replace(TINY, tokens={"cpu": (1,)}, experts=TINY.experts[:1], modules=TINY.modules[:1])
    monkeypatch.setattr(command, "probe", lambda device, directory: probe(device, directory, quick))
    with handlers_of_the_root_removed():
        assert command.main(["-o", str(tmp_path / "m.json"), "--device", "cpu", "--dir", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "measuring this machine, step 1 of 10: the disk" in told.err and "measuring" not in told.out


def test_what_the_cores_decide_is_the_mean_of_passes_between_the_other_steps(monkeypatch):
    made, speeds = [], iter((1.0, 2.0, 6.0))

    def step(what):
        def make(setting, found):
            made.append((what, setting.effort.point_s))
            if what == "memory":
                rate = next(speeds)
                grid = GemmRates(tokens=(1.0,), weight_elements=(8.0,), flops_per_s=((rate,),))
                found.put("a sum", host_bytes_per_s=rate, experts={2: grid}, h2d_curve=((4, rate),))

        return make

    monkeypatch.setattr(measure, "STEPS", {what: step(what) for what in measure.STEPS})
    found, effort = measure.Found(), replace(TINY, passes=3, point_s=0.3)
    setting = measure.Setting(device=CPU, directory=Path(), effort=effort, dtypes={})
    measure.run_steps(setting, found, Steps("measuring", bar=False))
    assert found.values["host_bytes_per_s"] == 3.0 and found.values["h2d_curve"] == ((4, 3.0),)
    assert found.values["experts"][2].flops_per_s == ((3.0,),) and "mean of 3 passes" in found.sources["experts"]
    names = [what for what, _ in made]
    assert names.count("memory") == names.count("overheads") == 3 and names.count("the disk") == 1
    assert names.index("latencies") < len(names) - 1 - names[::-1].index("memory"), "passes lie between other steps"
    assert [point_s for what, point_s in made if what == "memory"] == pytest.approx([0.1] * 3)


@contextlib.contextmanager
def handlers_of_the_root_removed():
    """As in a fresh process: pytest's handlers would keep `logging.basicConfig` from making one."""
    import logging

    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        yield
    finally:
        root.handlers = before


@pytest.mark.parametrize(
    "arguments, code, sentence",
    [
        (["--dir", "."], 2, "-o"),
        (["-o", "m.json", "--device", "tpu"], 2, "unknown device"),
        (["-o", "missing/m.json"], 74, "no directory"),
        (["-o", "m.json", "--device", "cpu", "--dir", "file/below"], 74, "choose another --dir"),
    ],
)
def test_refusals_are_sentences_with_the_codes_of_the_contract(
    arguments, code, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert command.main(arguments) == code
    told = capsys.readouterr()
    assert sentence in told.err and "Traceback" not in told.err and not (tmp_path / "m.json").exists()


def test_full_disk_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk, "free_disk_bytes", lambda path: 100 * MIB)
    assert command.main(["-o", str(tmp_path / "m.json"), "--device", "cpu", "--dir", str(tmp_path)]) == 74
    assert "100 MiB free" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_interrupted_probe_ends_with_130_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "transfer", interrupt)
    assert command.main(["-o", str(tmp_path / "m.json"), "--device", "cpu", "--dir", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
