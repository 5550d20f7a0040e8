"""The command line: ``python -m flexmoe.run``. Data goes to files, words to stdout, logs and progress to stderr."""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cost_model.sizes import BLOCK_TOKENS
from flexmoe import report
from flexmoe.arguments import parser
from flexmoe.auto_policy import Forecaster, comparison_lines, describe_policy, forecast_line
from flexmoe.device import Device
from flexmoe.errors import UsageError
from flexmoe.job import check_job, run_job
from flexmoe.llm import LLM, RESIDENT
from flexmoe.loader import Model, compute_dtype, load_model
from flexmoe.output_files import check_distinct, check_writable, default_error_path
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.planning import EngineConfig, EnginePlan
from flexmoe.request_file import RequestFile
from flexmoe.tokenizer import Tokenizer
from flexmoe.workload import Measured, measure
from policies.command_line import guarded, say
from policies.policy import Policy, PolicyFile, Workload

_MOST_PREFILL_TOKENS = 4096
EXIT_ROWS_FAILED = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        int: the exit code of DESIGN's contract.
    """
    return guarded("flexmoe", lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s"
    )
    _check_arguments(args)
    model = load_model(args.model, args.load_format)
    tokenizer = Tokenizer.load(model.directory) if model.directory else Tokenizer(None, args.model)
    measured = _measure(args, model, tokenizer)
    forecaster = _forecaster(args, model, measured)
    policy = forecaster.plan(args.kv_tokens) if _is_auto(args.policy) else _policy(args, model, measured)
    options = _options(args, measured, policy)
    predicted = forecaster.predict(policy, options["kv_tokens"]) if forecaster else None
    if predicted:
        say(describe_policy(policy), forecast_line(predicted))
    if args.dry_run:
        return _dry_run(model, policy, measured, options)
    llm = LLM(model, policy=policy, workload=measured.workload, **options)
    try:
        say(llm.engine.plan.describe_weights(), llm.engine.plan.describe_cache())
        if args.input_file:
            code = _job(args, llm, tokenizer)
        else:
            code = _benchmark(args, llm, measured)
        if predicted:
            say(*comparison_lines(predicted, llm.metrics()))
        if args.trace:
            llm.engine.recorder.write_chrome_trace(args.trace)
            say(f"trace: {args.trace}")
        return code
    finally:
        llm.close()


def _check_arguments(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is opened."""
    if (args.input_file is None) != (args.output_file is None):
        raise UsageError("give both -i and -o, or neither for the benchmark")
    given = [n for n in ("percent", "gpu_batch_size", "num_gpu_batches", "prefill_tokens", "schedule", "overlap", "pin_weight")
             if getattr(args, n) is not None]  # fmt: skip
    given += ["cpu_cache_compute"] if args.cpu_cache_compute else []
    if args.cut_gen_len and (args.hardware or _is_auto(args.policy)):
        raise UsageError("--cut-gen-len stops early, so there is nothing to plan for or to predict; leave one out")
    if _is_auto(args.policy) and not args.input_file and not args.num_prompts:
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
    files = {"input": args.input_file, "output": args.output_file, "trace": args.trace}
    files |= {name: path for name in ("policy", "hardware") if not _is_auto(path := getattr(args, name))}
    files["metrics"] = args.metrics_json
    if args.output_file:
        files["error"] = default_error_path(args.output_file)
    check_distinct({name: path for name, path in files.items() if path is not None})
    for path in (args.trace, args.metrics_json):
        if path is not None:
            check_writable(path)
    if args.input_file:
        check_job(args.input_file, args.output_file)


def _is_auto(value: Path | None) -> bool:
    return str(value) == "auto"


def _forecaster(args: argparse.Namespace, model: Model, measured: Measured) -> Forecaster | None:
    """The planner, where the run asks for it."""
    if args.hardware is None and not _is_auto(args.policy):
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


def _measure(args: argparse.Namespace, model: Model, tokenizer: Tokenizer) -> Measured:
    if args.input_file is None:
        workload = Workload(prompt_len=args.prompt_len, gen_len=args.gen_len)
        rows = args.num_prompts or (args.gpu_batch_size or 16) * (args.num_gpu_batches or 1)
        workload = replace(workload, num_requests=rows)
        return Measured(workload=workload, longest_row=args.prompt_len + args.gen_len, rows=rows)
    with RequestFile.open(args.input_file) as requests:
        return measure(requests, tokenizer, args.gen_len, model.arch.max_position)


def _is_one_block(measured: Measured, block_size: int) -> bool:
    """A job this short starts and ends together: pacing its admission would only stretch it."""
    return 0 < measured.rows <= block_size


def _policy(args: argparse.Namespace, model: Model, measured: Measured) -> Policy:
    workload = measured.workload
    if args.policy:
        file = PolicyFile.load(args.policy)
        if not args.force_policy:
            file.check_model(model.arch.fingerprint())
        return file.policy
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


def _options(args: argparse.Namespace, measured: Measured, policy: Policy) -> dict:
    kv_tokens, mean = args.kv_tokens, measured.workload
    if kv_tokens is None and not _is_auto(args.policy) and _is_one_block(measured, policy.block_size):
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
        "keep_spans": args.trace is not None,
    }


def _dry_run(model: Model, policy: Policy, measured: Measured, options: dict) -> int:
    config = EngineConfig(policy=policy, workload=measured.workload, **options)
    plan = EnginePlan.of(model, config)
    say(plan.describe_weights(), plan.describe_cache(), *plan.memory_lines())
    s, n = measured.workload.prompt_len, measured.workload.gen_len
    say(
        f"rows: {measured.rows}, mean prompt {s} tokens, mean completion at most {n}, longest row {measured.longest_row}"
    )
    return 0


def _job(args: argparse.Namespace, llm: LLM, tokenizer: Tokenizer) -> int:
    done = run_job(
        args.input_file,
        args.output_file,
        llm,
        tokenizer=tokenizer,
        default_max_tokens=args.gen_len,
        model_name=str(args.model),
    )
    say(f"rows: {done.rows_ok} ok, {done.rows_failed} failed; completions: {done.output_path}")
    if done.error_path:
        say(f"failed rows: {done.error_path}")
    _finish(args, llm, done.rows_ok, done.rows_failed)
    return EXIT_ROWS_FAILED if done.rows_failed else 0


def _benchmark(args: argparse.Namespace, llm: LLM, measured: Measured) -> int:
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
    _finish(args, llm, rows, 0)
    return 0


def _finish(args: argparse.Namespace, llm: LLM, rows_ok: int, rows_failed: int) -> None:
    metrics = llm.metrics()
    lines = report.throughput_lines(metrics) + report.lane_lines(metrics) + llm.engine.plan.memory_lines()
    say(*lines)
    say(f"peak process memory: {report.peak_process_bytes() / 2**30:.3f} GiB resident")
    if args.metrics_json:
        report.write_json(args.metrics_json, report.metrics_record(metrics, llm.engine, rows_ok, rows_failed))


if __name__ == "__main__":
    sys.exit(main())
