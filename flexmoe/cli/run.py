"""The command line: ``python -m flexmoe.run``. Data goes to files, words to stdout, logs and progress to stderr."""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cost_model.simulation.simulate import Simulation
from flexmoe.cli import report
from flexmoe.cli.arguments import parser
from flexmoe.cli.forecast import comparison_lines, describe_policy, forecast_line, predicted_metrics
from flexmoe.cli.job_arguments import refuse_job_flags
from flexmoe.cli.job_command import JobCommand, job_files, with_generation_config
from flexmoe.cli.out_of_memory import as_infeasible
from flexmoe.cli.run_plan import RunPlan, benchmark_rows, is_auto, plan_run
from flexmoe.engine.router_counter import RouterCounter
from flexmoe.errors import UsageError
from flexmoe.job.job import JobReport
from flexmoe.job.output_files import check_distinct, check_writable
from flexmoe.llm import LLM
from flexmoe.models.loader import load_model
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.system.interrupts import Interrupts, Terminated
from policies.common.command_line import complain, guarded, say

EXIT_ROWS_FAILED, EXIT_TERMINATED = 3, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        int: the exit code of DESIGN's contract.
    """
    return guarded("flexmoe", lambda: _interruptible(parser().parse_args(argv)))


def _interruptible(args: argparse.Namespace) -> int:
    with Interrupts() as interrupts, as_infeasible():
        try:
            return _run(args, interrupts)
        except Terminated:
            complain("flexmoe: terminated")
            return EXIT_TERMINATED


def _run(args: argparse.Namespace, interrupts: Interrupts) -> int:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s"
    )
    logging.getLogger("flexmoe.progress").setLevel(logging.INFO)
    _check_arguments(args)
    model = with_generation_config(load_model(args.model, args.load_format), args)
    with ExitStack() as parts:
        job = parts.enter_context(JobCommand(args, model, interrupts)) if args.input_file else None
        measured = job.measure() if job else benchmark_rows(args)
        if measured is None:  # no row is left, so that no weight is needed
            return _nothing_ran(args, job.finish())
        if args.dry_run and not measured.rows:
            return EXIT_ROWS_FAILED if job.rows_refused else 0
        plan = plan_run(args, model, measured, job.lengths if job else None)
        predicted = plan.predicted
        if predicted:
            say(describe_policy(plan.policy), forecast_line(predicted))
        if args.dry_run:
            return _dry_run(plan, job)
        llm = LLM(model, policy=plan.policy, workload=plan.measured.workload, **plan.options)
        parts.callback(llm.close)
        say(llm.engine.plan.describe_weights(), llm.engine.plan.describe_cache())
        code = _job(args, llm, job, predicted) if job else _benchmark(args, llm, predicted)
        if args.trace:
            llm.engine.recorder.write_chrome_trace(args.trace)
            say(f"trace: {args.trace}")
        return code


def _check_arguments(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is opened."""
    if (args.input_file is None) != (args.output_file is None):
        raise UsageError("give both -i and -o, or neither for the benchmark")
    given = [n for n in ("percent", "gpu_batch_size", "num_gpu_batches", "prefill_tokens", "schedule", "overlap", "pin_weight")
             if getattr(args, n) is not None]  # fmt: skip
    given += ["cpu_cache_compute"] if args.cpu_cache_compute else []
    if args.cut_gen_len and (args.hardware or is_auto(args.policy)):
        raise UsageError("--cut-gen-len stops early, so there is nothing to plan for or to predict; leave one out")
    if is_auto(args.policy) and not args.input_file and not args.num_prompts:
        raise UsageError("--policy auto plans for the job's rows: give -i, or --num-prompts for the benchmark")
    if args.policy and given:
        flags = ", ".join("--" + n.replace("_", "-") for n in given)
        raise UsageError(f"--policy already says what {flags} would; give one or the other")
    if args.cut_gen_len and (args.input_file or args.cut_gen_len > args.gen_len):
        raise UsageError("--cut-gen-len is for the benchmark and at most --gen-len")
    if args.cut_gen_len == 1 and args.gen_len > 1:
        raise UsageError("--cut-gen-len 1 has no decode step to project from; give at least 2")
    block_size = (args.gpu_batch_size or 16) * (args.num_gpu_batches or 1)
    if args.cut_gen_len and not args.policy and (args.num_prompts or 0) > block_size:
        raise UsageError(f"--cut-gen-len projects one block; give at most {block_size} --num-prompts")
    files = {"input": args.input_file, "trace": args.trace, "metrics": args.metrics_json}
    files["router statistics"] = args.router_stats
    files["expert usage"] = args.expert_usage
    files |= {name: path for name in ("policy", "hardware") if not is_auto(path := getattr(args, name))}
    if args.output_file:
        files["output"], files["error"] = job_files(args).outputs()
    else:
        refuse_job_flags(args)
    check_distinct({name: path for name, path in files.items() if path is not None})
    for path in (args.trace, args.metrics_json, args.router_stats):
        if path is not None:
            check_writable(path)


def _dry_run(plan: RunPlan, job: JobCommand | None) -> int:
    engine, measured = plan.engine, plan.measured
    say(engine.describe_weights(), engine.describe_cache(), *engine.memory_lines())
    s, n = measured.workload.prompt_len, measured.workload.gen_len
    say(
        f"lengths of {measured.rows} completions: mean prompt {s} tokens, mean completion at most {n}, longest row "
        f"{measured.longest_row}"
    )
    return EXIT_ROWS_FAILED if job and (job.rows_refused or plan.rows_without_room) else 0


def _job(args: argparse.Namespace, llm: LLM, job: JobCommand, predicted: Simulation | None) -> int:
    done = job.run(llm)
    _finish(args, llm, predicted, rows_ok=done.rows_ok, rows_failed=done.rows_failed, rows_resumed=done.rows_resumed)
    return _exit_code(done)


def _nothing_ran(args: argparse.Namespace, done: JobReport) -> int:
    if args.metrics_json:
        record = report.finished_record(done.rows_ok, done.rows_failed, done.rows_resumed)
        report.write_json(args.metrics_json, record)
    if args.trace:
        say("nothing was left to run, so there is no trace")
    if args.router_stats:
        say("nothing was left to run, so there are no router statistics")
    return _exit_code(done)


def _exit_code(done: JobReport) -> int:
    return EXIT_ROWS_FAILED if done.rows_failed else 0


def _benchmark(args: argparse.Namespace, llm: LLM, predicted: Simulation | None) -> int:
    vocab, rng = llm.model.arch.vocab_size, random.Random(args.seed)
    params = SamplingParams(max_tokens=args.cut_gen_len or args.gen_len, ignore_eos=True)
    requests = [
        EngineRequest(
            request_id=str(i),
            prompt_token_ids=tuple(rng.randrange(vocab) for _ in range(args.prompt_len)),
            params=params,
        )
        for i in range(args.num_prompts or llm.engine.config.policy.block_size)
    ]
    rows = 0
    for output in llm.stream(requests):
        if output.error:
            raise UsageError(output.error)
        rows += 1
    say(*report.flexllmgen_lines(llm.metrics(), llm.engine, rows, args.gen_len, args.cut_gen_len))
    _finish(args, llm, predicted, rows_ok=rows)
    return 0


def _finish(
    args: argparse.Namespace,
    llm: LLM,
    predicted: Simulation | None,
    *,
    rows_ok: int,
    rows_failed: int = 0,
    rows_resumed: int = 0,
) -> None:
    metrics = llm.metrics()
    lines = (
        report.throughput_lines(metrics)
        + report.cache_lines(metrics)
        + report.lane_lines(metrics)
        + llm.engine.plan.memory_lines()
    )
    say(*lines)
    say(f"peak process memory: {report.peak_process_bytes() / 2**30:.3f} GiB resident")
    if predicted:
        say(*comparison_lines(predicted, metrics))
    if args.metrics_json:
        record = report.metrics_record(
            metrics, llm.engine, rows_ok, rows_failed, rows_resumed, predicted and predicted_metrics(predicted)
        )
        report.write_json(args.metrics_json, record)
    if args.router_stats:
        _write_router_stats(llm.engine.router_counter, args.router_stats)


def _write_router_stats(counter: RouterCounter, path: Path) -> None:
    if counter.is_empty:  # no row could run
        say("no token was routed, so there are no router statistics")
        return
    counter.stats().save(path)
    say(f"router statistics: {path}")
