"""`--dry-run`: every row is checked and the run is planned; nothing is written and no weight is loaded."""

from __future__ import annotations

import contextlib
import sys

from flexmoe.batch.job_parts import check_files, open_model, preparer_setup
from flexmoe.batch.options import RunOptions
from flexmoe.batch.plan import plan_run, save_policy
from flexmoe.cli.running.report import dry_run_lines, plan_lines, row_lines
from flexmoe.inputs.options import open_requests
from flexmoe.inputs.request_file import Rows
from flexmoe.models.loader import Model
from flexmoe.openai.response import creation_time_s
from flexmoe.preflight.lengths import Measured
from flexmoe.preflight.preflight import Preflight, preflight
from policies.common.command_line import say
from policies.common.errors import EXIT_ROWS_FAILED


def dry_run(options: RunOptions, benchmark_rows: Measured | None) -> int:
    """Prints what a run would do.

    Args:
        benchmark_rows: rows of the benchmark; None for a job, which has its own.

    Returns:
        int: the exit code, `EXIT_ROWS_FAILED` where rows of the job cannot run.

    Raises:
        FlexMoEError: it cannot run at all.
    """
    check_files(options)
    model = open_model(options)
    if benchmark_rows is not None:
        _plan(options, model, benchmark_rows, None)
        return 0
    with contextlib.closing(_look(options, model)) as found:
        measured = found.lengths.measured(model.arch.max_position)
        rows_without_room = _plan(options, model, measured, found) if measured.rows else 0
        return EXIT_ROWS_FAILED if found.rows_refused or rows_without_room else 0


def _look(options: RunOptions, model: Model) -> Preflight:
    """Checks every row, and prints what was found."""
    files = options.job_files()
    output, _ = files.outputs()
    setup = preparer_setup(options, model).at(creation_time_s())
    with open_requests(files.input, files.options, output.parent) as requests:
        rows = Rows(requests=requests, numbers=files.row_numbers(len(requests)))
        found = preflight(rows, setup, bar=sys.stderr.isatty(), prefixes=options.prefix_caching)
        note = setup.served().note(requests.models)
        say(*row_lines(found, rows), *([] if note is None else [f"note: {note}"]))
        return found


def _plan(options: RunOptions, model: Model, measured: Measured, found: Preflight | None) -> int:
    """Plans for the rows and prints the plan; returns how many rows it leaves out."""
    plan = plan_run(options, model, measured, None if found is None else found.lengths, predict=found is not None)
    save_policy(options, model, plan)
    say(*plan_lines(plan), *dry_run_lines(plan))
    return plan.rows_without_room
