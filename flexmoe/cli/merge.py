"""``python -m flexmoe.merge``: the outputs of all shards of a job become the output that one run would have written.

Nothing is parsed: every line is copied as it is, in the order of the input. What each shard's manifest says about its
files (bytes, hashes, which rows failed) shows that no row is lost, doubled or another job's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flexmoe.batch.merge_shards import merge_shards
from flexmoe.job.output_files import default_error_path
from policies.common.command_line import Parser, guarded, program_name, say
from policies.common.errors import EXIT_ROWS_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit codes are those of ``flexmoe.run``."""
    return guarded("flexmoe.merge", lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        prog=program_name("merge", "flexmoe.merge"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("-o", "--output-file", type=Path, required=True, help="the merged completions")
    p.add_argument("--overwrite", action="store_true", help="replace the merged files where they are there already")
    p.add_argument("shards", type=Path, nargs="+", help="the outputs of all shards, in any order: out.shard-*.jsonl")
    return p


def _run(args: argparse.Namespace) -> int:
    rows_ok, rows_failed = merge_shards(args.output_file, args.shards, overwrite=args.overwrite)
    say(f"rows: {rows_ok} ok, {rows_failed} failed; completions: {args.output_file}")
    if rows_failed:
        say(f"failed rows: {default_error_path(args.output_file)}")
    return EXIT_ROWS_FAILED if rows_failed else 0
