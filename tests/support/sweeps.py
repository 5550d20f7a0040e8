"""Sweeps for the cost model: shapes, policies and loads, chosen and random."""

from dataclasses import replace

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import allocate
from cost_model.model.arch import ModelArch
from cost_model.timing.job_phases import job_phases
from cost_model.timing.op_costs import Costs
from cost_model.timing.sweep_load import RowGroup, SweepLoad
from policies import Policy, Workload

MIXTRAL = ModelArch.from_name("mixtral-8x7b")
SMALL = replace(
    MIXTRAL, num_layers=6, hidden=1024, ffn=3584, num_heads=16, num_kv_heads=4, head_dim=64, vocab_size=16000
)
MANY_EXPERTS = replace(
    MIXTRAL, num_layers=5, hidden=2048, ffn=768, num_experts=64, top_k=8, num_kv_heads=4, vocab_size=60000
)
RESIDENT = (100, 0, 100, 0, 100, 0)


def costs_of(percent, *, arch=SMALL, machine="rtx4090", rows=8, batches=3, hardware=None, gpu=None, **rest):
    """Costs of a policy on a machine with some of its rates replaced."""
    there = Hardware.preset(machine)
    there = replace(there, gpus=(replace(there.gpu, **(gpu or {})),), **(hardware or {}))
    workload = Workload(prompt_len=64, gen_len=32)
    policy = Policy.from_percent(
        percent, gpu_batch_size=rows, num_gpu_batches=batches, prompt_len=64, gen_len=32, **rest
    )
    allocation = allocate(arch, policy, workload, device=there.device, longest_row=workload.longest_row)
    return Costs(arch, there, policy, allocation, arch.dtype_bytes), policy


def decoding(rows, context=96, **modes):
    """A load in which so many rows decode; by mode, or all of them from device memory."""
    groups = modes or {"gpu": rows}
    return SweepLoad(
        groups={m: RowGroup(decode_rows=float(n), decode_context=float(n * context)) for m, n in groups.items()},
        logits=float(rows),
    )


def random_case(rng, device=None, arch=None, **fixed):
    """A policy that somebody may plan, on some machine, with the fields that are given: costs, policy, workload."""
    arch = arch or rng.choice([MIXTRAL, SMALL, MANY_EXPERTS])
    cuda = [name for name in Hardware.preset_names() if name != "cpu"]
    machine = "cpu" if (device or rng.choice(["cuda", "cuda", "cpu"])) == "cpu" else rng.choice(cuda)
    hardware = Hardware.preset(machine)
    s, n = rng.choice([16, 64, 128, 512, 1024]), rng.choice([8, 32, 64, 128, 256])
    w_gpu, kv_gpu = rng.choice([0, 5, 10, 30, 60, 100]), rng.choice([0, 0, 5, 100])
    w_cpu, kv_cpu = rng.choice([0.3, 0.7, 1, 1]) * (100 - w_gpu), rng.choice([1, 1, 1, 0.5]) * (100 - kv_gpu)
    policy = Policy.from_percent(
        (w_gpu, w_cpu, kv_gpu, kv_cpu, 100, 0),
        gpu_batch_size=rng.choice([32, 64, 128, 256]),
        num_gpu_batches=rng.choice([1, 2, 4, 8]),
        prompt_len=s,
        gen_len=n,
        weight_slots=rng.choice([None, None, 8, 16]),
        cpu_attention_percent=rng.choice([0, 0, 100, 100, 100]),
        schedule=rng.choice(["rolling", "rolling", "static"]),
        **fixed,
    )
    workload = Workload(prompt_len=s, gen_len=n)
    allocation = allocate(arch, policy, workload, device=hardware.device, longest_row=workload.longest_row)
    return Costs(arch, hardware, policy, allocation, arch.dtype_bytes), policy, workload


def random_sweep(rng, device=None, arch=None, **fixed):
    costs, policy, workload = random_case(rng, device, arch, **fixed)
    phases = [p for p in job_phases(policy, costs.allocation, workload).phases if p.sweeps > 0]
    return costs, policy, rng.choice(phases).load
