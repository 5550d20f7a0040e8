"""The planner's screen: it fits, it says what it must, and its numbers are those of the prediction."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from cost_model.cli.block_size_curve import block_sizes, curve, wall, with_rows
from cost_model.cli.report import BOUND_BY, Report, bar
from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.model.packing import packed_as
from cost_model.planner.solve import Explanation
from cost_model.planner.what_if import Advice
from cost_model.simulation.simulate import simulate
from cost_model.timing.evaluate import evaluate
from policies.common.memory_units import GIB
from policies.placement import TIERS
from policies.policy import Policy
from policies.workload import Workload
from tests.support.drawn import drawn

ARCH = ModelArch.from_name("mixtral-8x7b")
JOB = Workload(prompt_len=512, gen_len=32)
POLICY = Policy.from_percent(
    (5, 80, 0, 60, 50, 50), gpu_batch_size=16, num_gpu_batches=6, prompt_len=512, gen_len=32, cpu_attention_percent=30
)


ADVICE = (
    Advice(change="+16 GiB host memory", tokens_per_s=12.1, gain=0.21),
    Advice(change="int4 weights", tokens_per_s=31.0, gain=2.1, ask="--compress-weight int4"),
    Advice(change="host memory and CPU attention twice as fast", tokens_per_s=10.4, gain=0.04),
    Advice(change="+8 GiB GPU memory", tokens_per_s=10.3, gain=0.03),
)
EXPLANATION = Explanation(
    bottleneck="h2d", prices=(), lp_tokens_per_s=11.0, advice=ADVICE, programmes=3, evaluations=7, seconds=0.1
)


def report(preset="t4", policy=POLICY, workload=JOB, arch=ARCH, explanation=None, simulation=None):
    hardware = Hardware.preset(preset)
    prediction = evaluate(arch, hardware, workload, policy, ignore_memory=True)
    return Report(
        arch=arch,
        hardware=hardware,
        workload=workload,
        dtype_bytes=2,
        origin="rates from machine.json",
        policy=policy,
        prediction=prediction,
        explanation=explanation,
        simulation=simulation,
    )


@cache
def simulated():
    return simulate(ARCH, Hardware.preset("t4"), replace(JOB, num_requests=300), POLICY)


def line(lines, start):
    return next(each for each in lines if each[11:].startswith(start))


@pytest.mark.parametrize(
    "preset, model", drawn(list(product(Hardware.preset_names(), ("mixtral-8x22b-instruct", "qwen3-235b-a22b-2507"))))
)
def test_the_screen_fits_a_screen(preset, model):
    lengths = tuple((100 + s, 1 + s % 7, 10_000) for s in range(50))
    job = Workload(prompt_len=125, gen_len=4, num_requests=500_000, lengths=lengths)
    policy = replace(POLICY, gpu_batch_size=512, num_gpu_batches=48, prefill_tokens=100_000, overlap=False)
    arch = ModelArch.from_name(model)
    lines = report(preset, policy, job, arch, EXPLANATION, simulated()).lines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_two_half_blocks_are_printed_with_all_their_slots():
    policy = replace(POLICY, num_gpu_batches=4, half_blocks=2)
    made = report(policy=policy)
    assert f"{made.prediction.allocation.slots} slots; two half-blocks" in " ".join("\n".join(made.lines()).split())
    assert "half-block" not in "\n".join(report().lines())


def test_sections_stand_in_the_order_in_which_they_are_read():
    lines = report(explanation=EXPLANATION).lines()
    names = [each[:11].strip() for each in lines if each[:11].strip()]
    assert names == ["machine", "model", "job", "policy", "predicted", "memory", "lanes", "limit", "advice"]
    assert not [each for each in report().lines() if each.startswith("advice")], "a given policy gets none"


def test_advice_says_what_to_ask_for_and_what_it_would_give():
    found = report(explanation=EXPLANATION)
    text = "\n".join(found.lines())
    then = 3.1 * found.predicted()["tokens_per_s"]
    assert "+16 GiB host memory: +21 %" in text
    shown = f"{then:,.0f}" if then >= 100 else f"{then:.3g}"
    assert f"int4 weights: at least {shown} tokens/s, 3.1x; ask by --compress-weight int4" in text


def test_the_model_is_shown_as_the_policy_packs_it():
    text = " ".join(" ".join(report(arch=packed_as(ARCH, "int4")).lines()).split())
    assert "46.70 G parameters, 2" in text and "GiB in int4 in groups of 128 (attention, expert);" in text


def test_a_job_with_an_end_is_predicted_by_its_simulation():
    simulation = simulated()
    found = report(workload=replace(JOB, num_requests=300), simulation=simulation)
    assert "300 requests in " in "\n".join(found.lines()) and "drain" in "\n".join(found.lines())
    predicted = found.policy_file().predicted
    assert (predicted["job_s"], predicted["tokens_per_s"]) == (simulation.job_s, simulation.tokens_per_s)
    assert found.lane_shares()["h2d"] == simulation.lanes_s["h2d"] / simulation.job_s
    assert report().to_json()["phases_s"] is None


def test_a_chain_in_which_nothing_waits_is_computation():
    found = report()
    busy = replace(found.prediction, bottleneck="schedule", lanes_s={"gpu": 0.99, "h2d": 0.5}, wall_s=1.0)
    waiting = replace(busy, lanes_s={"gpu": 0.7, "h2d": 0.5})
    assert "compute-bound" in "\n".join(replace(found, prediction=busy).lines())
    assert "chain of operations" in "\n".join(replace(found, prediction=waiting).lines())


def test_percents_are_those_achieved_and_sum_to_100():
    found = report()
    for shares in found.achieved().values():
        assert sum(shares) == pytest.approx(100)
    placed = found.prediction.allocation.placement.achieved_percent
    assert [f"{share:.1f}" for share in placed] == line(found.lines(), "weights").split()[1:]
    assert line(found.lines(), "activations").split()[1:] == ["50.0", "50.0", "0.0"]


def test_memory_is_used_of_limit_with_its_largest_items():
    found = report()
    text = line(found.lines(), "cpu  ")
    used = found.prediction.memory.total("cpu") / GIB
    assert f"{used:.2f} of 192.00 GiB" in text and "weights" in text
    assert text.count("#") == round(20 * used / 192)


def test_what_is_too_much_stands_out():
    found = report(policy=replace(POLICY, w_gpu_percent=80.0, w_cpu_percent=20.0))
    assert "TOO MUCH" in line(found.lines(), "gpu  ")
    assert "TOO MUCH" not in "".join(report().lines())


def test_lanes_are_shares_of_the_time_and_idle_ones_are_left_out():
    found = report(policy=replace(POLICY, w_cpu_percent=95.0, cache_cpu_percent=100.0, cpu_attention_percent=0.0))
    lanes = "".join(each for each in found.lines() if "of the time" in each)
    share = 100 * found.prediction.lanes_s["gpu"] / found.prediction.wall_s
    assert f"{share:.1f} % of the time" in lanes
    assert "disk_read" not in lanes and "cpu" not in lanes


@pytest.mark.parametrize("bottleneck", BOUND_BY)
def test_every_bottleneck_has_words(bottleneck):
    found = report()
    idle = replace(found.prediction, bottleneck=bottleneck, lanes_s={"gpu": 0.0})
    text = "\n".join(replace(found, prediction=idle).lines())
    assert BOUND_BY[bottleneck].split(",")[0] in text


def test_the_names_of_all_bounds_of_a_sweep_have_words():
    found = set()
    for preset in ("t4", "cpu"):
        for overlap in (True, False):
            for weights in (0, 5):
                policy = replace(POLICY, overlap=overlap, w_gpu_percent=float(weights), weight_slots=2)
                found.add(report(preset, policy).prediction.bottleneck)
    assert len(found) >= 3 and found <= set(BOUND_BY)


def test_a_job_with_an_end_says_when_and_one_without_says_what_ten_thousand_rows_take():
    assert "10,000 requests in" in "\n".join(report().lines())
    ends = report(workload=replace(JOB, num_requests=777))
    assert "777 requests in" in "\n".join(ends.lines()) and ends.prediction.job_s is not None


def test_the_policy_file_carries_every_section():
    file = report().policy_file()
    assert file.model == ARCH.fingerprint() and file.hardware["name"] == "t4"
    assert file.planned_workload() == JOB
    assert file.predicted["tokens_per_s"] == report().prediction.tokens_per_s
    assert (file.policy.w_gpu_percent, file.policy.w_cpu_percent) == report().achieved()["weights"][:2]
    assert set(file.predicted["memory_bytes"]) == set(TIERS)


def test_a_bar_shows_what_is_above_nothing():
    assert bar(0, 10) == ".........."
    assert bar(1e-9, 10) == "#........."
    assert bar(0.5, 10) == "#####....."
    assert bar(7.0, 10) == "##########"


# The same policy with other block sizes.


def predict(policy):
    return evaluate(ARCH, Hardware.preset("t4"), JOB, policy, ignore_memory=True)


def test_a_block_of_other_size_has_whole_batches_and_the_same_pace():
    assert with_rows(POLICY, POLICY.block_size) == POLICY
    small = with_rows(POLICY, 5)
    assert (small.gpu_batch_size, small.num_gpu_batches) == (5, 1)
    assert with_rows(POLICY, 160).prefill_tokens == 160 * POLICY.prefill_tokens // POLICY.block_size


def test_the_curve_rises_over_block_sizes_and_contains_the_policy():
    points = curve(POLICY, predict)
    rows = [point.rows for point in points]
    assert rows == sorted(set(rows)) == block_sizes(POLICY) and rows[0] == 1 and rows[-1] == 4 * POLICY.block_size
    own = next(point for point in points if point.rows == POLICY.block_size)
    assert own.prediction == predict(POLICY)


def test_memory_ends_at_the_wall_and_not_a_batch_before():
    policy = replace(POLICY, num_gpu_batches=80, prefill_tokens=16000)
    most = wall(policy, predict)
    budget = Hardware.preset("t4").budgets()
    assert most % policy.gpu_batch_size == 0
    predict(with_rows(policy, most)).memory.check(budget, dict.fromkeys(budget, ""))
    beyond = predict(with_rows(policy, most + policy.gpu_batch_size)).memory
    assert any(beyond.total(tier) > budget[tier] for tier in TIERS)
    assert wall(replace(POLICY, num_gpu_batches=1), predict) is None, "no wall within the range that is drawn"
