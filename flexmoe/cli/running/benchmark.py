"""The benchmark: synthetic prompts of one length, completions of another."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass

from flexmoe.batch.job_parts import check_files, open_model
from flexmoe.batch.metrics import metrics_record
from flexmoe.batch.options import RunOptions
from flexmoe.batch.plan import plan_run, save_policy
from flexmoe.batch.run_batch import write_files
from flexmoe.cli.running.report import (
    cache_and_weight_lines,
    detail_lines,
    engine_file_lines,
    flexllmgen_lines,
    plan_lines,
)
from flexmoe.cli.running.summary import summary_lines
from flexmoe.errors import UsageError
from flexmoe.llm import LLM
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.preflight.lengths import Measured
from policies.common.command_line import say
from policies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """The rows of the benchmark.

    Args:
        prompt_len: tokens of each prompt.
        num_prompts: how many there are; None: one block.
        cut_gen_len: tokens after which a completion is cut short and projected to ``gen_len``; None cuts nothing.
    """

    prompt_len: int = 512
    num_prompts: int | None = None
    cut_gen_len: int | None = None

    def check(self, options: RunOptions) -> None:
        """Refuses what contradicts the run's options.

        Raises:
            UsageError: it does.
        """
        if self.cut_gen_len and (options.hardware or options.plans_itself):
            raise UsageError(
                "--cut-gen-len stops early, so there is nothing to predict or to plan for: give --percent or a policy file"
            )
        if options.plans_itself and not self.num_prompts:
            raise UsageError(
                "the planner plans for the job's rows: give -i, or --num-prompts for the benchmark, or --percent"
            )
        if self.cut_gen_len and self.cut_gen_len > options.prompt_gen_len:
            raise UsageError("--cut-gen-len is for the benchmark and at most --gen-len")
        if self.cut_gen_len == 1 and options.prompt_gen_len > 1:
            raise UsageError("--cut-gen-len 1 has no decode step to project from; give at least 2")
        if self.cut_gen_len and options.percent is not None and (self.num_prompts or 0) > options.block_size:
            raise UsageError(f"--cut-gen-len projects one block; give at most {options.block_size} --num-prompts")

    def rows(self, options: RunOptions) -> Measured:
        """Lengths of its rows."""
        rows = self.num_prompts or options.block_size
        workload = Workload(prompt_len=self.prompt_len, gen_len=options.prompt_gen_len, num_requests=rows)
        return Measured(workload=workload, longest_row=self.prompt_len + options.prompt_gen_len, rows=rows)


def run_benchmark(options: RunOptions, benchmark: Benchmark, *, verbose: bool = False) -> int:
    """Runs it and prints FlexLLMGen's summary and ours; returns the exit code.

    Args:
        verbose: print lanes and shares too.

    Raises:
        FlexMoEError: it cannot run.
    """
    check_files(options)
    model = open_model(options)
    plan = plan_run(options, model, benchmark.rows(options))
    save_policy(options, model, plan)
    say(*plan_lines(plan))
    with contextlib.closing(LLM(model, policy=plan.policy, workload=plan.measured.workload, **plan.options)) as llm:
        if verbose:
            say(*cache_and_weight_lines(llm.engine.plan))
        rows = _run(llm, options, benchmark)
        metrics = metrics_record(llm.metrics(), llm.engine, rows, 0, predicted=plan.predicted)
        say(
            *flexllmgen_lines(metrics, llm.engine, rows, options.prompt_gen_len, benchmark.cut_gen_len),
            *(detail_lines(metrics, llm.engine, plan.predicted) if verbose else ()),
            *summary_lines(metrics, llm.engine.plan, plan.predicted),
        )
        write_files(options, metrics, llm.engine)
        say(*engine_file_lines(options, llm.engine))
    return 0


def _run(llm: LLM, options: RunOptions, benchmark: Benchmark) -> int:
    """Completes all prompts; returns how many."""
    vocab, rng = llm.model.arch.vocab_size, random.Random(options.seed)
    params = SamplingParams(max_tokens=benchmark.cut_gen_len or options.prompt_gen_len, ignore_eos=True)
    requests = [
        EngineRequest(
            request_id=str(i),
            prompt_token_ids=tuple(rng.randrange(vocab) for _ in range(benchmark.prompt_len)),
            params=params,
        )
        for i in range(benchmark.num_prompts or llm.engine.config.policy.block_size)
    ]
    rows = 0
    for output in llm.stream(requests):
        if output.error:
            raise UsageError(output.error)
        rows += 1
    return rows
