"""The replay of a sweep: the order in which things happen, and how long they take."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from cost_model.model.weight_units import head_chunks, head_rows
from cost_model.simulation.replay import STEADY_SWEEPS, Replayer, replay
from cost_model.timing.sweep_bounds import sweep_time
from cost_model.timing.sweep_load import batches
from tests.support.sweeps import RESIDENT, SMALL, costs_of, decoding, random_sweep

#: Users of `Resources` that the recorder has no track for are not in the spans either.
TRACKS = {
    "gpu",
    "cpu",
    "h2d",
    "h2d/kv",
    "h2d/act",
    "d2h",
    "d2h/act",
    "disk_read/0",
    "disk_read/kv0",
    "disk_read/act",
    "disk_write/kv0",
    "disk_write/act",
}


# How long.


def test_a_sweep_of_what_is_resident_takes_the_sum_of_its_operations():
    costs, policy = costs_of(RESIDENT)
    load, layers = decoding(24), costs.arch.num_layers
    cut = batches(load, policy.gpu_batch_size)
    touched = costs.touched(24)
    expert = (
        costs.expert_s(24 * costs.arch.top_k / touched, costs.arch.expert_params) * touched / costs.arch.num_experts
    )
    layer = sum(costs.project_s(b) + costs.attend_s(b) for b in cut) + costs.arch.num_experts * expert
    rows = [stop - start for start, stop in (head_rows(costs.arch, at) for at in range(head_chunks(costs.arch)))]
    head = sum(costs.head_s(24, count * costs.arch.head_row_params) for count in rows)
    outside = sum(costs.embed_s(b) for b in cut) + head + costs.sample_s(24) + costs.host_s(24)
    ops = layers * (2 * 3 + 1 + costs.arch.num_experts) + 3 + 1 + len(rows) + 1
    replayed = replay(costs, [load] * 2, policy.gpu_batch_size)
    assert replayed.sweep_s == pytest.approx([layers * layer + outside + ops * costs.op_s] * 2)


def test_a_dense_layer_runs_its_one_mlp_over_every_token():
    arch = replace(SMALL, dense_layers=(0, 2), dense_ffn=7168)
    costs, policy = costs_of(RESIDENT, arch=arch)
    replayed = replay(costs, [decoding(24)], policy.gpu_batch_size, keep_spans=True)
    experts = {s[1]: s[3] - s[2] for s in replayed.spans if s[1].startswith("expert")}
    assert len(experts) == 2 + 4 * arch.num_experts
    assert experts["expert layers.2.expert.0"] == pytest.approx(costs.expert_s(24, arch.dense_params) + costs.op_s)


def test_host_units_that_are_not_pinned_pass_through_a_staging_slot():
    percent, slow = (0, 100, 100, 0, 100, 0), {"h2d_bytes_per_s": 1e9}
    pinned, loose = (costs_of(percent, gpu=slow, weight_slots=2, pin_weight=pin) for pin in (True, False))
    first_s = [replay(costs, [decoding(24)], policy.gpu_batch_size).sweep_s[0] for costs, policy in (pinned, loose)]
    arch, copy_s = loose[0].arch, loose[0].copy_s
    first_unit_s, second_unit_s = copy_s(arch.attention_bytes_in(0)), copy_s(arch.expert_bytes)
    assert 0.7 * first_unit_s <= first_s[1] - first_s[0] <= 1.1 * (first_unit_s + second_unit_s)


def test_a_link_bound_sweep_takes_the_time_of_its_bytes():
    costs, policy = costs_of((0, 100, 100, 0, 100, 0), gpu={"h2d_bytes_per_s": 1e8}, weight_slots=20, rows=80)
    streamed = costs.allocation.placement.bytes_of("cpu", "attention", "expert", "head")
    replayed = replay(costs, [decoding(240)] * 3, policy.gpu_batch_size)
    assert replayed.sweep_s[-1] == pytest.approx(streamed / 1e8, rel=1e-6)
    assert replayed.lanes_s[-1]["h2d"] == pytest.approx(replayed.sweep_s[-1], rel=1e-6)


def test_disk_units_wait_for_a_copy_on_cuda_and_for_none_on_cpu():
    percent, slow = (0, 0, 100, 0, 100, 0), {"disk_read_bytes_per_s": 1e8}
    for machine, copied in (("rtx4090", True), ("cpu", False)):
        costs, policy = costs_of(percent, machine=machine, hardware=slow)
        streamed = costs.allocation.placement.bytes_of("disk", "attention", "expert", "head")
        replayed = replay(costs, [decoding(24)] * 3, policy.gpu_batch_size)
        assert replayed.sweep_s[-1] == pytest.approx(streamed / 1e8, rel=1e-2)
        assert (replayed.lanes_s[-1]["h2d"] > 0) == copied


def test_links_work_while_the_host_prepares_the_next_sweep():
    hardware = {"sweep_s": 1.0}
    costs, policy = costs_of(
        (0, 100, 100, 0, 100, 0), gpu={"h2d_bytes_per_s": 1e10}, hardware=hardware, weight_slots=30, rows=80
    )
    first, *_, last = replay(costs, [decoding(240)] * 3, policy.gpu_batch_size).sweep_s
    unit_s = costs.copy_s(costs.arch.expert_bytes)
    assert first - last > 20 * unit_s


def test_without_overlap_a_sweep_takes_the_sum_of_all_operations():
    costs, policy = costs_of((20, 40, 30, 40, 0, 50), overlap=False, cpu_attention_percent=50.0)
    load = decoding(24, gpu=8, fetch=4, disk=6, cpu=6)
    replayed = replay(costs, [load] * 2, policy.gpu_batch_size, keep_spans=True)
    spans = sorted(replayed.spans, key=lambda span: span[2])
    assert all(a[3] <= b[2] + 1e-12 for a, b in pairwise(spans))
    assert replayed.sweep_s[0] == pytest.approx(replayed.sweep_s[1])
    assert sum(replayed.lanes_s[0].values()) <= replayed.sweep_s[0] * (1 + 1e-12)
    faster, _ = costs_of((20, 40, 30, 40, 0, 50), cpu_attention_percent=50.0)
    assert replay(faster, [load] * 3, policy.gpu_batch_size).sweep_s[-1] < 0.9 * replayed.sweep_s[-1]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_no_lane_is_at_work_longer_than_the_sweep_and_none_does_less_than_its_work(device):
    rng = random.Random(5)
    for _ in range(15):
        costs, policy, load = random_sweep(rng, device)
        replayed = replay(costs, [load] * 3, policy.gpu_batch_size)
        closed = sweep_time(costs, load, policy.gpu_batch_size)
        for lane, seconds in replayed.lanes_s[-1].items():
            assert seconds <= replayed.sweep_s[-1] * (1 + 1e-9)
            if lane in ("disk_write", "cpu"):  # one user each, so what they do is what the closed form adds up
                assert seconds >= closed.lanes_s[lane] * (1 - 1e-6)


# In which order.


def spans_of(costs, policy, load, sweeps=2):
    replayed = replay(costs, [load] * sweeps, policy.gpu_batch_size, keep_spans=True)
    by_track = {}
    for span in replayed.spans:
        by_track.setdefault(span[0], []).append(span)
    return replayed, by_track


MIXED = decoding(24, gpu=6, fetch=6, disk=6, cpu=6)


@pytest.mark.parametrize("machine", ["rtx4090", "cpu"])
def test_tracks_are_those_of_the_recorder_and_each_works_in_order(machine):
    costs, policy = costs_of((10, 45, 25, 50, 34, 33), machine=machine, cpu_attention_percent=50.0)
    _, by_track = spans_of(costs, policy, MIXED)
    assert set(by_track) == TRACKS
    for spans in by_track.values():
        assert all(a[3] <= b[2] + 1e-12 for a, b in pairwise(spans))


def test_on_the_cpu_what_is_not_the_disks_is_done_by_the_thread_that_computes():
    costs, policy = costs_of((100, 0, 25, 50, 0, 66), machine="cpu", cpu_attention_percent=50.0)
    _, by_track = spans_of(costs, policy, MIXED)
    batches = costs.allocation.activation_tiers
    away = [f"act {batch}" for batch, tier in enumerate(batches) if tier == "cpu"]
    own = [*by_track["gpu"], *by_track["h2d/kv"], *by_track["d2h"], *by_track["cpu"]]
    own += [span for track in ("h2d/act", "d2h/act") for span in by_track[track] if span[1] in away]
    assert away and len(away) < len(batches)
    assert all(a[3] <= b[2] + 1e-12 for a, b in pairwise(sorted(own, key=lambda span: span[2])))
    assert all(span[4] > 0 for span in (*by_track["h2d/act"], *by_track["h2d/kv"], *by_track["d2h"]))
    read = [(start, end) for _, _, start, end, _ in by_track["disk_read/kv0"]]
    assert any(a < start < b for a, b in read for _, _, start, _, _ in by_track["gpu"]), "the disk is at work beside it"


@pytest.mark.parametrize("machine", ["rtx4090", "cpu"])
@pytest.mark.parametrize("slots", [2, 5, 11])
def test_units_arrive_before_their_use_and_never_fill_more_than_the_slots(machine, slots):
    costs, policy = costs_of((10, 45, 25, 50, 100, 0), machine=machine, weight_slots=slots, cpu_attention_percent=50.0)
    _, by_track = spans_of(costs, policy, MIXED, sweeps=1)
    tier_of = costs.allocation.placement.tier_of
    direct = machine == "cpu"
    brought = [*by_track["h2d"], *(by_track["disk_read/0"] if direct else [])]
    arrived = {s[1]: s for s in sorted(brought, key=lambda s: -s[2])}  # the first time: then it is for the next sweep
    taken = []
    for unit, tier in tier_of.items():
        if tier == "gpu" or unit.kind == "embed":
            continue
        name, layer = str(unit), unit.layer
        named = {"attention": (f"project {layer}", f"attend {layer}"), "expert": (f"expert {name}",) * 2}
        first, last = named.get(unit.kind, (f"head {name}",) * 2)
        uses = [s for s in by_track["gpu"] if s[1] in (first, last)]
        assert arrived[name][3] <= uses[0][2] + 1e-12
        taken.append((arrived[name][2], 1, uses[-1][3]))
    for start, _, _ in taken:
        assert sum(begin <= start < end - 1e-12 for begin, _, end in taken) <= slots


def test_disk_units_are_read_before_they_are_copied_within_the_staging_slots():
    costs, policy = costs_of((10, 45, 100, 0, 100, 0))
    _, by_track = spans_of(costs, policy, decoding(24), sweeps=1)
    copied = {s[1]: s for s in by_track["h2d"]}
    reads = [s for s in by_track["disk_read/0"] if s[1] in copied and s[2] < copied[s[1]][2]]
    assert len(reads) >= costs.allocation.placement.count_of("disk", "attention", "expert", "head")
    assert all(read[3] <= copied[read[1]][2] + 1e-12 for read in reads)
    for read in reads:
        held = sum(r[2] <= read[2] < copied[r[1]][3] - 1e-12 for r in reads)
        assert held <= costs.allocation.staging_slots


def nth(spans, name):
    return [span for span in spans if span[1] == name]


def test_kv_is_loaded_before_it_is_attended_and_that_of_rows_on_disk_stored_after_it_was_loaded():
    costs, policy = costs_of((100, 0, 0, 50, 100, 0), batches=2)
    _, by_track = spans_of(costs, policy, decoding(16, fetch=8, disk=8), sweeps=1)
    for layer in range(costs.arch.num_layers):
        loads, stores = nth(by_track["h2d/kv"], f"kv {layer}"), nth(by_track["d2h"], f"kv {layer}")
        projects, attends = nth(by_track["gpu"], f"project {layer}"), nth(by_track["gpu"], f"attend {layer}")
        assert len(loads) == len(stores) == len(attends) == 2
        for load, store, project, attend in zip(loads, stores, projects, attends):
            assert load[3] <= attend[2] + 1e-12
            assert project[3] <= store[2] + 1e-12
        assert loads[1][3] <= stores[1][2] + 1e-12
        [read], [write] = nth(by_track["disk_read/kv0"], f"kv {layer}"), nth(by_track["disk_write/kv0"], f"kv {layer}")
        assert read[3] <= loads[1][2] + 1e-12 and stores[1][3] <= write[2] + 1e-12


def test_kv_of_the_next_layers_first_batch_is_loaded_under_the_experts():
    costs, policy = costs_of((100, 0, 0, 100, 100, 0), batches=1)
    _, by_track = spans_of(costs, policy, decoding(8, context=4000, fetch=8), sweeps=1)
    for layer in range(1, costs.arch.num_layers):
        [load], [attend] = nth(by_track["h2d/kv"], f"kv {layer}"), nth(by_track["gpu"], f"attend {layer - 1}")
        assert load[2] == pytest.approx(attend[3])


def test_experts_wait_for_the_cpus_attention_and_the_links_do_not():
    slow = {"cpu_attention_bytes_per_s": 1e8}
    costs, policy = costs_of((0, 100, 0, 100, 100, 0), hardware=slow, cpu_attention_percent=100.0, weight_slots=8)
    _, by_track = spans_of(costs, policy, decoding(24, cpu=24), sweeps=1)
    for layer in range(costs.arch.num_layers):
        attended, [route] = nth(by_track["cpu"], f"attend {layer}"), nth(by_track["gpu"], f"route {layer}")
        assert max(s[3] for s in attended) < route[2]
        assert any(attended[0][2] < copy[2] < attended[-1][3] for copy in by_track["h2d"]) or layer == 0


def test_hidden_states_that_live_elsewhere_are_stored_before_they_are_loaded():
    costs, policy = costs_of((100, 0, 100, 0, 0, 50), batches=2)
    _, by_track = spans_of(costs, policy, decoding(16), sweeps=1)
    for batch in range(2):
        up, down = nth(by_track["h2d/act"], f"act {batch}"), nth(by_track["d2h/act"], f"act {batch}")
        assert len(up) == len(down) == costs.arch.num_layers
        assert all(d[3] <= u[2] + 1e-12 for d, u in zip(down, up))
    on_disk = costs.allocation.activation_tiers.index("disk")
    assert {s[1] for s in by_track["disk_write/act"]} == {f"act {on_disk}"}


def test_a_walk_gives_the_same_whatever_was_walked_before():
    rng = random.Random(2)
    costs, policy, load = random_sweep(rng)
    replayer = Replayer(costs, policy.gpu_batch_size)
    first = replayer.replay([load] * 2)
    replayer.replay([decoding(3)])
    again = replayer.replay([load] * 2)
    assert first.sweep_s == again.sweep_s and first.lanes_s == again.lanes_s


@pytest.mark.parametrize("seed", range(8))
def test_operations_that_are_joined_take_as_long_as_one_by_one(seed):
    costs, policy, load = random_sweep(random.Random(seed))
    joined, one_by_one = (replay(costs, [load] * 3, policy.gpu_batch_size, keep_spans=keep) for keep in (False, True))
    assert joined.sweep_s == pytest.approx(one_by_one.sweep_s, rel=1e-9)
    for found, expected in zip(joined.lanes_s, one_by_one.lanes_s, strict=True):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_a_steady_sweep_is_one_in_a_row_of_like_ones(seed):
    costs, policy, load = random_sweep(random.Random(seed))
    replayer = Replayer(costs, policy.gpu_batch_size)
    in_a_row = replayer.replay([load] * STEADY_SWEEPS[-1]).sweep_s
    assert replayer.steady(load)[0] in [in_a_row[sweeps - 1] for sweeps in STEADY_SWEEPS]
