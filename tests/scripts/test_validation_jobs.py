"""The configurations of mixed lengths: every kind of job, both schedules, all tiers, the same for the same seed."""

from collections import Counter

import pytest

from cost_model import Hardware, ModelArch
from cost_model.simulation.simulate import simulate
from cost_model.timing.evaluate import evaluate
from policies import Policy
from scripts.gpu.context import reduced_model
from scripts.make_checkpoint import SIZES
from scripts.validation.configs import Configuration
from scripts.validation.drift import corrected
from scripts.validation.jobs import KINDS, MT_BENCH, REAL_WEIGHTS, draw_jobs

SECONDS = (0.02, 60.0)


@pytest.fixture(scope="module")
def archs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    shapes = {name: SIZES["demo"] | {"num_hidden_layers": layers} for name, layers in (("small", 2), (REAL_WEIGHTS, 3))}
    return {name: ModelArch.from_dir(reduced_model(root / name, shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def found(archs):
    return draw_jobs(archs, Hardware.preset("cpu"), 1, 2, seconds=SECONDS)


def test_every_kind_is_there_under_both_schedules_with_weights_in_host_memory_and_on_disk(found):
    assert Counter(c.kind for c in found) == dict.fromkeys(KINDS, 2)
    assert len({c.name for c in found}) == len(found)
    for on_host, on_disk in zip(found[::2], found[1::2], strict=True):
        assert {on_host.policy.schedule, on_disk.policy.schedule} == {"rolling", "static"}
        assert on_host.policy.w_cpu_percent >= 30
        assert on_disk.policy.w_gpu_percent + on_disk.policy.w_cpu_percent <= 70
    assert {c.kind for c in found if c.model == REAL_WEIGHTS} == {name for name, kind in KINDS.items() if kind.real}


def test_each_fits_the_machine_and_takes_as_long_as_it_should(found, archs):
    for c in found:
        machine = Hardware.preset("cpu")
        evaluate(archs[c.model], machine, c.workload, c.policy)  # raises where its bytes do not fit
        taken_s = simulate(archs[c.model], machine, c.workload, c.policy, rows=c.waiting).job_s
        assert SECONDS[0] <= taken_s <= SECONDS[1]


def test_the_seed_decides(found, archs):
    again, other = (draw_jobs(archs, Hardware.preset("cpu"), seed, 1, seconds=SECONDS) for seed in (1, 2))
    assert again == found[::2] and other != found[::2]


def test_rows_are_of_their_kind_and_the_longest_of_a_window_wait_first(found):
    jobs = {c.kind: c for c in found[::2]}
    assert {s for s, _ in jobs["mt-bench"].rows} <= set(MT_BENCH) and len(MT_BENCH) == 80
    assert max(n for _, n in jobs["mt-bench"].rows) > 3 * min(n for _, n in jobs["mt-bench"].rows)
    assert len(jobs["few"].rows) <= 6 and len(jobs["real-few"].rows) <= 6
    assert {n for _, n in jobs["scoring"].rows} == {0}
    for c in found:
        window = [s + n for s, n in c.rows[: 8 * c.policy.block_size]]
        assert window == sorted(window, reverse=True)


def job(rows, samples=1):
    policy = Policy.from_percent(
        (0, 100, 0, 100, 100, 0), gpu_batch_size=2, num_gpu_batches=2, prompt_len=20, gen_len=5
    )
    return Configuration(name="a", model="small", kind="a", policy=policy, rows=rows, samples=samples)


def test_every_sample_is_a_row_and_a_scored_prompt_one_that_gets_a_token():
    samples, scored = job(((20, 5), (10, 3)), samples=3), job(((20, 0), (9, 0)))
    assert samples.waiting == [(20, 5)] * 3 + [(10, 3)] * 3
    assert scored.waiting == [(19, 1), (8, 1)]
    for c in (samples, scored):
        assert Counter(c.waiting) == {(s, n): rows for s, n, rows in c.workload.lengths}
    assert [request.params.n for request in samples.requests()] == [3, 3]
    assert [request.params.scores_prompt for request in scored.requests()] == [0, 0]


def test_a_prediction_is_corrected_by_the_speed_of_the_cores(archs):
    """A job without the disk takes twice as long on cores of half the speed; one that waits for the disk hardly longer."""
    machine, c = Hardware.preset("cpu"), job(((20, 5),) * 4)
    slow_disk = Policy.from_percent(
        (0, 0, 0, 100, 100, 0), gpu_batch_size=2, num_gpu_batches=2, prompt_len=20, gen_len=5
    )

    def ratio(policy, memory, speeds):
        def predict(hardware):
            return simulate(archs["small"], hardware, c.workload, policy, full=True)

        found = corrected(predict, machine, memory, speeds)
        ratios = {lane: found.lanes_s[lane] / s for lane, s in predict(machine).lanes_s.items() if s}
        return found.job_s / predict(machine).job_s, ratios

    whole, lanes = ratio(c.policy, 0.5, [(2, 0.5), (256, 0.5)])
    assert whole == pytest.approx(2, rel=1e-6) and lanes["gpu"] == pytest.approx(2, rel=1e-6)
    whole, lanes = ratio(slow_disk, 0.5, [(2, 0.5)])
    assert 1 <= whole < 1.5 and lanes["disk_read"] == pytest.approx(1, rel=0.02)
    assert ratio(c.policy, 1.0, [])[0] == 1.0
    slow_products, _ = ratio(c.policy, 1.0, [(1, 1.0), (2, 0.5)])
    assert 1.1 < slow_products < 2  # products of one token, and all that is none, are as fast as they were
