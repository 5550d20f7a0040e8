"""Machines that differ only in what takes no time, and no memory, get the same plan."""

import functools
from dataclasses import replace

import pytest

from cost_model import Hardware, Workload, solve
from cost_model.planner.constraints import Fixed
from tests.support.sweeps import SMALL

JOB = Workload(prompt_len=64, gen_len=32, num_requests=500)
#: What is fixed makes the search short: it is the same search.
FIXED, EFFORT = Fixed(schedule="rolling", gpu_batch_size=16), 0.03


def small(name, **memory):
    return Hardware.preset(name).with_budgets(**memory)


def of_gpu(machine, **changes):
    return replace(machine, gpus=(replace(machine.gpu, **changes),))


CUDA, CPU = small("rtx4090", gpu_mem=2.0, cpu_mem=3.5), replace(Hardware.preset("cpu"), host_memory_bytes=2 << 30)
CPU = of_gpu(CPU, memory_bytes=2 << 30)
ALIKE = {
    "another name": (CUDA, replace(of_gpu(CUDA, name="another"), name="another")),
    "other sources": (CUDA, replace(CUDA, sources={})),
    "cores that no copy takes": (CUDA, replace(CUDA, cores=3, disk_read_core_s_per_byte=1e-9, kv_block_core_s=1e-3)),
    "prompts that nobody scores": (CUDA, of_gpu(CUDA, score_s=1e-6)),
    "a budget of all host memory": (CPU, replace(CPU, cpu_budget_bytes=2 << 30)),
    "a budget above it": (CPU, replace(of_gpu(CPU, memory_bytes=9 << 30), cpu_budget_bytes=9 << 30)),
    "copies both ways on one memory": (CPU, of_gpu(CPU, d2h_duplex_bytes_per_s=CPU.gpu.d2h_duplex_bytes_per_s / 3)),
}


@functools.cache
def plan_of_base(is_cuda):
    return solve(SMALL, CUDA if is_cuda else CPU, JOB, effort=EFFORT, fixed=FIXED)


def planned(machine, fixed=FIXED):
    if fixed is FIXED and machine in (CUDA, CPU):
        return plan_of_base(machine is CUDA)
    return solve(SMALL, machine, JOB, effort=EFFORT, fixed=fixed)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow if at % 3 else ()) for at, what in enumerate(ALIKE)]
)
def test_machines_that_differ_in_what_takes_no_time_get_the_same_plan(what):
    one, other = map(planned, ALIKE[what])
    assert one.policy == other.policy and one.prediction.tokens_per_s == other.prediction.tokens_per_s


@pytest.mark.parametrize("flag", ["pin_weight"])
def test_flag_that_device_cpu_does_not_know_changes_no_plan(flag):
    one, other = planned(CPU), planned(CPU, replace(FIXED, **{flag: False}))
    assert replace(other.policy, **{flag: True}) == one.policy
    assert one.prediction.tokens_per_s == other.prediction.tokens_per_s
