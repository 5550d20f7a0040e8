"""The planner's command line: ``python -m cost_model``. The report goes to stdout, errors to stderr."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost_model.cli.arguments import DEFAULT_GEN_LEN, DEFAULT_MACHINE, DEFAULT_PROMPT_LEN, SHARES, check, parser
from cost_model.cli.report import Report
from cost_model.hardware.cache import last_measured
from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.model.config_fields import DTYPE_BYTES
from cost_model.model.packing import check_unpacked, packed_as
from cost_model.planner.constraints import Fixed
from cost_model.planner.solve import Plan, solve
from cost_model.timing.evaluate import Prediction, evaluate
from policies.common.command_line import guarded, say
from policies.common.errors import InfeasibleError, UsageError
from policies.common.memory_units import GIB
from policies.policy import Policy, PolicyFile
from policies.workload import Workload

if TYPE_CHECKING:
    from cost_model.routing.expert_usage import ExpertUsage
    from cost_model.simulation.simulate import Simulation


#: Sweeps that a trace shows: enough to see the links work through from one to the next.
_TRACE_SWEEPS = 4


#: Reads the file of ``--prompts``: from the flags and the model to the lengths, and sentences on how they were found.
ReadLengths = Callable[[argparse.Namespace, ModelArch], tuple[Workload, tuple[str, ...]]]


def main(argv: Sequence[str] | None, read_lengths: ReadLengths) -> int:
    """Run the command line; the result is the exit code."""
    return guarded("cost_model", lambda: _run(parser().parse_args(argv), read_lengths))


def _run(args: argparse.Namespace, read_lengths: ReadLengths) -> int:
    check(args)
    if args.plot:
        from cost_model.cli.plot import check_plot

        check_plot(args.plot)
    arch = _model(args.model)
    check_unpacked(arch, args.compress_weight)
    hardware, origin = _machine(args)
    workload, notes = read_lengths(args, arch) if args.prompts else (_equal_rows(args, arch), ())
    usage = _usage(args.expert_usage, arch) if args.expert_usage else None
    report = _report(args, arch, hardware, workload, usage, origin=origin, notes=notes)
    if args.output:
        report.policy_file().save(args.output)
    if args.plot:
        _plot(report, args.plot)
    if args.trace:
        _trace(report, args.trace)
    if args.json:
        say(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        say(*report.lines())
    return 0


def _plot(report: Report, path: Path) -> None:
    from cost_model.cli.plot import draw

    def judge(policy: Policy) -> Prediction:
        about = (report.arch, report.hardware, report.workload, policy)
        return evaluate(*about, dtype_bytes=report.dtype_bytes, usage=report.usage, ignore_memory=True)

    draw(report, judge, path)


def _trace(report: Report, path: Path) -> None:
    """The first sweeps of the job; of one without end, of a single block."""
    job = report.workload
    if job.num_requests is None:
        job = replace(job, num_requests=report.policy.block_size)
    about = (report.arch, report.hardware, job, report.policy, report.dtype_bytes)
    _simulate(*about, usage=report.usage, keep_trace_sweeps=_TRACE_SWEEPS).write_chrome_trace(path)


def _simulate(
    arch: ModelArch, hardware: Hardware, job: Workload, policy: Policy, dtype_bytes: int, **options: Any
) -> Simulation:
    from cost_model.simulation.simulate import simulate  # with numpy, which help and flags do not need

    return simulate(arch, hardware, job, policy, dtype_bytes=dtype_bytes, **options)


def _model(name: str) -> ModelArch:
    return ModelArch.from_dir(name) if Path(name).is_dir() else ModelArch.from_name(name)


def _usage(path: Path, arch: ModelArch) -> ExpertUsage:
    from cost_model.routing.expert_usage import ExpertUsage  # with numpy, as above

    usage = ExpertUsage.load(path)
    usage.check_model(arch)
    return usage


def _machine(args: argparse.Namespace) -> tuple[Hardware, str]:
    """The machine with the budgets of the flags, and a phrase on where its rates come from."""
    hardware, origin = _hardware(args.hardware)
    hardware = hardware.with_budgets(
        gpu_mem=args.gpu_mem, cpu_mem=args.cpu_mem, nvme_mem=args.nvme_mem, memory_limit=args.memory_limit
    )
    host = hardware.host_memory_bytes if hardware.cpu_budget_bytes is None else hardware.cpu_budget_bytes
    capacity = {"gpu_mem": hardware.gpu.memory_bytes, "cpu_mem": host, "nvme_mem": hardware.disk_bytes}
    parts = {"gpu_mem": args.alpha_g, "cpu_mem": args.alpha_c, "nvme_mem": args.alpha_n}
    limited = {name: part * capacity[name] / GIB for name, part in parts.items() if part < 1}
    return hardware.with_budgets(**limited), origin


def _hardware(name: str | None) -> tuple[Hardware, str]:
    if name is None:
        why = "taken because --hardware was not given; its rates are assumed, not measured"
        return Hardware.preset(DEFAULT_MACHINE), f"preset {DEFAULT_MACHINE}, {why}"
    if name == "auto":
        hardware, path = last_measured()
        return hardware, f"{hardware.name}, as measured on {date.fromtimestamp(path.stat().st_mtime)}"
    if Path(name).suffix == ".json" or Path(name).is_file():
        return Hardware.load(name), f"rates from {name}"
    return Hardware.preset(name), f"preset {name.lower()}; its rates are assumed, not measured"


def _equal_rows(args: argparse.Namespace, arch: ModelArch) -> Workload:
    prompt_len, gen_len = args.prompt_len or DEFAULT_PROMPT_LEN, args.gen_len or DEFAULT_GEN_LEN
    workload = Workload(prompt_len=prompt_len, gen_len=gen_len, num_requests=args.num_requests)
    try:
        arch.check_rows(workload.longest_row)
    except UsageError as error:
        raise UsageError(f"--prompt-len {prompt_len} and --gen-len {gen_len}: {error}") from None
    return workload


def _report(
    args: argparse.Namespace,
    arch: ModelArch,
    hardware: Hardware,
    workload: Workload,
    usage: ExpertUsage | None,
    **about: Any,
) -> Report:
    b = DTYPE_BYTES.get(args.dtype, arch.dtype_bytes)
    if args.percent or args.policy:
        policy, explanation = _given_policy(args, arch, workload, usage), None
        options = {"dtype_bytes": b, "usage": usage, "ignore_memory": args.ignore_memory}
        prediction = evaluate(arch, hardware, workload, policy, **options)
    else:
        plan = _plan(args, arch, hardware, workload, dtype_bytes=b, usage=usage)
        policy, explanation, prediction = plan.policy, plan.explanation, plan.prediction
    return Report(
        arch=packed_as(arch, policy.compress_weight),
        hardware=hardware,
        workload=workload,
        dtype_bytes=b,
        policy=policy,
        prediction=prediction,
        explanation=explanation,
        simulation=_simulate(arch, hardware, workload, policy, b, usage=usage) if workload.num_requests else None,
        usage=usage,
        **about,
    )


def _plan(args: argparse.Namespace, arch: ModelArch, hardware: Hardware, workload: Workload, **about: Any) -> Plan:
    try:
        about["allow_compression"] = args.allow_compression
        return solve(arch, hardware, workload, fixed=_fixed(args), advice=True, **about)
    except InfeasibleError as error:  # it speaks of what may be used
        parts = {"gpu": args.alpha_g, "cpu": args.alpha_c, "nvme": args.alpha_n}
        lowered = [f"--alpha-{tier[0]} leaves {part:g} of --{tier}-mem" for tier, part in parts.items() if part < 1]
        raise InfeasibleError(f"{error} {', '.join(lowered)}: divide by it." if lowered else str(error)) from None


def _fixed(args: argparse.Namespace) -> Fixed:
    names = (
        "gpu_batch_size",
        "num_gpu_batches",
        "prefill_tokens",
        "schedule",
        "overlap",
        "compress_weight",
        "half_blocks",
    )
    values = {name: getattr(args, name) for name in names}
    values |= {field: getattr(args, name) for name, field in SHARES.items()}
    if args.cpu_cache_compute:
        values["cpu_attention_percent"] = 100.0
    values["compress_cache"] = args.compress_cache
    return Fixed(**{name: value for name, value in values.items() if value is not None})


def _given_policy(args: argparse.Namespace, arch: ModelArch, workload: Workload, usage: ExpertUsage | None) -> Policy:
    if args.policy:
        file = PolicyFile.load(args.policy)
        file.check_model(packed_as(arch, file.policy.compress_weight).fingerprint())
        return file.policy
    names = ("schedule", "overlap", "prefill_tokens", "compress_weight", "half_blocks")
    flags = {name: getattr(args, name) for name in names}
    return Policy.from_percent(
        args.percent,
        gpu_batch_size=args.gpu_batch_size,
        num_gpu_batches=args.num_gpu_batches,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        cpu_attention_percent=100.0 if args.cpu_cache_compute else 0.0,
        compress_cache=args.compress_cache,
        expert_order=usage.unit_order(arch) if usage else None,
        **{name: value for name, value in flags.items() if value is not None},
    )
