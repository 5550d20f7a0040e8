"""Seconds in which a lane is at work are a part of the wall's, by formulas and by events, whatever runs beside each other."""

import random
from dataclasses import replace

import pytest

from cost_model.simulation.simulate import simulate
from cost_model.timing.evaluate import evaluate
from cost_model.timing.sweep_bounds import sweep_time
from policies import Policy, Workload
from scripts.optimality.random_machines import random_problem
from tests.support.sweeps import costs_of, decoding


def drawn(seed):
    """A problem, and a policy that puts something into every tier."""
    problem, rng = random_problem(seed), random.Random(seed)
    shares = []
    for _ in range(3):
        gpu = rng.choice((0, 5, 40, 100))
        shares += [gpu, rng.choice((0, 0.5, 1)) * (100 - gpu)]
    policy = Policy.from_percent(
        tuple(shares),
        gpu_batch_size=rng.choice((4, 16, 64)),
        num_gpu_batches=rng.choice((1, 2, 5)),
        prompt_len=problem.workload.prompt_len,
        gen_len=problem.workload.gen_len,
        schedule=rng.choice(("rolling", "static")),
        cpu_attention_percent=rng.choice((0, 50, 100)),
        overlap=rng.random() < 0.8,
    )
    return problem, policy


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_no_lane_is_predicted_to_work_longer_than_the_wall(seed):
    for each in range(seed, seed + 20):
        problem, policy = drawn(each)
        found = evaluate(problem.arch, problem.hardware, problem.workload, policy, ignore_memory=True)
        assert all(0 <= seconds <= found.wall_s * (1 + 1e-9) for seconds in found.lanes_s.values()), each


@pytest.mark.parametrize("seed", range(12))
def test_no_lane_is_simulated_to_work_longer_than_the_job(seed):
    problem, policy = drawn(seed)
    job = Workload(prompt_len=64, gen_len=8, num_requests=3 * policy.block_size)
    arch = replace(problem.arch, num_layers=4)
    whole, grouped = (simulate(arch, problem.hardware, job, policy, full=full) for full in (True, False))
    for found in (whole, grouped):
        assert all(0 <= seconds <= found.job_s * (1 + 1e-9) for seconds in found.lanes_s.values())


def test_weights_and_fetched_kv_that_fill_the_link_keep_it_busy_all_the_time():
    costs, policy = costs_of((0, 100, 0, 100, 100, 0), rows=64, batches=8)
    found = sweep_time(costs, decoding(512, fetch=512, context=4000), policy.gpu_batch_size)
    assert found.bottleneck in ("pcie", "kv loads", "schedule", "slots")
    assert found.lanes_s["h2d"] == found.total_s  # together they would take longer alone: more than 100 % before


def test_a_lane_of_one_thread_works_for_its_own_seconds():
    costs, policy = costs_of((0, 100, 100, 0, 100, 0))
    found = sweep_time(costs, decoding(8), policy.gpu_batch_size)
    placed = costs.allocation.placement
    assert found.lanes_s["h2d"] == pytest.approx(
        placed.bytes_of("cpu", "attention", "expert", "head") / costs.hardware.gpu.h2d_bytes_per_s
    )
