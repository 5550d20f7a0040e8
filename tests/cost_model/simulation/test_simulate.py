"""A job on paper: its rows go through the runtime's admission, its sweeps take what a replay says."""

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import groupby, islice, pairwise

import pytest

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import PAGE_TOKENS
from cost_model.simulation import job_sweeps as job_sweeps_module
from cost_model.simulation import simulate as simulate_module
from cost_model.simulation.simulate import simulate
from cost_model.timing import problem as problem_module
from cost_model.timing.job_rows import shuffled_rows, typical_rows
from policies import Workload
from policies.common.errors import InfeasibleError, StorageError, UsageError
from policies.placement import TIERS
from policies.schedule import LANES
from tests.support.small_jobs import MACHINE, MIXTRAL, SMALL, job, policy_of

ON_HOST, THREE_TIERS = (10, 90, 0, 100, 100, 0), (20, 50, 20, 50, 100, 0)


@pytest.fixture
def by_groups(monkeypatch):
    """`by_groups(row_sweeps)`: simulate small jobs as large ones are, following about so many rows times sweeps."""

    def call(row_sweeps):
        monkeypatch.setattr(job_sweeps_module, "ROW_SWEEPS", row_sweeps)
        monkeypatch.setattr(simulate_module, "REPLAYED_OPS", 0)

    return call


# What is simulated.


def test_rows_that_enter_together_prefill_once_and_decode_together():
    found = simulate(SMALL, MACHINE, job(16), policy_of(ON_HOST, prefill_tokens=2000))
    assert found.sweeps == 32
    assert list(found.timeline.rows) == [16] * 32
    assert list(found.timeline.tokens) == [16 * 64] + [16] * 31
    assert found.tokens_per_s == pytest.approx(16 * 32 / found.job_s)


def test_paced_rows_enter_a_few_at_a_time_and_the_block_drains_at_the_end():
    found = simulate(SMALL, MACHINE, job(200), policy_of(ON_HOST))
    rows = found.timeline.rows
    assert rows.max() == 32
    assert all(a <= b for a, b in pairwise(rows[:30]))
    assert all(a >= b for a, b in zip(rows[-30:], rows[-29:]))
    assert all(seconds > 0 for seconds in found.phases_s.values())


def test_seconds_add_up_and_no_lane_works_longer_than_the_job():
    found = simulate(SMALL, MACHINE, job(200), policy_of(THREE_TIERS, cpu_attention_percent=50.0))
    assert sum(found.phases_s.values()) == pytest.approx(found.job_s)
    assert found.timeline.end_s[-1] == pytest.approx(found.job_s)
    assert found.timeline.start_s[1:] == pytest.approx(found.timeline.end_s[:-1])
    assert set(found.lanes_s) == set(LANES)
    assert all(0 < seconds <= found.job_s * (1 + 1e-9) for seconds in found.lanes_s.values())


@pytest.mark.parametrize("schedule", ["rolling", "static"])
def test_memory_in_use_never_exceeds_the_plan_and_ends_at_its_constant_part(schedule):
    policy = policy_of(THREE_TIERS, schedule=schedule)
    found = simulate(SMALL, MACHINE, job(150), policy)
    for tier in TIERS:
        used, planned = found.timeline.memory_bytes[tier], found.memory.total(tier)
        kv = found.memory.parts[tier].get("kv", 0)
        assert used.max() <= planned
        assert used.max() > planned - 0.5 * kv
        assert used.min() >= planned - kv


def test_an_endless_job_is_refused():
    with pytest.raises(UsageError, match="num_requests"):
        simulate(SMALL, MACHINE, Workload(prompt_len=8, gen_len=8), policy_of(ON_HOST))


def test_rows_that_no_tier_can_hold_are_refused(monkeypatch):
    real = problem_module.allocate
    monkeypatch.setattr(
        problem_module,
        "allocate",
        lambda *a, **k: replace(real(*a, **k), kv_pages={"gpu": 0, "cpu": 3, "disk": 0}),
    )
    with pytest.raises(InfeasibleError, match="room for 48 tokens"):
        simulate(SMALL, MACHINE, job(4), policy_of(ON_HOST))


# Order of the rows.


def test_all_rows_of_a_histogram_come_once_in_an_order_that_the_seed_decides():
    lengths = ((10, 5, 30), (20, 7, 15), (300, 1, 5))
    workload = Workload(prompt_len=40, gen_len=5, num_requests=50, lengths=lengths)
    rows = list(shuffled_rows(workload, 1))
    assert Counter(rows) == {(s, n): count for s, n, count in lengths}
    assert rows == list(shuffled_rows(workload, 1)) != list(shuffled_rows(workload, 2))
    stretched = Counter(shuffled_rows(replace(workload, num_requests=1003), 1))
    assert sum(stretched.values()) == 1003
    assert all(abs(stretched[s, n] - 1003 * count / 50) <= 1 for s, n, count in lengths)


def test_typical_rows_have_the_mix_of_the_histogram():
    lengths = tuple((s, s % 7 + 1, s) for s in range(1, 20))
    workload = Workload(prompt_len=10, gen_len=4, num_requests=190, lengths=lengths)
    for start, stretch in ((0, 190), (777, 190), (0, 1900)):
        rows = islice(typical_rows(workload, 3), start, start + stretch)
        found = Counter(rows)
        assert all(abs(found[s, n] - stretch * count / 190) <= 3 for s, n, count in lengths)


def test_rows_wait_in_the_order_in_which_they_are_given():
    """Sorted rows leave a static block together; short ones beside long ones keep their places until the long ones end."""
    rows = [(64, 8)] * 32 + [(64, 32)] * 32
    mixed = [row for pair in zip(rows[:32], rows[32:], strict=True) for row in pair]
    workload, policy = Workload.of_lengths(rows), policy_of(ON_HOST, schedule="static", prefill_tokens=4000)
    sorted_, one_by_one = (simulate(SMALL, MACHINE, workload, policy, rows=order) for order in (rows, mixed))
    assert sorted_.sweeps == 8 + 32 and one_by_one.sweeps == 2 * 32
    assert one_by_one.job_s > 1.2 * sorted_.job_s
    with pytest.raises(UsageError, match="63 rows are given for a job of 64"):
        simulate(SMALL, MACHINE, workload, policy, rows=rows[1:])


# Large jobs.

JOBS = {
    "rolling": (ON_HOST, {}, job(800)),
    "rolling, CPU attention": (ON_HOST, {"cpu_attention_percent": 100.0}, job(800)),
    "static": (ON_HOST, {"schedule": "static"}, job(800)),
    "static, slow fill": (ON_HOST, {"schedule": "static", "prefill_tokens": 300}, job(800)),
    "waves": (ON_HOST, {"prefill_tokens": 4000}, job(800)),
    "slow pace": (ON_HOST, {"prefill_tokens": 40}, job(800)),
    "three tiers": (THREE_TIERS, {"cpu_attention_percent": 50.0}, job(800)),
    "three tiers, waves": (THREE_TIERS, {"prefill_tokens": 4000}, job(800)),
    "large block": (ON_HOST, {"rows": 64, "batches": 8}, job(4000)),
    "long prompts in chunks": (ON_HOST, {"prefill_tokens": 100, "prompt_len": 300}, job(600, prompt_len=300)),
    "mixed lengths": (
        ON_HOST,
        {},
        job(5000, lengths=tuple((s, n, 1) for s in (20, 50, 120) for n in (10, 30, 60))),
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_by_groups_takes_what_its_full_walk_takes(name, by_groups):
    percent, rest, workload = JOBS[name]
    policy = policy_of(percent, **rest)
    full = simulate(SMALL, MACHINE, workload, policy, full=True)
    by_groups(60_000 if workload.lengths else 8_000)
    found = simulate(SMALL, MACHINE, workload, policy)
    assert len(found.timeline.rows) < 0.8 * len(full.timeline.rows)
    assert found.job_s == pytest.approx(full.job_s, rel=0.02)
    assert found.tokens_per_s == pytest.approx(full.tokens_per_s, rel=0.02)
    assert found.sweeps == pytest.approx(full.sweeps, rel=0.02)
    for lane, seconds in full.lanes_s.items():
        assert found.lanes_s[lane] == pytest.approx(seconds, rel=0.05, abs=0.002 * full.job_s)


@pytest.mark.parametrize("prefill_tokens", [None, pytest.param(4000 * 512, marks=pytest.mark.slow)])
def test_a_job_of_a_million_rows_is_followed_for_a_few_lives_of_a_row_only(prefill_tokens):
    policy = policy_of(
        ON_HOST,
        rows=250,
        batches=16,
        prompt_len=512,
        gen_len=256,
        cpu_attention_percent=100.0,
        prefill_tokens=prefill_tokens,
    )
    found = simulate(MIXTRAL, MACHINE, job(1_000_000, prompt_len=512, gen_len=256), policy)
    assert len(found.timeline.rows) < 50 * 256
    assert found.sweeps >= 1_000_000 / 4000 * 256
    assert found.tokens_per_s * found.job_s == pytest.approx(256e6)
    assert found.timeline.rows.max() <= 4000 and found.timeline.end_s[-1] == pytest.approx(found.job_s)


def test_timeline_of_a_large_job_leaps_once_over_what_recurs(by_groups):
    by_groups(20_000)
    found = simulate(SMALL, MACHINE, job(800), policy_of(ON_HOST))
    gaps = found.timeline.start_s[1:] - found.timeline.end_s[:-1]
    assert (gaps > 1e-6 * found.job_s).sum() == 1
    assert (gaps > -1e-9 * found.job_s).all()
    assert sum(found.phases_s.values()) == pytest.approx(found.job_s)


# What ran and what is predicted.


def test_trace_holds_the_first_sweeps_as_the_runtime_writes_them(tmp_path):
    policy = policy_of(THREE_TIERS, cpu_attention_percent=50.0)
    found = simulate(SMALL, MACHINE, job(100), policy, keep_trace_sweeps=2)
    found.write_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"gpu", "h2d", "h2d/kv", "d2h", "cpu", "disk_read/0", "disk_read/kv0"} <= set(names.values())
    spans = [e for e in events if e["ph"] == "X"]
    until = found.timeline.end_s[1] * 1e6
    assert max(e["ts"] + e["dur"] for e in spans if names[e["tid"]] == "gpu") <= until * (1 + 1e-9)
    assert [e["name"] for e in spans].count("collect 2") == 2
    with pytest.raises(StorageError, match="trace"):
        found.write_chrome_trace(tmp_path / "missing" / "trace.json")
    with pytest.raises(UsageError, match="keep_trace_sweeps"):
        simulate(SMALL, MACHINE, job(4), policy).write_chrome_trace(tmp_path / "none.json")


def on_track(spans, track):
    """(name, bytes) of a track's spans in the order of time."""
    return [(name, nbytes) for lane, name, *_, nbytes in sorted(spans, key=lambda span: span[2]) if lane == track]


def names_of(operations):
    """Names in order; the recorder has several spans of a KV load, its pieces."""
    return [name for name, _ in groupby(name for name, _ in operations)]


@pytest.mark.parametrize(
    ("percent", "rest"),
    [
        ((20, 40, 30, 30, 34, 33), {"cpu_attention_percent": 50.0, "weight_slots": 2}),
        ((30, 30, 0, 60, 100, 0), {"schedule": "static", "prefill_tokens": 70, "weight_slots": 2}),
        ((100, 0, 100, 0, 100, 0), {"prefill_tokens": 30}),
    ],
)
def test_simulated_operations_are_those_that_the_engine_runs(tiny, tmp_path, one_thread, percent, rest):
    from flexmoe.engine.config import EngineConfig
    from flexmoe.engine.engine import Engine
    from flexmoe.models.loader import load_model
    from flexmoe.params import EngineRequest, SamplingParams

    s, n, count = 37, 6, 14
    policy = policy_of(percent, rows=3, batches=2, prompt_len=s, gen_len=n, **rest)
    workload = job(count, prompt_len=s, gen_len=n)
    config = EngineConfig(
        policy=policy, workload=workload, longest_row=s + n, device="cpu", offload_dir=tmp_path, keep_spans=True
    )
    engine = Engine(load_model(str(tiny().directory)), config)
    try:
        for row in range(count):
            params = SamplingParams(max_tokens=n, ignore_eos=True)
            prompt = tuple((7 * row + at) % 250 for at in range(s))
            engine.submit(EngineRequest(request_id=str(row), prompt_token_ids=prompt, params=params))
        start_s = time.perf_counter()
        while engine.unfinished:
            engine.step()
        ran = [span for span in engine.recorder._spans if span[2] >= start_s]
        arch, sweeps = engine.model.arch, engine.sweeps
    finally:
        engine.close()
    found = simulate(
        arch, Hardware.preset("cpu"), workload, policy, dtype_bytes=4, full=True, keep_trace_sweeps=len(sweeps)
    )
    assert found.sweeps == len(sweeps)
    assert [round(v) for v in found.timeline.tokens] == [sweep.tokens for sweep in sweeps]
    for track in ("gpu", "h2d/kv", "d2h", "cpu"):
        mine, theirs = on_track(found.spans, track), on_track(ran, track)
        if track != "d2h":  # there the recorder has a span for each way of being attended in a GPU batch
            assert names_of(mine) == names_of(theirs), track
        assert sum(nbytes for _, nbytes in mine) == sum(nbytes for _, nbytes in theirs), track
    tracks = {lane.rstrip("0123456789") for lane, *_ in found.spans}
    # The recorder tells what the host gathers and scatters from the copies of KV.
    assert tracks == {lane.rstrip("0123456789") for lane, *_ in ran} - {"h2d/gather", "d2h/home"}


# Samples of one prompt.


@pytest.mark.parametrize("schedule", ["rolling", "static"])
@pytest.mark.parametrize("row_sweeps", [1_000_000, 2_000], ids=["every row", "in bundles"])
def test_samples_compute_the_pages_of_their_prompt_once(by_groups, row_sweeps, schedule):
    by_groups(row_sweeps)
    prompt, samples, prompts = 100, 4, 30
    workload = replace(job(samples * prompts, prompt_len=prompt, gen_len=8), rows_per_prompt=samples)
    policy = policy_of(ON_HOST, prefill_tokens=800, prompt_len=prompt, gen_len=8, schedule=schedule)
    found = simulate(SMALL, MACHINE, workload, policy)
    shared = (prompt - 1) // PAGE_TOKENS * PAGE_TOKENS
    computed = prompts * (samples * prompt - (samples - 1) * shared) + samples * prompts * 7
    recurring = 1.0 if row_sweeps == 1_000_000 else found.job_s / (found.timeline.end_s[-1])
    assert found.timeline.tokens.sum() * recurring == pytest.approx(computed, rel=1e-9 if recurring == 1.0 else 0.1)


def test_rows_given_in_order_share_prompts_in_that_order():
    rows = [(90, 3)] * 2 + [(40, 5)] * 2
    workload = replace(Workload.of_lengths(rows), rows_per_prompt=2.0)
    found = simulate(SMALL, MACHINE, workload, policy_of(ON_HOST, prefill_tokens=2000), rows=rows)
    after = [length - (length - 1) // PAGE_TOKENS * PAGE_TOKENS for length in (90, 40)]
    assert list(found.timeline.tokens[:2]) == [90 + 40, sum(after) + 2], "the others enter one sweep later"
