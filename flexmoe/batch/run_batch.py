"""A whole batch job: what ``python -m flexmoe.run -i … -o …`` does, as a function.

It prints nothing and never exits; what it does is logged below ``flexmoe``. A call that ended early (Ctrl-C, a full disk, a
power cut) is resumed by the same call: what had been done is kept beside the output.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flexmoe.batch.failures import as_user_errors
from flexmoe.batch.job_parts import check_files, open_job, open_model
from flexmoe.batch.metrics import finished_record, metrics_record
from flexmoe.batch.options import PathLike, RunOptions
from flexmoe.batch.plan import RunPlan, plan_run, save_policy
from flexmoe.batch.watch import drift_watch
from flexmoe.engine.engine import Engine
from flexmoe.errors import UsageError
from flexmoe.job.job import Job
from flexmoe.job.result import JobResult
from flexmoe.llm import LLM
from flexmoe.models.loader import Model
from flexmoe.planning.drift import drift_record
from flexmoe.preflight.lengths import Measured
from flexmoe.system.interrupts import Interrupts
from policies.common import json_files
from policies.policy import Policy


class Listener:
    """What a caller hears of a run while it goes; this one takes no notice."""

    def planned(self, plan: RunPlan) -> None:
        """The plan stands; no weight has been loaded."""

    def loaded(self, engine: Engine) -> None:
        """The weights are loaded; no row has run."""

    def ran(self, engine: Engine, plan: RunPlan, result: JobResult) -> None:
        """The output has its name, and the engine is about to be closed."""


def run_batch(
    input_file: PathLike,
    output_file: PathLike,
    *,
    model: PathLike,
    policy: Policy | PathLike | None = None,
    use_tqdm: bool = False,
    **options: Any,
) -> JobResult:
    """Completes a file of requests with a model that need not fit on the GPU.

    Every row is checked first, then the policy is planned, then the rows run; the output appears under its name when the last
    row is done. Called again after whatever ended it, it resumes; called again after it has finished, it returns the same.

    Args:
        input_file: requests: OpenAI Batch lines, plain ``{"prompt": …}`` rows, text (.txt), Parquet, or a dataset.
        output_file: completions as OpenAI Batch lines, in input order; failed rows go to ``<output>.errors.jsonl``.
        model: checkpoint directory, hub id, or with ``load_format="dummy"`` a known shape.
        policy: a `Policy`, or the path of a policy file. None, or ``"auto"``, measures this machine (one to seven minutes, once) and
            plans for the job; with ``percent`` among the options nothing is planned.
        use_tqdm: draw progress bars on stderr.
        **options: the other fields of `RunOptions`: ``dtype``, ``seed``, ``gen_len``, ``gpu_mem`` (GiB), ``overwrite`` …

    Returns:
        JobResult: counts of rows and tokens, the files, and what was measured.

    Raises:
        UsageError: an option cannot be used, or the output is another job's.
        InfeasibleError: no policy fits the memory, or memory ran out.
        InputMissingError, DataError: the input or the checkpoint is missing, malformed, or was changed since the job began.
        StorageError: the disk is full or failed.
        KeyboardInterrupt: Ctrl-C; rows that have finished are kept.

    Example:
        >>> result = run_batch("requests.jsonl", "out.jsonl", model="mistralai/Mixtral-8x7B-Instruct-v0.1", gpu_mem=16)
        >>> result.rows_ok, result.rows_failed, result.error_path
    """
    try:
        asked = RunOptions(
            input_file=Path(input_file),
            output_file=Path(output_file),
            model=os.fspath(model),
            policy=policy if policy is None or isinstance(policy, Policy) else Path(policy),
            **options,
        )
    except TypeError as error:
        raise UsageError(f"run_batch: {error}") from error
    return run_job(asked, show_bar=use_tqdm)


def run_job(
    options: RunOptions,
    *,
    listener: Listener | None = None,
    interrupts: Interrupts | None = None,
    show_bar: bool = False,
) -> JobResult:
    """Runs or resumes the job of some options.

    Args:
        listener: hears of the plan, the weights and the end.
        interrupts: what may ask the job to stop after a sweep.
        show_bar: draw progress bars on stderr.

    Raises:
        FlexMoEError: as `run_batch`.
        Interrupted: the job was asked to stop; what has been done is kept.
    """
    with as_user_errors():
        check_files(options)
        model = open_model(options)
        with open_job(options, model, interrupts, show_bar=show_bar) as job:
            if job.report is not None:
                return _nothing_ran(options, job.report)
            measured = job.look()
            if not job.rows_left:
                return _nothing_ran(options, job.publish())
            return _run(options, model, job, measured, listener or Listener())


def write_files(options: RunOptions, metrics: Mapping[str, Any], engine: Engine | None) -> None:
    """Writes the metrics, the router statistics and the trace, where they are asked for.

    Args:
        engine: that ran; None where nothing was left to run, and then there are only metrics. Where no token was routed there
            are no router statistics either.

    Raises:
        StorageError: they cannot be written.
    """
    if options.metrics_json is not None:
        json_files.write_json(options.metrics_json, metrics, "the metrics")
    if engine is None:
        return
    if options.router_stats is not None and not engine.router_counter.is_empty:
        engine.router_counter.stats().save(options.router_stats)
    if options.trace is not None:
        engine.recorder.write_chrome_trace(options.trace)


def _run(options: RunOptions, model: Model, job: Job, measured: Measured, listener: Listener) -> JobResult:
    plan = plan_run(options, model, measured, job.lengths)
    save_policy(options, model, plan)
    listener.planned(plan)
    llm = LLM(model, tokenizer=job.tokenizer, policy=plan.policy, workload=plan.measured.workload, **plan.options)
    with contextlib.closing(llm):
        listener.loaded(llm.engine)
        watch = drift_watch(options, plan)
        job.run(llm, plan.policy.block_size, None if watch is None else partial(watch.after_sweep, llm.engine))
        result = job.publish()
        rows = result.rows_ok, result.rows_failed, result.rows_resumed
        metrics = metrics_record(llm.metrics(), llm.engine, *rows, predicted=plan.predicted, drift=drift_record(watch))
        result = replace(result, metrics=metrics)
        write_files(options, result.metrics, llm.engine)
        listener.ran(llm.engine, plan, result)
    return result


def _nothing_ran(options: RunOptions, result: JobResult) -> JobResult:
    result = replace(result, metrics=finished_record(result.rows_ok, result.rows_failed, result.rows_resumed))
    write_files(options, result.metrics, None)
    return result
