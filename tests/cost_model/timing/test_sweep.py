"""A sweep in closed form takes what its replay takes."""

import random
import statistics
from dataclasses import replace

import pytest

from cost_model.simulation.replay import Replayer
from cost_model.timing.attention_phase import AttentionPhase
from cost_model.timing.sweep_bounds import sweep_time
from cost_model.timing.sweep_load import batches
from tests.support.sweeps import MANY_EXPERTS, MIXTRAL, SMALL, costs_of, decoding, random_sweep


@pytest.mark.parametrize("arch", [MIXTRAL, SMALL, MANY_EXPERTS], ids=["8x7b", "small", "many"])
def test_closed_form_agrees_with_the_walk(arch):
    """Stated tolerance: half of all policies within 1 %, eight of ten within 8 %, and the replay never more than 2 % faster
    in nineteen of twenty. The closed form is the largest of several bounds; where two of them are near each other the
    replay takes longer."""
    rng, ratios = random.Random(3), []
    for _ in range(60):
        costs, policy, load = random_sweep(rng, arch=arch)
        replayed_s, _ = Replayer(costs, policy.gpu_batch_size).steady(load)
        ratios.append(replayed_s / sweep_time(costs, load, policy.gpu_batch_size).total_s)
    apart = sorted(abs(ratio - 1) for ratio in ratios)
    assert statistics.median(apart) <= 0.01
    assert apart[int(0.8 * len(apart))] <= 0.08
    assert sorted(ratios)[len(ratios) // 20] >= 0.98


@pytest.mark.parametrize("machine", ["rtx4090", "cpu"])
@pytest.mark.parametrize("act", [(0, 100), (0, 0), (50, 25)], ids=["host", "disk", "all tiers"])
def test_closed_form_knows_what_hidden_states_cost_that_live_elsewhere(machine, act):
    costs, policy = costs_of((100, 0, 100, 0, *act), machine=machine, arch=SMALL, rows=256, batches=4)
    load = decoding(1024)
    replayed_s, _ = Replayer(costs, policy.gpu_batch_size).steady(load)
    assert replayed_s == pytest.approx(sweep_time(costs, load, policy.gpu_batch_size).total_s, rel=0.03)


def test_slots_do_not_count_the_kv_that_comes_under_the_experts():
    """All weights over a slow link, and KV of one GPU batch that is long there when its batch is projected."""
    costs, policy = costs_of((0, 100, 0, 100, 100, 0), batches=1, gpu={"h2d_bytes_per_s": 2e9}, weight_slots=12)
    load = decoding(8, context=200, fetch=8)
    closed = sweep_time(costs, load, policy.gpu_batch_size)
    replayed_s, _ = Replayer(costs, policy.gpu_batch_size).steady(load)
    assert closed.total_s == pytest.approx(replayed_s, rel=0.02)
    assert closed.bounds_s["slots"] <= closed.bounds_s["pcie"] * 1.02


def test_slots_know_what_crosses_the_link_beside_weights():
    """While the host works between two sweeps only the slots fill. New KV on its way home makes all the rest take longer."""
    costs, policy = costs_of((0, 100, 0, 100, 100, 0), batches=1, hardware={"sweep_s": 0.02, "handoff_s": 4e-3})
    _takes_what_its_replay_takes(costs, policy, decoding(8, fetch=8))


def test_a_streamed_head_frees_slots():
    arch, gpu = replace(SMALL, vocab_size=200_000), {"op_s": 5e-4}
    costs, policy = costs_of(
        (0, 100, 100, 0, 100, 0), arch=arch, batches=1, weight_slots=11, hardware={"sweep_s": 0.03}, gpu=gpu
    )
    _takes_what_its_replay_takes(costs, policy, decoding(8))


def test_what_the_cpu_attends_is_brought_by_one_thread():
    """Each result waits for the link; those of all GPU batches come one after the other."""
    costs, _ = costs_of((97, 3, 0, 100, 100, 0), gpu={"h2d_busy_latency_s": 2e-3}, cpu_attention_percent=100)
    phase = AttentionPhase(costs, batches(decoding(4, cpu=4), 1))
    assert len(phase.batches) == 4
    assert phase.seconds(0.0) >= sum(batch.attended_s for batch in phase.batches) >= 8e-3


def test_kv_on_disk_shares_the_disk_with_weights():
    """The thread that loads KV reads and copies in turn, and reads more slowly while weights are read."""
    costs, policy = costs_of(
        (40, 0, 0, 0, 100, 0), batches=2, hardware={"disk_read_bytes_per_s": 2e9}, gpu={"kv_load_bytes_per_s": 3e9}
    )
    _takes_what_its_replay_takes(costs, policy, decoding(16, context=40_000, disk=16))


@pytest.mark.parametrize("rate", [1e8, 3e8, 1e9, 3e9, 1e10, 3e10])
@pytest.mark.parametrize("beside", [0.6, 0.8])
def test_reads_that_computation_slows_last_longer(rate, beside):
    """From bound by the disk to bound by the cores."""
    disk = {"disk_read_bytes_per_s": rate, "disk_read_curve": (), "disk_read_core_s_per_byte": 1.6 / rate}
    percents, parts = (50, 0, 100, 0, 100, 0), {"arch": SMALL, "rows": 64, "batches": 1, "machine": "cpu"}
    seconds = []
    for part in (1.0, beside):
        costs, policy = costs_of(percents, hardware={"cores": 2, **disk, "disk_read_beside_compute": part}, **parts)
        _takes_what_its_replay_takes(costs, policy, decoding(64))
        seconds.append(sweep_time(costs, decoding(64), policy.gpu_batch_size).total_s)
    assert seconds[0] <= seconds[1] <= seconds[0] / beside


def _takes_what_its_replay_takes(costs, policy, load):
    replayed_s, _ = Replayer(costs, policy.gpu_batch_size).steady(load)
    assert sweep_time(costs, load, policy.gpu_batch_size).total_s == pytest.approx(replayed_s, rel=0.04)
