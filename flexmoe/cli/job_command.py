"""The job of the command line: from flags and a model to a `Job`, and what is told about it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace

from flexmoe.checkpoint.generation_config import SamplingDefaults, generation_config
from flexmoe.cli.job_arguments import input_options, shard
from flexmoe.inputs.options import open_requests
from flexmoe.inputs.rows import Rows
from flexmoe.job.identity import digest, model_identity, tokenizer_identity
from flexmoe.job.job import Job, JobFiles, JobReport, tell_other_model
from flexmoe.job.runner import CHECKPOINT_INTERVAL_S, StreamOptions
from flexmoe.llm import LLM
from flexmoe.models.loader import Model
from flexmoe.openai.response import creation_time_s
from flexmoe.preflight.lengths import Lengths
from flexmoe.preflight.preflight import Preflight, preflight
from flexmoe.preflight.prepare_setup import PreparerSetup
from flexmoe.preflight.served_model import ServedModel
from flexmoe.preflight.workload import Measured
from flexmoe.system.interrupts import Interrupts
from flexmoe.text.chat_template import read_template
from policies.common.command_line import say

#: Refused rows that a dry run tells of.
_TOLD = 5


def job_files(args: argparse.Namespace) -> JobFiles:
    """The job's files.

    Raises:
        UsageError: flags that exclude each other.
    """
    return JobFiles(
        input=args.input_file,
        output=args.output_file,
        shard=shard(args),
        options=input_options(args),
        overwrite=bool(args.overwrite),
    )


def with_generation_config(model: Model, args: argparse.Namespace) -> Model:
    """The model with the generation config that is asked for.

    Raises:
        InputMissingError, DataError, StorageError: it cannot be read.
    """
    return replace(
        model, generation_config=generation_config(args.generation_config or "auto", model.generation_config)
    )


class JobCommand:
    """`-i` and `-o`; a context manager that holds the job.

    Args:
        args: the command line.
        model: with the generation config that is asked for.
        interrupts: what may ask the job to stop.

    Attributes:
        lengths: of the rows that are left, once they have been measured.
        rows_refused: rows that can never run, as far as `measure` found any.
    """

    def __init__(self, args: argparse.Namespace, model: Model, interrupts: Interrupts) -> None:
        self._args, self._model, self._interrupts = args, model, interrupts
        self._template = None if args.chat_template is None else read_template(args.chat_template)
        self._parts = contextlib.ExitStack()
        self._job: Job | None = None
        self.lengths: Lengths | None = None
        self.rows_refused = 0

    def measure(self) -> Measured | None:
        """Looks at every row that is left; None when none is.

        Raises:
            FlexMoEError: as `Job` and its `look`.
        """
        if self._args.dry_run:
            return self._dry_measure()
        self._job = self._parts.enter_context(self._open())
        if self._job.report is not None:
            return None
        measured = self._job.look()
        self._note(self._job.found)
        return measured if self._job.rows_left else None

    def finish(self) -> JobReport:
        """The report of a job that was finished, or of which only the output is missing, and what is told about it."""
        report = self._job.report or self._job.publish()
        if report.was_finished:
            say("this job is finished already (--overwrite does it again)")
        say(f"rows: {report.rows_ok} ok, {report.rows_failed} failed; completions: {report.output_path}")
        if report.error_path:
            say(f"failed rows: {report.error_path}")
        return report

    def run(self, llm: LLM) -> JobReport:
        """Runs what is left.

        Raises:
            FlexMoEError: as `Job.run` and `Job.publish`.
        """
        self._job.run(llm, llm.engine.config.policy.block_size)
        return self.finish()

    def close(self) -> None:
        """Lets go of the job."""
        self._parts.close()

    def __enter__(self) -> JobCommand:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, found: Preflight) -> None:
        self.lengths, self.rows_refused = found.lengths, found.rows_refused

    def _open(self) -> Job:
        interval_s = self._args.checkpoint_interval
        stream = StreamOptions(
            bar=sys.stderr.isatty(), checkpoint_interval_s=CHECKPOINT_INTERVAL_S if interval_s is None else interval_s
        )
        return Job(
            job_files(self._args),
            self._setup(),
            self._identity(),
            model_name=str(self._args.model),
            choices={"generation_config": self._args.generation_config or "auto"},
            stream=stream,
            interrupts=self._interrupts,
        )

    def _setup(self) -> PreparerSetup:
        arch, args = self._model.arch, self._args
        served = ServedModel.of(str(args.model))
        return PreparerSetup(
            directory=None if self._model.directory is None else str(self._model.directory),
            vocab_size=arch.vocab_size,
            context=arch.max_position,
            default_max_tokens=args.gen_len,
            chat_template=self._template,
            defaults=SamplingDefaults.of(self._model.generation_config).values,
            model_names=tuple(sorted(served.names)),
            strict_model=bool(args.strict_model),
        )

    def _identity(self) -> dict:
        """What decides the completions, beside the input. The compute dtype does as it was asked for: one that a device
        cannot do is replaced, and devices may change."""
        args, model = self._args, self._model
        stored = str(model.stored_dtype).removeprefix("torch.")
        return {
            **model_identity(model),
            "tokenizer": tokenizer_identity(model.directory),
            "generation_config": digest(model.generation_config),
            "chat_template": self._template and digest({"": self._template})[:12],
            "strict_model": sorted(ServedModel.of(str(args.model)).names) if args.strict_model else False,
            "dtype": stored if args.dtype == "auto" else args.dtype,
            "gen_len": args.gen_len,
            "seed": args.seed,
        }

    def _dry_measure(self) -> Measured:
        """As `measure`, with nothing written, and with what was found told."""
        files = job_files(self._args)
        output, _ = files.outputs()
        setup = self._setup().at(creation_time_s())
        with open_requests(files.input, files.options, output.parent) as requests:
            numbers = range(len(requests)) if files.shard is None else files.shard.rows(len(requests))
            tell_other_model(setup, requests)
            rows = Rows(requests=requests, numbers=numbers)
            with contextlib.closing(preflight(rows, setup, bar=sys.stderr.isatty())) as found:
                say(*_found_lines(found, rows))
                self._note(found)
                return found.lengths.measured(setup.context)


def _found_lines(found: Preflight, rows: Rows) -> list[str]:
    lengths, refused = found.lengths, found.rows_refused
    lines = [
        f"rows: {len(lengths)}, of which {refused} cannot run; {sum(lengths.prompt_tokens)} prompt tokens, at most "
        f"{sum(lengths.new_tokens)} new tokens"
    ]
    for number, (row, error) in enumerate(found.refused()):
        if number == _TOLD:
            lines.append(f"  … and {refused - _TOLD} more")
            break
        lines.append(f"  line {rows.raw(row).number}: {error.message}")
    return lines
