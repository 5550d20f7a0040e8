"""The planner: its policies are the best that are found, fit, run, and say why."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from cost_model import Fixed, Hardware, ModelArch, Workload, solve
from cost_model.hardware.gemm_rates import GemmRates
from cost_model.memory.allocation import allocate
from cost_model.memory.memory_plan import plan_memory
from cost_model.model.weight_units import units_of
from cost_model.planner.constraints import Choice
from cost_model.planner.infeasible import least_capacity
from cost_model.planner.lp import Programme
from cost_model.planner.solve import with_larger_chunk
from cost_model.timing.evaluate import evaluate
from cost_model.timing.problem import Problem
from flexmoe.llm import LLM
from flexmoe.params import SamplingParams
from policies.common.errors import InfeasibleError, UsageError
from policies.policy import Policy, PolicyFile
from scripts.optimality.random_machines import random_problem
from scripts.optimality.rivals import Rivals
from tests.support.tiny import assert_greedy

MIXTRAL = ModelArch.from_name("mixtral-8x7b")
JOB = Workload(prompt_len=512, gen_len=32)
#: Rounding, fitting and what is reported do not depend on how long the climbs take.
QUICK = 0.01
#: Seeds of `random_problem` that are quick to judge.
SEEDS = (0, pytest.param(3, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def t4():
    """A plan for the T4, with advice."""
    return planned(Hardware.preset("t4"), advice=True)


def planned(hardware, arch=MIXTRAL, workload=JOB, **options):
    return solve(arch, hardware, workload, effort=QUICK, **options)


def counts_of(plan, arch, hardware, workload):
    return allocate(arch, plan.policy, workload, device=hardware.device, longest_row=workload.longest_row)


# The best.


@pytest.mark.parametrize("seed", SEEDS)
def test_no_rival_beats_the_planned_policy_by_two_percent(seed):
    problem = random_problem(seed)
    plan = solve(problem.arch, problem.hardware, problem.workload)
    rivals = Rivals(problem)
    tried = rivals.candidates(150)
    best = max(tried, key=rivals.tokens_per_s)
    climbed = [rivals.climb(policy, 100) for policy in (best, plan.policy)]
    assert len(tried) == 150
    assert max(map(rivals.tokens_per_s, (best, *climbed))) <= 1.02 * plan.prediction.tokens_per_s


@pytest.mark.parametrize(
    "seed, percents, shape",
    [
        # Weights in host memory alone need no buffers to load them; on device cpu it is the same memory.
        pytest.param(
            87,
            (0, 47.2, 100, 0, 100, 0),
            {"gpu_batch_size": 15, "prefill_tokens": 163},
            marks=pytest.mark.slow,
        ),
        # One row more than two batches hold, at a pace that goes with it; it fits in slots of one expert.
        (
            108,
            (0, 0, 0, 100, 0, 100),
            {"gpu_batch_size": 29, "prefill_tokens": 4835, "cpu_attention_percent": 100, "experts_per_unit": 1},
        ),
    ],
)
@pytest.mark.slow
def test_policies_that_several_steps_lead_to_are_found(seed, percents, shape):
    problem = random_problem(seed)
    problem = replace(problem, hardware=replace(problem.hardware, process_bytes=0))
    job = problem.workload
    rival = Policy.from_percent(percents, num_gpu_batches=1, prompt_len=job.prompt_len, gen_len=job.gen_len, **shape)
    found = evaluate(problem.arch, problem.hardware, job, rival)
    plan = solve(problem.arch, problem.hardware, job)
    assert found.tokens_per_s > 0
    assert plan.prediction.tokens_per_s > 0.995 * found.tokens_per_s


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 206))
def test_no_rival_of_many_beats_the_planned_policy_by_two_percent(seed):
    problem = random_problem(seed)
    plan = solve(problem.arch, problem.hardware, problem.workload)
    rivals = Rivals(problem)
    tried = rivals.candidates(1500)
    best = max(tried, key=rivals.tokens_per_s)
    climbed = [rivals.climb(policy, 600) for policy in (best, *tried[:5], plan.policy)]
    assert max(map(rivals.tokens_per_s, (best, *climbed))) <= 1.02 * plan.prediction.tokens_per_s


@pytest.mark.slow
def test_planning_takes_a_few_hundred_programmes_at_most():
    explanation = solve(MIXTRAL, Hardware.preset("t4"), JOB, advice=True).explanation
    assert 10 < explanation.programmes < 300
    assert explanation.evaluations < 10_000


def test_same_arguments_give_the_same_plan():
    hardware = Hardware.preset("a5000")
    first, second = planned(hardware), planned(hardware)
    assert first == second


@pytest.mark.parametrize("preset", ["t4", "cpu"])
def test_prediction_is_what_evaluate_says_of_the_policy(preset):
    hardware = Hardware.preset(preset)
    plan = planned(hardware)
    assert plan.prediction == evaluate(MIXTRAL, hardware, JOB, plan.policy)


@pytest.mark.slow
def test_larger_machines_are_never_slower():
    machines = [Hardware.preset("l4").with_budgets(cpu_mem=gib) for gib in (60, 110, 400)]
    speeds = [solve(MIXTRAL, hardware, JOB).prediction.tokens_per_s for hardware in machines]
    assert all(more >= 0.99 * less for less, more in pairwise(speeds))
    assert speeds[-1] > 1.3 * speeds[0]


def test_finite_job_never_keeps_more_rows_in_flight_than_it_has():
    plan = planned(Hardware.preset("h200"), workload=Workload(prompt_len=64, gen_len=16, num_requests=40))
    assert plan.prediction.rows_in_flight <= 40
    assert plan.prediction.job_s > 0


@pytest.mark.slow
def test_lengths_of_the_rows_are_planned_for():
    rows = [(100, 10)] * 90 + [(3000, 200)] * 10
    workload = Workload.of_lengths(rows, num_requests=5000)
    hardware = Hardware.preset("l4")
    plan = planned(hardware, workload=workload)
    assert plan.prediction == evaluate(MIXTRAL, hardware, workload, plan.policy)


# It fits, and it runs.


@pytest.mark.parametrize("seed", (20, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (21, 22, 23))))
def test_planned_policy_fits_and_its_shares_are_achieved_ones(seed):
    problem = random_problem(seed)
    arch, hardware, workload = problem.arch, problem.hardware, problem.workload
    plan = planned(hardware, arch, workload)
    allocation = counts_of(plan, arch, hardware, workload)
    memory = plan_memory(arch, plan.policy, allocation, device=hardware.device, compute_bytes=arch.dtype_bytes)
    memory.check(hardware.budgets(), dict.fromkeys(hardware.budgets(), ""))
    weights = allocation.placement.achieved_percent
    assert plan.policy.w_gpu_percent == pytest.approx(weights[0], abs=1e-9)
    assert plan.policy.w_cpu_percent == pytest.approx(weights[1], abs=1e-9)
    total = sum(allocation.kv_pages.values())
    assert plan.policy.cache_gpu_percent == pytest.approx(100 * allocation.kv_pages["gpu"] / total, abs=1e-9)
    assert plan.policy.cache_cpu_percent == pytest.approx(100 * allocation.kv_pages["cpu"] / total, abs=1e-9)
    assert not plan.policy.compress_weight and not plan.policy.compress_cache


def test_planned_policy_survives_its_file(tmp_path, t4):
    PolicyFile(t4.policy).save(tmp_path / "policy.json")
    assert PolicyFile.load(tmp_path / "policy.json").policy == t4.policy


@pytest.mark.parametrize(
    "host_mib, disk_mib, fixed",
    [
        pytest.param(40, 0, Fixed(), marks=pytest.mark.slow),
        (1.3, 30, Fixed(schedule="static")),
        (1.0, 30, Fixed()),
        pytest.param(1.6, 30, Fixed(cache_gpu_percent=0, cache_cpu_percent=30), marks=pytest.mark.slow),
        (2.2, 30, Fixed(w_gpu_percent=0, w_cpu_percent=50, cache_gpu_percent=0, cpu_attention_percent=50)),
    ],
    ids=str,
)
def test_planned_policy_runs(tiny, tmp_path, one_thread, host_mib, disk_mib, fixed):
    variant = tiny()
    arch = ModelArch.from_dir(variant.directory)
    prompts = [prompt for prompt in variant.prompts if len(prompt) <= 80]
    workload = Workload.of_lengths([(len(prompt), 6) for prompt in prompts])
    hardware = Hardware.preset("cpu").with_budgets(
        gpu_mem=host_mib / 1024, cpu_mem=host_mib / 1024, nvme_mem=disk_mib / 1024
    )
    hardware = replace(hardware, host_memory_bytes=int(host_mib * 2**20), cpu_budget_bytes=None, process_bytes=0)
    plan = planned(hardware, arch, workload, fixed=fixed)
    options = {"device": "cpu", "offload_dir": str(tmp_path / "offload"), "longest_row": workload.longest_row}
    llm = LLM(variant.directory, policy=plan.policy, workload=workload, **options)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    rows = [row for row, prompt in enumerate(variant.prompts) if len(prompt) <= 80]
    for row, out in zip(rows, outputs):
        assert_greedy(variant, row, list(out.outputs[0].token_ids), variant.expected(row, 6))


# What is fixed stays.

FIXED = [
    Fixed(w_gpu_percent=0, act_gpu_percent=0, act_cpu_percent=100, num_gpu_batches=3),
    Fixed(w_gpu_percent=5, w_cpu_percent=60, prefill_tokens=2048, weight_slots=3, pin_weight=False),
    Fixed(cache_gpu_percent=0, cache_cpu_percent=0, schedule="static", overlap=False),
    Fixed(half_blocks=2, gpu_batch_size=16, num_gpu_batches=4),
    Fixed(
        w_cpu_percent=0,
        cache_gpu_percent=0,
        cache_cpu_percent=100,
        cpu_attention_percent=0,
        gpu_batch_size=16,
        num_gpu_batches=4,
    ),
]
FIXED_ALONE = [
    Fixed(w_gpu_percent=0),
    Fixed(w_gpu_percent=5, w_cpu_percent=60),
    Fixed(w_cpu_percent=0),
    Fixed(cache_gpu_percent=0, cache_cpu_percent=0),
    Fixed(cache_gpu_percent=0, cache_cpu_percent=100, cpu_attention_percent=0),
    Fixed(act_gpu_percent=0, act_cpu_percent=100, num_gpu_batches=3),
    Fixed(gpu_batch_size=16, num_gpu_batches=4),
    Fixed(prefill_tokens=2048, weight_slots=3, pin_weight=False),
    Fixed(schedule="static", overlap=False),
]


@pytest.mark.parametrize(
    "fixed", [*FIXED, *(pytest.param(fixed, marks=pytest.mark.slow) for fixed in FIXED_ALONE)], ids=str
)
def test_what_is_fixed_stays(fixed):
    policy = planned(Hardware.preset("t4"), fixed=fixed).policy
    largest = 100 * max(unit.stored_bytes for unit in units_of(MIXTRAL)) / MIXTRAL.total_bytes
    for name, value in fixed.given.items():
        near = {"w": largest, "ca": 0.5, "ac": 0}.get(name[: name.find("_")][:2], 0) if name.endswith("percent") else 0
        assert getattr(policy, name) == pytest.approx(value, abs=near) if near else getattr(policy, name) == value
        if value == 0:
            assert getattr(policy, name) == 0


def test_schedule_is_a_short_way_to_fix_it():
    assert planned(Hardware.preset("l4"), schedule="static").policy.schedule == "static"


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"w_gpu_percent": 60, "w_cpu_percent": 50}, "add up to 110 %"),
        ({"cache_gpu_percent": -1}, "from 0 to 100"),
        ({"cpu_attention_percent": math.nan}, "from 0 to 100"),
        ({"gpu_batch_size": 0}, "at least 1"),
        ({"weight_slots": 1}, "at least 2"),
        ({"schedule": "fast"}, "rolling, static"),
        ({"half_blocks": 3}, "1 or 2"),
        ({"overlap": 1}, "true or false"),
    ],
)
def test_contradictions_are_refused(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        Fixed(**values)


def test_kv_capacity_that_is_given_limits_the_rows():
    plan = planned(Hardware.preset("a5000"), kv_tokens=20_000)
    assert plan.prediction.rows_in_flight <= 20_000 / JOB.prompt_len


def test_wider_numbers_are_planned_for():
    hardware = Hardware.preset("a5000")
    plan = planned(hardware, dtype_bytes=4)
    assert plan.prediction == evaluate(MIXTRAL, hardware, JOB, plan.policy, dtype_bytes=4)


# Why.


def test_what_binds_has_a_price(t4):
    prices = {price.name: price.tokens_per_s for price in t4.explanation.prices}
    assert prices and all(price > 0 for price in prices.values())
    assert list(prices.values()) == sorted(prices.values(), reverse=True)
    assert t4.explanation.bottleneck == t4.prediction.bottleneck


def test_price_of_memory_is_what_a_little_more_of_it_gives():
    hardware = Hardware.preset("l4").with_budgets(cpu_mem=110, nvme_mem=0)
    problem = Problem(arch=MIXTRAL, hardware=hardware, workload=Workload(prompt_len=64, gen_len=256), dtype_bytes=2)
    choice = Choice(schedule="rolling", fill_sweeps=256, gpu_batch_size=64, modes=("gpu", "cpu"), rows=1000)

    def optimum(cpu_mem):
        machine = hardware.with_budgets(cpu_mem=cpu_mem)
        return Programme(replace(problem, hardware=machine), choice, Fixed()).solve()

    prices = {price.name: price.tokens_per_s for price in optimum(110).prices}
    gained = (optimum(110.1).tokens_per_s - optimum(110).tokens_per_s) / 0.1
    assert prices["cpu memory"] == pytest.approx(gained, rel=0.02)


def test_programme_agrees_with_evaluate_where_nothing_is_rounded():
    """One block that is resident: the optimum of its own choice is what `evaluate` predicts."""
    workload = Workload(prompt_len=128, gen_len=64, num_requests=64)
    problem = Problem(arch=MIXTRAL, hardware=Hardware.preset("h200"), workload=workload, dtype_bytes=2)
    choice = Choice(
        schedule="static", fill_sweeps=1, gpu_batch_size=64, modes=("gpu",), rows=64, most_rows=64, streams=False
    )
    found = Programme(problem, choice, Fixed()).solve()
    policy = choice.policy(workload, 64, "gpu")
    predicted = evaluate(MIXTRAL, problem.hardware, workload, policy).tokens_per_s
    assert found.block_size == pytest.approx(64)
    assert found.tokens_per_s == pytest.approx(predicted, rel=0.05)


def test_advice_is_solved_again_and_nothing_is_compressed_unasked(t4):
    advice = t4.explanation.advice
    assert advice and all(each.gain > 0 for each in advice)
    assert [each.gain for each in advice] == sorted((each.gain for each in advice), reverse=True)
    assert all(bool(each.ask) == each.change.startswith("int") for each in advice)
    assert not t4.policy.compress_weight and not t4.policy.compress_cache


@pytest.mark.slow
def test_host_memory_helps_where_it_binds():
    plan = solve(
        MIXTRAL, Hardware.preset("rtx4090").with_budgets(cpu_mem=70, nvme_mem=100), JOB, advice=True, effort=0.4
    )
    changes = {each.change: each.gain for each in plan.explanation.advice}
    assert changes["+16 GiB host memory"] > 0.05


def test_explanation_is_json(t4):
    document = json.loads(json.dumps(t4.explanation.to_json()))
    assert document["programmes"] == t4.explanation.programmes
    assert document["advice"][0]["change"] == t4.explanation.advice[0].change


# Nothing fits.


@pytest.mark.parametrize(
    "budgets, names",
    [
        ({"gpu_mem": 2}, ["gpu"]),
        pytest.param({"cpu_mem": 60, "nvme_mem": 0}, ["gpu", "cpu", "disk"], marks=pytest.mark.slow),
        ({"cpu_mem": 0}, ["cpu"]),
    ],
)
def test_named_increase_is_enough_and_one_percent_less_is_not(budgets, names):
    hardware = Hardware.preset("t4").with_budgets(**budgets)
    options = {"gpu": "gpu_mem", "cpu": "cpu_mem", "disk": "nvme_mem"}
    with pytest.raises(InfeasibleError, match="no policy fits this machine") as error:
        planned(hardware)
    assert error.value.exit_code == 4
    for name, option in options.items():
        if name not in names:
            assert f"({option}) would not be enough" in str(error.value)
            continue
        gib = float(str(error.value).split(f"{option} of ")[1].split(" GiB")[0])
        assert solve(MIXTRAL, hardware.with_budgets(**{option: gib}), JOB, effort=0.001).policy
        with pytest.raises(InfeasibleError):
            planned(hardware.with_budgets(**{option: 0.99 * gib}))


def test_refusal_names_what_is_fixed():
    with pytest.raises(InfeasibleError, match="with w_gpu_percent 54 .* GPU memory.*gpu_mem of 49"):
        planned(Hardware.preset("t4"), fixed=Fixed(w_gpu_percent=54))


def test_machine_without_a_gpu_is_refused_by_its_memory():
    hardware = Hardware.preset("cpu").with_budgets(nvme_mem=20)
    with pytest.raises(InfeasibleError, match="host memory|disk"):
        planned(hardware)
    problem = Problem(arch=MIXTRAL, hardware=hardware, workload=JOB, dtype_bytes=2)
    assert least_capacity(problem, Fixed(), "disk") > hardware.disk_bytes


def test_rivals_find_nothing_either_where_nothing_fits():
    problem = random_problem(0)
    problem = replace(problem, hardware=replace(problem.hardware, host_memory_bytes=2**28, disk_bytes=0))
    with pytest.raises(InfeasibleError):
        planned(problem.hardware, problem.arch, problem.workload)
    assert not Rivals(problem).candidates(5)


# What it loads.


def test_programme_is_loaded_only_where_a_plan_is_made():
    code = "import sys; import cost_model; print('pulp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_no_warning_of_the_library_reaches_the_user():
    code = (
        "from cost_model import *; "
        "solve(ModelArch.from_name('mixtral-8x7b'), Hardware.preset('t4'), Workload(prompt_len=64, gen_len=8), effort=0.01)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_policies_of_the_planner_are_policies(t4):
    assert isinstance(t4.policy, Policy) and t4.policy.overlap and t4.policy.pin_weight


def test_kv_goes_to_disk_only_where_that_is_faster():
    hardware = Hardware.preset("t4").with_budgets(gpu_mem=16, cpu_mem=200, nvme_mem=1500)
    plan = planned(hardware, workload=Workload(prompt_len=512, gen_len=32))
    policy, prediction = plan.policy, plan.prediction
    host_left = hardware.host_memory_bytes - prediction.memory.total("cpu")
    on_disk = prediction.memory.parts["disk"].get("kv", 0)
    if on_disk <= host_left:  # it would fit there: then it is slower there
        moved = replace(policy, cache_cpu_percent=100 - policy.cache_gpu_percent)
        assert (
            not on_disk
            or evaluate(MIXTRAL, hardware, Workload(prompt_len=512, gen_len=32), moved).tokens_per_s
            < 0.997 * prediction.tokens_per_s
        )


def amx_machine(memory_bytes=32 * 2**30):
    """A machine without a GPU, whose products are faster the more tokens they have."""
    cpu = Hardware.preset("cpu")
    curve = GemmRates(tokens=(1, 512, 1024), weight_elements=(1e8,), flops_per_s=((1e10, 1.5e12, 2.7e12),))
    gpu = replace(cpu.gpu, experts={2: curve, 4: curve}, memory_bytes=memory_bytes)
    return replace(cpu, gpus=(gpu,), host_memory_bytes=memory_bytes)


def test_as_many_tokens_of_an_expert_are_computed_at_once_as_are_worth_it_and_fit():
    job, fixed = Workload(prompt_len=512, gen_len=4), Fixed(prefill_tokens=8192)
    plan = planned(amx_machine(), workload=job, fixed=fixed)
    assert plan.policy.expert_chunk == 1024
    small = replace(plan.policy, expert_chunk=None)
    evaluated = {p.expert_chunk: evaluate(MIXTRAL, amx_machine(), job, p) for p in (small, plan.policy)}
    assert evaluated[1024].tokens_per_s > evaluated[None].tokens_per_s
    flat = Hardware.preset("cpu")
    assert planned(flat, workload=job, fixed=fixed).policy.expert_chunk is None


def test_the_memory_of_more_tokens_at_once_is_charged():
    machine = amx_machine(2**50)
    wide = replace(MIXTRAL, ffn=32 * MIXTRAL.ffn, num_experts=2)  # the largest workspace is that of its experts
    problem = Problem.of(wide, machine, JOB)
    policy = Policy.from_percent(
        [0, 0, 100, 0, 100, 0], gpu_batch_size=4, num_gpu_batches=1, prompt_len=512, gen_len=32, prefill_tokens=8192
    )
    usual, larger = (
        problem.memory(changed, problem.allocate(changed)).total("gpu")
        for changed in (replace(policy, expert_chunk=None), replace(policy, expert_chunk=8192))
    )
    assert larger > usual
    assert with_larger_chunk(problem, policy).expert_chunk == 1024
    memory = problem.memory(policy, problem.allocate(policy))
    tight = amx_machine(memory.total("gpu") + memory.total("cpu") + 10**6)
    assert with_larger_chunk(Problem.of(wide, tight, JOB), policy).expert_chunk is None
