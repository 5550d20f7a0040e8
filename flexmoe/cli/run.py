"""The command line: ``python -m flexmoe.run``. Data goes to files, words to stdout, logs and progress to stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from flexmoe.batch.failures import as_user_errors
from flexmoe.batch.options import RunOptions
from flexmoe.batch.plan import RunPlan
from flexmoe.batch.run_batch import Listener, run_job
from flexmoe.cli.running.arguments import Command, read_command
from flexmoe.cli.running.benchmark import run_benchmark
from flexmoe.cli.running.dry_run import dry_run
from flexmoe.cli.running.report import (
    cache_and_weight_lines,
    detail_lines,
    engine_file_lines,
    nothing_ran_lines,
    plan_lines,
)
from flexmoe.cli.running.summary import note_lines, result_lines, summary_lines
from flexmoe.engine.engine import Engine
from flexmoe.job.result import JobResult
from flexmoe.system.interrupts import Interrupts, Terminated
from policies.common.command_line import complain, guarded, say
from policies.common.errors import EXIT_ROWS_FAILED, EXIT_TERMINATED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        int: the exit code, one of `policies.common.errors`.
    """
    return guarded("flexmoe", lambda: _interruptible(read_command(argv)))


class _Speaker(Listener):
    """Prints what a person wants to know of a run, when it is known."""

    def __init__(self, options: RunOptions, verbose: bool) -> None:
        self._options, self._verbose = options, verbose
        self.has_run = False

    def planned(self, plan: RunPlan) -> None:
        say(*plan.measured.open_lines(), *plan_lines(plan))

    def loaded(self, engine: Engine) -> None:
        if self._verbose:
            say(*cache_and_weight_lines(engine.plan))

    def ran(self, engine: Engine, plan: RunPlan, result: JobResult) -> None:
        self.has_run = True
        if self._verbose:
            say(*detail_lines(result.metrics, engine, plan.predicted))
        say(*result_lines(result), *summary_lines(result.metrics, engine.plan, plan.predicted))
        say(*engine_file_lines(self._options, engine), *note_lines(result))


def _interruptible(command: Command) -> int:
    with Interrupts() as interrupts, as_user_errors():
        try:
            return _run(command, interrupts)
        except Terminated:
            complain("flexmoe: terminated")
            return EXIT_TERMINATED


def _run(command: Command, interrupts: Interrupts) -> int:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if command.verbose else logging.WARNING, format="%(message)s"
    )
    for name in ("flexmoe.progress", "flexmoe.quantizing"):
        logging.getLogger(name).setLevel(logging.INFO)
    options, benchmark = command.options, command.benchmark
    if command.dry_run:
        return dry_run(options, None if benchmark is None else benchmark.rows(options))
    if benchmark is not None:
        return run_benchmark(options, benchmark, verbose=command.verbose)
    return _job(options, interrupts, verbose=command.verbose)


def _job(options: RunOptions, interrupts: Interrupts, *, verbose: bool) -> int:
    speaker = _Speaker(options, verbose)
    result = run_job(options, listener=speaker, interrupts=interrupts, show_bar=sys.stderr.isatty())
    if not speaker.has_run:
        say(*result_lines(result), *nothing_ran_lines(options), *note_lines(result))
    return EXIT_ROWS_FAILED if result.rows_failed else 0
