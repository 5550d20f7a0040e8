"""From the flags and the lengths of the rows to a policy, what it will do, and the engine's options."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cost_model.memory.allocation import PAGE_TOKENS
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.simulation.simulate import Simulation
from flexmoe.cli.forecast import Forecaster
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.engine.router_counter import coactivation_bytes
from flexmoe.errors import InfeasibleError
from flexmoe.llm import RESIDENT
from flexmoe.models.loader import Model, compute_dtype
from flexmoe.preflight.lengths import Lengths
from flexmoe.preflight.workload import Measured
from flexmoe.system.device import Device
from policies.policy import Policy, PolicyFile, Workload

log = logging.getLogger(__name__)
_MOST_PREFILL_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run is going to be.

    Args:
        measured: the rows that it is planned for; longer ones fit no memory, and the engine refuses them.
        policy: of the engine.
        options: of the engine, beside it.
        engine: what it will allocate.
        predicted: what it will do, where a planner was asked for.
        rows_without_room: rows that are left out.
    """

    measured: Measured
    policy: Policy
    options: dict
    engine: EnginePlan
    predicted: Simulation | None
    rows_without_room: int = 0


def plan_run(args: argparse.Namespace, model: Model, measured: Measured, lengths: Lengths | None = None) -> RunPlan:
    """The plan for rows that are to run; where a few of a job are too long for any memory, the plan for the others.

    Args:
        measured: all of them.
        lengths: of each; None means that each has to fit.

    Raises:
        FlexMoEError: nothing fits, or what the flags ask for cannot be used.
    """
    usage = _expert_usage(args, model)
    planner = _forecaster(args, model, measured, usage)
    try:
        return _planned(args, model, measured, planner, usage)
    except InfeasibleError:
        fitting = None if lengths is None else _longest_that_fits(args, model, lengths, planner, usage)
        if fitting is None or fitting >= measured.longest_row:
            raise
    others = lengths.measured(model.arch.max_position, fitting)
    without = [row for row, tokens in enumerate(lengths.longest) if tokens > fitting]
    log.warning(
        "rows that no memory has room for: %d (the longest may reach %d tokens); they become error rows, and the job is "
        "planned for rows of up to %d tokens",
        len(without),
        measured.longest_row,
        fitting,
    )
    return replace(_planned(args, model, others, planner, usage), rows_without_room=len(without))


def _planned(
    args: argparse.Namespace, model: Model, measured: Measured, planner: Forecaster | None, usage: ExpertUsage | None
) -> RunPlan:
    planner = planner and replace(planner, workload=measured.workload)
    policy = _choose_policy(args, model, measured, planner, usage)
    options = _engine_options(args, measured, policy, usage)
    plan = EnginePlan.of(model, EngineConfig(policy=policy, workload=measured.workload, **options))
    predicted = planner.predict(policy, options["kv_tokens"], plan.allocation.cache_experts) if planner else None
    return RunPlan(measured=measured, policy=policy, options=options, engine=plan, predicted=predicted)


def _longest_that_fits(
    args: argparse.Namespace,
    model: Model,
    lengths: Lengths,
    planner: Forecaster | None,
    usage: ExpertUsage | None,
) -> int | None:
    """The longest row that runs where it is alone, in tokens; None where even the shortest does not.

    Each is tried with the policy that the job has without the longer ones, since those do not count then.
    """

    def fits(tokens: int) -> bool:
        measured = lengths.measured(model.arch.max_position, tokens)
        try:
            own = planner and replace(planner, workload=measured.workload)
            policy = _choose_policy(args, model, measured, own, usage)
            options = {
                **_engine_options(args, measured, policy, usage),
                "kv_tokens": 1,
            }  # and what the longest row needs
            EnginePlan.of(model, EngineConfig(policy=policy, workload=measured.workload, **options))
        except InfeasibleError:
            return False
        return True

    values = sorted({tokens for tokens in lengths.longest if tokens})
    # Mostly it is not a row that does not fit, and to know that one plan is enough.
    return _last(values, fits) if fits(values[0]) else None


def _last(values: list[int], holds: Callable[[int], bool]) -> int | None:
    """The last of sorted values for which it holds, as it does for all before; None where it does for none."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(values[middle]) else (low, middle)
    return values[low - 1] if low else None


def is_auto(value: Path | None) -> bool:
    """Whether a flag that takes a file asks for this machine's own."""
    return str(value) == "auto"


def benchmark_rows(args: argparse.Namespace) -> Measured:
    """The rows of the benchmark."""
    rows = args.num_prompts or (args.gpu_batch_size or 16) * (args.num_gpu_batches or 1)
    workload = Workload(prompt_len=args.prompt_len, gen_len=args.gen_len, num_requests=rows)
    return Measured(workload=workload, longest_row=args.prompt_len + args.gen_len, rows=rows)


def _expert_usage(args: argparse.Namespace, model: Model) -> ExpertUsage | None:
    """How often each expert was chosen in another run, where that is given.

    Raises:
        FlexMoEError: the file cannot be used, or is another model's.
    """
    if args.expert_usage is None:
        return None
    usage = ExpertUsage.load(args.expert_usage)
    usage.check_model(model.arch)
    return usage


def _forecaster(
    args: argparse.Namespace, model: Model, measured: Measured, usage: ExpertUsage | None
) -> Forecaster | None:
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
        usage=usage,
        on_demand=args.expert_cache != "off",
        held_bytes=coactivation_bytes(model.arch) if args.router_stats else 0,
    )


def _choose_policy(
    args: argparse.Namespace, model: Model, measured: Measured, planner: Forecaster | None, usage: ExpertUsage | None
) -> Policy:
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
    order = usage.unit_order(model.arch) if usage else None
    return _policy_of_flags(args, measured, order)


def _engine_options(args: argparse.Namespace, measured: Measured, policy: Policy, usage: ExpertUsage | None) -> dict:
    """The engine's options beside the policy."""
    kv_tokens, mean = args.kv_tokens, measured.workload
    if kv_tokens is not None and kv_tokens < measured.longest_row:
        log.warning(
            "--kv-tokens is %d, and the longest row may reach %d tokens: the KV cache gets room for it",
            kv_tokens,
            measured.longest_row,
        )
    if kv_tokens is None and not is_auto(args.policy) and _is_one_block(measured, policy.block_size):
        kv_tokens = measured.rows * (mean.prompt_len + mean.gen_len + PAGE_TOKENS)
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
        "expert_cache": args.expert_cache,
        "expert_usage": usage,
        "router_stats": args.router_stats is not None,
        **({} if args.reserve is None else {"reserve": args.reserve}),
    }


def _policy_of_flags(
    args: argparse.Namespace, measured: Measured, expert_order: tuple[tuple[int, ...], ...] | None
) -> Policy:
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
        expert_order=expert_order,
        **{name: value for name, value in flags.items() if value is not None},
    )


def _is_one_block(measured: Measured, block_size: int) -> bool:
    """A job this short starts and ends together: pacing its admission would only stretch it."""
    return 0 < measured.rows <= block_size
