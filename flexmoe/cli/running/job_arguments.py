"""The flags of a job over an input: what it reads, how its rows are chosen and kept. Those of the benchmark are elsewhere."""

from __future__ import annotations

import argparse

from cost_model.cli.row_arguments import ROW_NAMES, add_row_flags
from flexmoe.engine.config import RESERVES
from flexmoe.errors import UsageError
from flexmoe.job.runner import CHECKPOINT_INTERVAL_S
from flexmoe.job.shards import Shard
from policies.common.command_line import seconds

SLURM = "slurm"
#: Where the values of the flags are kept.
_NAMES = (*ROW_NAMES, "keep_reasoning_in_content", "overwrite", "checkpoint_interval_s", "shard", "reserve")


def add_job_flags(p: argparse.ArgumentParser) -> None:
    """Adds the flags; without -i each of them is refused (`refuse_job_flags`)."""
    add_row_flags(p, "-i")
    p.add_argument_group("answers (with -i)").add_argument(
        "--keep-reasoning-in-content",
        action="store_true",
        default=None,
        help="leave what a model thinks (<think> blocks, gpt-oss's analysis) in the content of a chat's answer; by default it is the "
        "message's reasoning_content",
    )
    _add_resuming_flags(p)


def _add_resuming_flags(p: argparse.ArgumentParser) -> None:
    kept = p.add_argument_group("resuming (with -i)")
    kept.add_argument(
        "--overwrite",
        action="store_true",
        default=None,
        help="start a new job, and keep the old output until the new job has made progress; the same command again resumes the "
        "new job",
    )
    kept.add_argument(
        "--checkpoint-interval",
        type=seconds,
        dest="checkpoint_interval_s",
        metavar="S",
        help=f"seconds between two checkpoints of the tokens of rows in flight (default {CHECKPOINT_INTERVAL_S:.0f})",
    )
    kept.add_argument(
        "--shard",
        nargs="?",
        const=SLURM,
        metavar="I/N",
        help="process every N-th row, starting with row I (from 0); without a value: from Slurm's job array",
    )
    kept.add_argument(
        "--reserve",
        choices=RESERVES,
        help="KV reserved for a row: up to its max_tokens (max), or the 95th percentile of the job's rows so far (p95, default)",
    )


def refuse_job_flags(args: argparse.Namespace) -> None:
    """Shows that none of the flags is given: there is no job.

    Raises:
        UsageError: one is, and would do nothing.
    """
    given = ["--" + name.removesuffix("_s").replace("_", "-") for name in _NAMES if getattr(args, name) is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: only with -i and -o; the benchmark makes its own rows")


def shard(args: argparse.Namespace) -> Shard:
    """The part of the input that ``--shard`` makes this run's.

    Raises:
        UsageError: there is no such part, or by Slurm's variables it is one of another division than the one begun here.
    """
    if args.shard != SLURM:
        return Shard.parse(args.shard)
    part = Shard.of_slurm()
    if args.output_file is not None:
        part.check_division(args.output_file)
    return part
