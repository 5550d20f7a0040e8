"""`python -m cost_model`: finds the policy with the most tokens per second for a model, a machine and a job.

The planner knows no runtime; a requests file is read by the runtime's own reader, which this module gives it.
"""

import argparse
import sys
from collections.abc import Sequence

from cost_model.cli import plan
from cost_model.model.arch import ModelArch
from policies.common.command_line import do_without_torch
from policies.workload import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit code."""
    return plan.main(argv, _read_lengths)


def _read_lengths(args: argparse.Namespace, arch: ModelArch) -> tuple[Workload, tuple[str, ...]]:
    from flexmoe.cli.request_lengths import read_lengths  # with numpy, which help and flags do not need

    return read_lengths(args, arch)


if __name__ == "__main__":
    do_without_torch()
    sys.exit(main())
