"""The command line's flags, and what they ask for. Names and meanings are FlexLLMGen's where it has them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flexmoe.batch.options import SCHEDULES, RunOptions
from flexmoe.cli.running.benchmark import Benchmark
from flexmoe.cli.running.job_arguments import add_job_flags, refuse_job_flags, shard
from flexmoe.errors import UsageError
from flexmoe.models.loader import LOAD_FORMATS
from flexmoe.weights.eviction import EXPERT_CACHES
from policies.common.command_line import Parser, count, flag, program_name
from policies.common.directories import OFFLOAD_DIR
from policies.policy import HALF_BLOCKS, WEIGHT_FORMATS

_EPILOG = """\
--percent W W C C A A: six numbers, in percent; what is left of each pair is on disk
  1, 2   weights on the GPU, weights in CPU memory
  3, 4   KV cache on the GPU, KV cache in CPU memory
  5, 6   activations on the GPU, activations in CPU memory
Shares are rounded to whole units (an attention module, an expert), KV pages and GPU batches; the run prints what was
achieved. On --device cpu the GPU tier is a budget in RAM too.

The state of a job is kept in <output>.flexmoe. Whatever stopped it, the same command resumes it; policy, budgets and device
may then differ, input, model and sampling may not. --overwrite starts a new job and keeps the old output until the new job has
made progress; the same command with --overwrite resumes the job that it began itself.

exit codes: 0 all rows ok, 1 internal, 2 usage, 3 finished but some rows failed, 4 does not fit or other model,
65 bad input or checkpoint, or --check-finite found NaN or an infinity, 66 input missing, 74 I/O error or disk full, 75 stopped by
SIGTERM or SIGHUP, 130 by Ctrl-C; after 1, 4, 74, 75 and 130 the same command resumes the job
"""
_DESCRIPTION = """\
Complete a JSONL of requests with a Mixture-of-Experts model that does not fit on the GPU.

  python -m flexmoe.run --model DIR -i requests.jsonl -o out.jsonl --gpu-mem 16

Where weights, KV cache and activations live and how many rows are in flight is planned for this machine, which is measured
once; --policy or --percent decide it instead. Without -i it is a benchmark: synthetic prompts of --prompt-len tokens, --gen-len tokens generated for each.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a command line asks for.

    Args:
        options: of the run.
        benchmark: None for a job.
        dry_run: check and plan only.
        verbose: log what is done.
    """

    options: RunOptions
    benchmark: Benchmark | None
    dry_run: bool
    verbose: bool


def read_command(argv: Sequence[str] | None = None) -> Command:
    """Reads a command line.

    Raises:
        UsageError: a flag is unknown, has a value that cannot be used, or contradicts another one.
    """
    args = parser().parse_args(argv)
    if args.input_file is None and args.output_file is None:
        refuse_job_flags(args)
    given = given_fields(args, RunOptions)
    if "shard" in given:
        given["shard"] = shard(args)
    options = RunOptions(**given)
    benchmark = Benchmark(**given_fields(args, Benchmark)) if options.input_file is None else None
    if benchmark is not None:
        benchmark.check(options)
    elif args.cut_gen_len is not None:
        raise UsageError("--cut-gen-len is for the benchmark and at most --gen-len")
    return Command(options=options, benchmark=benchmark, dry_run=args.dry_run, verbose=args.verbose)


def given_fields(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The flags that are fields of a dataclass and were given; the others have its defaults."""
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def parser() -> argparse.ArgumentParser:
    """The argument parser of ``python -m flexmoe.run``."""
    program = program_name("run", "flexmoe.run")
    p = Parser(
        prog=program,
        usage=f"{program} --model DIR [-i requests.jsonl -o out.jsonl] [flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _job_flags(p)
    add_job_flags(p)
    add_policy_flags(p)
    add_machine_flags(p)
    return p


def _job_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("job")
    g.add_argument(
        "--model", required=True, help="checkpoint directory, hub id, or a known shape with --load-format dummy"
    )
    g.add_argument(
        "--load-format",
        choices=LOAD_FORMATS,
        help="dummy: random weights, only the shape is needed",
    )
    g.add_argument(
        "-i",
        "--input-file",
        type=Path,
        help='requests: OpenAI Batch lines, plain {"prompt": …} rows, lines of text (.txt), Parquet, or a dataset',
    )
    g.add_argument(
        "-o", "--output-file", type=Path, help="completions, in input order; failed rows go to <output>.errors.jsonl"
    )
    g.add_argument("--prompt-len", type=count, help="benchmark: tokens per prompt (default 512)")
    g.add_argument(
        "--gen-len",
        type=count,
        help="tokens per completion for rows without max_tokens (default: 32 for prompts, the rest of the context for chats)",
    )
    g.add_argument("--cut-gen-len", type=count, help="benchmark: stop after so many tokens and project to --gen-len")
    g.add_argument("--num-prompts", type=count, help="benchmark: prompts (default: one block)")
    g.add_argument("--seed", type=int, help="seed of rows without one, and of the benchmark's prompts (default 0)")
    g.add_argument(
        "--dry-run",
        action="store_true",
        help="check every row, print counts, the plan and the predicted hours; load no weights, touch no output; exit code 3 where "
        "rows cannot run",
    )
    g.add_argument("--metrics-json", type=Path, help="write the measured values as JSON")
    g.add_argument(
        "--router-stats",
        type=Path,
        metavar="FILE",
        help="count which experts the routers choose, and which ones together, in the tokens that this start computes; written as "
        "JSON for scripts.analyze_expert_usage",
    )
    g.add_argument("--trace", type=Path, help="write a Chrome trace (chrome://tracing, Perfetto), one track per lane")
    _debug_flags(p)
    g.add_argument("-v", "--verbose", action="store_true", help="log to stderr")


def _debug_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("debugging")
    g.add_argument(
        "--check-finite",
        action="store_true",
        help="stop where the model computes NaN or an infinity first, and name sweep, layer, unit, expert and row (exit code 65)",
    )
    g.add_argument(
        "--debug",
        action="store_true",
        help="write JSON lines of every sweep: its rows, the range of each tensor by layer and unit, the experts of each token, seconds "
        "and bytes of each operation",
    )
    g.add_argument(
        "--debug-dir",
        type=Path,
        metavar="DIR",
        help="directory for them, with which --debug need not be given (default: <output>.debug, for the benchmark flexmoe_debug)",
    )


def add_policy_flags(p: argparse.ArgumentParser) -> None:
    """Adds the flags of a policy."""
    g = p.add_argument_group("policy")
    g.add_argument(
        "--policy",
        type=Path,
        help="policy file, which decides what the other flags of this group would, but --expert-usage and --force-policy; or auto, "
        "the default without --percent: measure this machine (once, cached), and plan for the lengths of the job's rows and what "
        "other flags fix; the plan is kept and used again for the same job",
    )
    g.add_argument(
        "--save-policy", type=Path, metavar="FILE", help="write the policy that is run to a file for --policy"
    )
    g.add_argument(
        "--expert-usage",
        type=Path,
        metavar="FILE",
        help="how often each expert was chosen in another run (scripts.analyze_expert_usage --usage): those used most are placed on "
        "the fastest tier, and a static expert cache keeps them",
    )
    g.add_argument("--force-policy", action="store_true", help="run a policy file that was made for another model")
    g.add_argument(
        "--percent",
        nargs=6,
        type=float,
        metavar=("W", "W", "C", "C", "A", "A"),
        help="placement, see below; nothing is planned, and the flags below have the defaults that they name",
    )
    g.add_argument("--gpu-batch-size", type=count, help="rows whose attention runs together (default 16)")
    g.add_argument("--num-gpu-batches", type=count, help="GPU batches in flight (default 1)")
    g.add_argument("--prefill-tokens", type=count, help="most prompt tokens that enter a sweep (default: an even pace)")
    g.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="rolling: a waiting row takes the place of a finished one; static: whole blocks of rows (default rolling)",
    )
    g.add_argument(
        "--half-blocks",
        type=int,
        choices=HALF_BLOCKS,
        help="2: the block marches as two halves, half a layer apart: the attention of one overlaps with the experts of the other "
        "(default 1)",
    )
    g.add_argument(
        "--cpu-cache-compute", action="store_true", help="compute attention over KV in CPU memory on the CPU"
    )
    g.add_argument(
        "--overlap", type=flag, nargs="?", const=True, help="overlap transfers with computation (default true)"
    )
    g.add_argument(
        "--pin-weight", type=flag, nargs="?", const=True, help="CUDA: keep CPU weights pinned (default true)"
    )
    g.add_argument(
        "--compress-cache",
        type=flag,
        nargs="?",
        const=True,
        help="keep the KV cache as int8 with a scale for each token and KV head, about half the bytes in every tier (default false)",
    )
    g.add_argument(
        "--compress-weight",
        choices=WEIGHT_FORMATS,
        help="pack the 16-bit weights of the checkpoint once, as flexmoe.quantize does, into --offload-dir, and run those; later runs "
        "find them there",
    )


def add_machine_flags(p: argparse.ArgumentParser) -> None:
    """Adds the flags of the machine and its budgets."""
    g = p.add_argument_group("machine")
    g.add_argument("--device", help="auto, cuda or cpu (default auto)")
    g.add_argument(
        "--hardware",
        type=Path,
        help="this machine's rates, to plan with and to print a prediction beside the measurement: a file of python -m "
        "flexmoe.probe, or auto (measured once, cached), which is the default of --policy auto and of a job's --dry-run",
    )
    g.add_argument("--dtype", help="auto (the checkpoint's), bfloat16, float16 or float32")
    g.add_argument(
        "--expert-cache",
        choices=EXPERT_CACHES,
        help="with few rows in flight only experts that were routed to are transferred, and cached in free GPU memory: lfu (default; "
        "recent uses count more) and lru say which expert is evicted, static keeps those used most in --expert-usage; off transfers "
        "all experts in every sweep",
    )
    g.add_argument(
        "--gpu-mem",
        type=float,
        metavar="GIB",
        help="GPU memory budget; what the plan leaves of it caches experts",
    )
    g.add_argument(
        "--cpu-mem",
        type=float,
        metavar="GIB",
        help="CPU memory budget; with a GPU the process itself is a part of it, on --device cpu it is what is placed there",
    )
    g.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="host memory that the whole process may hold, Python, libraries and threads included (default: what the machine, "
        "its cgroup and resource limits allow); where it runs short the block shrinks",
    )
    g.add_argument("--nvme-mem", type=float, metavar="GIB", help="disk budget, weights on disk included")
    g.add_argument(
        "--offload-dir", type=Path, default=OFFLOAD_DIR, help="directory of the disk tier (default %(default)s)"
    )
    g.add_argument(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="compute and keep once what rows begin with alike, such as a system prompt, and run such rows together (default: yes)",
    )
    g.add_argument(
        "--kv-tokens",
        type=count,
        help="KV cache capacity in tokens, at least the longest row (default: from the batch sizes and the rows' lengths)",
    )
