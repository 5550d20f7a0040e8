"""The planner's flags. Names and meanings are FlexLLMGen's where it has them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cost_model.cli.row_arguments import ROW_NAMES, add_row_flags
from cost_model.model.config_fields import DTYPE_BYTES
from policies.common.command_line import Parser, count, flag, fraction, percent, program_name, size_gib
from policies.common.errors import UsageError
from policies.policy import HALF_BLOCKS, SCHEDULES, WEIGHT_FORMATS

#: Flags that fix one share each, and the policy's field; 0 means 0.
SHARES = {
    "wg": "w_gpu_percent",
    "wc": "w_cpu_percent",
    "cg": "cache_gpu_percent",
    "cc": "cache_cpu_percent",
    "hg": "act_gpu_percent",
    "hc": "act_cpu_percent",
}
DEFAULT_MACHINE = "t4"
DEFAULT_PROMPT_LEN, DEFAULT_GEN_LEN = 512, 32

_DESCRIPTION = """\
Find the policy with which a Mixture-of-Experts model that does not fit on the GPU generates most tokens per second, or
judge a given one. Nothing is loaded and nothing is run.

  python -m cost_model --model mistralai/Mixtral-8x7B-Instruct-v0.1 --prompt-len 512 --gen-len 32 \\
         --gpu-mem 16 --cpu-mem 200 --nvme-mem 1500 -o policy.json                              find a policy
  python -m cost_model ... --gpu-batch-size 16 --num-gpu-batches 2 --percent 10 90 0 100 0 100   judge a given one
"""
_EPILOG = f"""\
--percent W W C C A A: six numbers, in percent; what is left of each pair is on disk
  1, 2   weights on the GPU, weights in CPU memory
  3, 4   KV cache on the GPU, KV cache in CPU memory
  5, 6   activations on the GPU, activations in CPU memory

Without --hardware the rates are those of the preset {DEFAULT_MACHINE}, whatever machine this is: they are assumed, not
measured, and the report says so. Measure a machine with: python -m flexmoe.probe -o machine.json

exit codes: 0 ok, 1 internal, 2 usage, 4 no policy fits, 65 bad input data, 66 input missing, 74 I/O error or disk full,
130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser of ``python -m cost_model``."""
    program = program_name("plan", "cost_model")
    p = Parser(
        prog=program,
        usage=f"{program} --model NAME|DIR [--hardware PRESET|FILE|auto] [flags] [-o policy.json]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _job_flags(p)
    add_row_flags(p, "--prompts")
    _machine_flags(p)
    _policy_flags(p)
    _output_flags(p)
    return p


def _job_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("job")
    g.add_argument("--model", required=True, help="a known shape, its hub id, or a directory with a config.json")
    g.add_argument("--prompt-len", type=count, help=f"tokens per prompt (default {DEFAULT_PROMPT_LEN})")
    g.add_argument(
        "--gen-len",
        type=count,
        help=f"tokens per completion (default {DEFAULT_GEN_LEN}); with --prompts, of rows without max_tokens, as in flexmoe.run",
    )
    g.add_argument(
        "--num-requests", type=count, help="rows of the job (default: those of --prompts, else one without end)"
    )
    g.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="take the rows' lengths from a file of requests, read as flexmoe.run -i reads it",
    )
    g.add_argument(
        "--expert-usage",
        type=Path,
        metavar="FILE",
        help="how often each expert was chosen in a run: how many are reached, and which deserve the GPU (default: all alike)",
    )
    g.add_argument(
        "--dtype", choices=("auto", *sorted(DTYPE_BYTES)), default="auto", help="compute in it (auto: as stored)"
    )


def _machine_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("machine")
    g.add_argument(
        "--hardware",
        metavar="PRESET|FILE|auto",
        help=f"a machine that ships with FlexMoE, a measured one, or this one as last measured (default: "
        f"{DEFAULT_MACHINE})",
    )
    for tier, what in (("gpu", "GPU memory"), ("cpu", "CPU memory"), ("nvme", "disk space")):
        g.add_argument(f"--{tier}-mem", type=size_gib, metavar="GIB", help=f"{what}, instead of the machine's")
    g.add_argument(
        "--memory-limit",
        type=size_gib,
        metavar="GIB",
        help="host memory of the whole process, which is counted with what is placed there, instead of the machine's; with a GPU "
        "--cpu-mem is the same",
    )
    for letter, tier in (("g", "gpu"), ("c", "cpu"), ("n", "nvme")):
        g.add_argument(
            f"--alpha-{letter}",
            type=fraction,
            default=1.0,
            metavar="A",
            help=f"part of the {tier} memory that may be used, at most 1 (default 1)",
        )


def _policy_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("policy", "with --percent or --policy it is judged; otherwise the rest is chosen")
    g.add_argument("--policy", type=Path, metavar="FILE", help="judge a policy file")
    g.add_argument(
        "--percent", nargs=6, type=percent, metavar=("W", "W", "C", "C", "A", "A"), help="judge a placement; see below"
    )
    for name, field in SHARES.items():
        what, tier, _ = field.split("_")
        long = {"w": "weights", "cache": "KV cache", "act": "activations"}[what]
        g.add_argument(
            f"--{name}", type=percent, metavar="P", help=f"fix the percent of the {long} in {tier.upper()} memory"
        )
    g.add_argument("--gbs", "--gpu-batch-size", type=count, dest="gpu_batch_size", help="rows attended together")
    g.add_argument("--num-gb", "--num-gpu-batches", type=count, dest="num_gpu_batches", help="GPU batches in flight")
    g.add_argument("--prefill-tokens", type=count, help="most prompt tokens that enter a sweep")
    g.add_argument("--schedule", choices=SCHEDULES, help="refill finished rows at once, or march in blocks")
    g.add_argument(
        "--half-blocks",
        type=int,
        choices=HALF_BLOCKS,
        help="2: the block marches as two halves, half a layer apart, so that attention of one and experts of the other overlap",
    )
    g.add_argument("--cpu-cache-compute", action="store_true", help="attend all KV in CPU memory on the CPU")
    g.add_argument(
        "--overlap", type=flag, nargs="?", const=True, help="transfers run beside computation (default true)"
    )
    g.add_argument(
        "--compress-cache", action="store_true", help="KV cache as int8, with a scale for each token and KV head"
    )
    g.add_argument(
        "--compress-weight",
        choices=WEIGHT_FORMATS,
        help="plan for 16-bit weights packed in it, as flexmoe.run packs them",
    )
    g.add_argument(
        "--allow-compression",
        action="store_true",
        help="compress weights and KV cache where that gains; without it the report says what would gain, and how to ask for it",
    )
    g.add_argument("--ignore-memory", action="store_true", help="judge a policy that does not fit, too")


def _output_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("output")
    g.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the policy file")
    g.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else, to stdout")
    g.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the report (needs matplotlib)")
    g.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of the simulated sweeps")


def check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is opened.

    Raises:
        UsageError: flags contradict each other or one is missing; the sentence names them.
    """
    if args.prompts and args.prompt_len:
        raise UsageError("--prompts already says how long the prompts are; leave out --prompt-len")
    if not args.prompts:
        given = [f"--{name.replace('_', '-')}" for name in ROW_NAMES if getattr(args, name) is not None]
        _refuse("{} says how the file of --prompts is read; give that, too", given)
    shares = [f"--{name}" for name in SHARES if getattr(args, name) is not None]
    if args.policy:
        _refuse("--policy already says what {} would", [*shares, *_given(args)])
    if args.percent:
        _refuse("--percent already gives all six shares; leave out {}", shares)
        missing = [
            flag
            for flag, value in (("--gpu-batch-size", args.gpu_batch_size), ("--num-gpu-batches", args.num_gpu_batches))
            if value is None
        ]
        _refuse("--percent needs {} too", missing)
    if args.allow_compression and (args.percent or args.policy):
        raise UsageError("--allow-compression is for the search; leave it out, or --percent and --policy")
    if args.ignore_memory and not (args.percent or args.policy):
        raise UsageError("--ignore-memory is for a given policy; give --percent or --policy, too")
    _check_files(args)


def _check_files(args: argparse.Namespace) -> None:
    names = ("hardware", "prompts", "expert_usage", "policy", "output", "plot", "trace")
    used: dict[str, str] = {}
    for name in names:
        value = getattr(args, name)
        if value is not None:
            path = os.path.realpath(value)
            if name in ("output", "plot", "trace") and os.path.exists(path) and not os.path.isfile(path):
                raise UsageError(f"--{name} {value} is no regular file; choose another file")
            flag = f"--{name.replace('_', '-')}"
            if path in used:
                raise UsageError(f"{used[path]} and {flag} are both {value}; choose another file for {flag}")
            used[path] = flag


def _given(args: argparse.Namespace) -> list[str]:
    names = (
        *("percent", "gpu_batch_size", "num_gpu_batches", "prefill_tokens", "schedule", "overlap"),
        *("half_blocks", "compress_weight"),
    )
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    switches = ("cpu_cache_compute", "compress_cache")
    return flags + [f"--{name.replace('_', '-')}" for name in switches if getattr(args, name)]


def _refuse(sentence: str, flags: list[str]) -> None:
    if flags:
        raise UsageError(sentence.format(", ".join(flags)))
