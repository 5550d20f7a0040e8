"""From the flags and the lengths of the rows to a policy, what it will do, and the engine's options."""

from __future__ import annotations

import argparse
from pathlib import Path

from cost_model.sizes import BLOCK_TOKENS
from flexmoe.auto_policy import Forecaster
from flexmoe.device import Device
from flexmoe.llm import RESIDENT
from flexmoe.loader import Model, compute_dtype
from flexmoe.workload import Measured
from policies.policy import Policy, PolicyFile, Workload

_MOST_PREFILL_TOKENS = 4096


def is_auto(value: Path | None) -> bool:
    """Whether a flag that takes a file asks for this machine's own."""
    return str(value) == "auto"


def benchmark_rows(args: argparse.Namespace) -> Measured:
    """The rows of the benchmark."""
    rows = args.num_prompts or (args.gpu_batch_size or 16) * (args.num_gpu_batches or 1)
    workload = Workload(prompt_len=args.prompt_len, gen_len=args.gen_len, num_requests=rows)
    return Measured(workload=workload, longest_row=args.prompt_len + args.gen_len, rows=rows)


def forecaster(args: argparse.Namespace, model: Model, measured: Measured) -> Forecaster | None:
    """The planner, where the run asks for it: a job's dry run does, to say how long the job will take.

    Raises:
        FlexMoEError: the machine cannot be measured, or the file of its rates cannot be used.
    """
    wanted = args.hardware is not None or is_auto(args.policy) or (args.dry_run and args.input_file is not None)
    if not wanted or not measured.rows:
        return None
    device = Device(args.device)
    return Forecaster.of_machine(
        model.arch,
        measured.workload,
        compute_dtype(args.dtype, model, device.torch),
        hardware=args.hardware or "auto",
        device=args.device,
        directory=args.offload_dir,
        budgets={name: getattr(args, name) for name in ("gpu_mem", "cpu_mem", "nvme_mem")},
    )


def choose_policy(args: argparse.Namespace, model: Model, measured: Measured, planner: Forecaster | None) -> Policy:
    """The policy that the flags ask for.

    Raises:
        FlexMoEError: none fits, or the file of the policy is another model's or cannot be used.
    """
    if planner is not None and is_auto(args.policy):
        return planner.plan(args.kv_tokens)
    if args.policy and not is_auto(args.policy):
        file = PolicyFile.load(args.policy)
        if not args.force_policy:
            file.check_model(model.arch.fingerprint())
        return file.policy
    return _policy_of_flags(args, measured)


def engine_options(args: argparse.Namespace, measured: Measured, policy: Policy) -> dict:
    """The engine's options beside the policy."""
    kv_tokens, mean = args.kv_tokens, measured.workload
    if kv_tokens is None and not is_auto(args.policy) and _is_one_block(measured, policy.block_size):
        kv_tokens = measured.rows * (mean.prompt_len + mean.gen_len + BLOCK_TOKENS)
    return {
        "device": args.device,
        "dtype": args.dtype,
        "gpu_mem": args.gpu_mem,
        "cpu_mem": args.cpu_mem,
        "nvme_mem": args.nvme_mem,
        "offload_dir": args.offload_dir,
        "kv_tokens": kv_tokens,
        "longest_row": measured.longest_row,
        "gen_len": args.gen_len,
        "seed": args.seed,
        "keep_spans": args.trace is not None,
        **({} if args.reserve is None else {"reserve": args.reserve}),
    }


def _policy_of_flags(args: argparse.Namespace, measured: Measured) -> Policy:
    workload = measured.workload
    size, count = args.gpu_batch_size or 16, args.num_gpu_batches or 1
    flags = {"schedule": args.schedule, "overlap": args.overlap, "pin_weight": args.pin_weight}
    flags["prefill_tokens"] = args.prefill_tokens
    if args.prefill_tokens is None and _is_one_block(measured, size * count):
        flags["prefill_tokens"] = min(measured.rows * workload.prompt_len, _MOST_PREFILL_TOKENS)
    return Policy.from_percent(
        args.percent if args.percent is not None else RESIDENT,
        gpu_batch_size=size,
        num_gpu_batches=count,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        cpu_attention_percent=100.0 if args.cpu_cache_compute else 0.0,
        **{name: value for name, value in flags.items() if value is not None},
    )


def _is_one_block(measured: Measured, block_size: int) -> bool:
    """A job this short starts and ends together: pacing its admission would only stretch it."""
    return 0 < measured.rows <= block_size
