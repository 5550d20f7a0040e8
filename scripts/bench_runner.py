"""What the batch runner costs beside the engine: the seconds of a whole job that are not the engine's sweeps.

    python -m scripts.bench_runner                       # 512 rows of 1 KB on a 300 MB model, minutes on 2 cores
    python -m scripts.bench_runner --rows 4096 --out benchmarks/runner.json

The job is the command line's: text prompts are parsed, checked, tokenized, run, encoded, kept in the journal with a
checkpoint every few seconds, and published. Parts are timed where they are called; what the engine computes meanwhile on
other threads is not subtracted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexmoe.inputs.request_file import RequestFile
from flexmoe.job import job as job_module
from flexmoe.job.job import Job, JobFiles
from flexmoe.job.journal import Journal
from flexmoe.job.runner import StreamOptions
from flexmoe.llm import LLM
from flexmoe.models.loader import load_model
from flexmoe.openai.response import ResponseEncoder
from flexmoe.preflight.prepare import Preparer
from flexmoe.preflight.prepare_setup import PreparerSetup
from policies.policy import Policy, Workload
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.support.corpus import corpus_words
from scripts.support.sized_model import add_flags, checkpoint_of

TARGET = 0.03
_PROMPT_BYTES, _NEW_TOKENS, _BLOCK_ROWS = 1000, 32, 64
_CHECKPOINT_S = 5.0


class Parts:
    """Seconds spent in functions, by the name of the part that they are."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = 0

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts the block; a part within a part belongs to the outer one."""
        start, self._open = time.perf_counter(), self._open + 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def watch(self, owner: Any, function: str, name: str) -> Callable[[], None]:
        """Counts every call of a function; returns what puts the original back."""
        real = getattr(owner, function)

        def call(*args: Any, **options: Any) -> Any:
            with self.timed(name):
                return real(*args, **options)

        setattr(owner, function, call)
        return lambda: setattr(owner, function, real)


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code is 1 where the target is missed."""
    args = _parser().parse_args(argv)
    directory = args.workdir / "bench-runner"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    checkpoint = checkpoint_of(args)
    write_rows(directory / "in.jsonl", args.rows)
    raw = run(checkpoint, directory, args.rows)
    figures = _figures(raw)
    print("\n".join(figure_table(figures)))
    for name, seconds in sorted(raw["parts_s"].items(), key=lambda part: -part[1]):
        print(f"{name:>12}: {seconds:7.3f} s, {1e6 * seconds / args.rows:7.0f} us a row")
    if args.out:
        about = {"machine": machine(), "versions": versions(), "model": f"{args.size}: {raw['model']}"}
        about["command"] = shlex.join(["python", "-m", "scripts.bench_runner", *argv])
        Record(args.out, about).add("runner", figures, raw, raw["wall_s"])
    return 0 if figures[0].met else 1


def run(checkpoint: Path, directory: Path, rows: int) -> dict:
    """Runs the job; seconds of the whole, of the engine and of the parts."""
    model, parts = load_model(str(checkpoint)), Parts()
    policy = Policy.from_percent(
        (100, 0, 100, 0, 100, 0), gpu_batch_size=_BLOCK_ROWS, num_gpu_batches=1, prompt_len=256, gen_len=_NEW_TOKENS
    )
    workload = Workload(prompt_len=256, gen_len=_NEW_TOKENS)
    with contextlib.closing(LLM(model, policy=policy, workload=workload, longest_row=1024, device="cpu")) as llm:
        setup = PreparerSetup(
            directory=str(checkpoint),
            vocab_size=model.arch.vocab_size,
            context=model.arch.max_position,
            default_max_tokens=_NEW_TOKENS,
        )
        files = JobFiles(input=directory / "in.jsonl", output=directory / "out.jsonl")
        with contextlib.ExitStack() as stack:
            for owner, function, name in _WATCHED:
                stack.callback(parts.watch(owner, function, name))
            start = time.perf_counter()
            with Job(files, setup, stream=StreamOptions(checkpoint_interval_s=_CHECKPOINT_S)) as job:
                with parts.timed("pre-flight"):
                    job.look()
                job.run(llm, _BLOCK_ROWS)
                with parts.timed("publish"):
                    report = job.publish()
            wall_s = time.perf_counter() - start
        return {
            "rows": rows,
            "rows_failed": report.rows_failed,
            "wall_s": wall_s,
            "engine_s": llm.engine.sweeps.totals.wall_s,
            "prompt_tokens": report.prompt_tokens,
            "generated_tokens": report.generated_tokens,
            "parts_s": parts.seconds,
            "model": f"{model.arch.total_bytes / 1e9:.2f} GB, {model.arch.num_layers} layers",
        }


_WATCHED = (
    (RequestFile, "__init__", "parse"),
    (Preparer, "prepare_all", "tokenize"),
    (ResponseEncoder, "success", "encode"),
    (Journal, "finish", "journal"),
    (Journal, "checkpoint", "checkpoint"),
    (job_module, "Workspace", "manifest"),
)


def write_rows(path: Path, rows: int) -> None:
    """Text prompts of about 1 KB, as the lines of an OpenAI Batch."""
    rng = random.Random(0)
    words = corpus_words()
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            text = " ".join(rng.choice(words) for _ in range(_PROMPT_BYTES // 6))[:_PROMPT_BYTES]
            body = {"prompt": text, "max_tokens": _NEW_TOKENS, "ignore_eos": True}
            line = {"custom_id": f"r{row}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def _figures(raw: dict) -> list[Figure]:
    overhead_s = raw["wall_s"] - raw["engine_s"]
    tokens = raw["prompt_tokens"] + raw["generated_tokens"]
    return [
        Figure(
            what=f"runner's share of a job of {raw['rows']} rows of 1 KB, {_NEW_TOKENS} new tokens each",
            value=f"{overhead_s:.2f} s",
            beside=f"{raw['wall_s']:.2f} s in all, {tokens / raw['wall_s']:.0f} token/s",
            ratio=overhead_s / raw["wall_s"],
            target=TARGET,
            at_most=True,
        ),
        Figure(
            what="runner's time for a row",
            value=f"{1e3 * overhead_s / raw['rows']:.2f} ms",
            beside=f"{1e3 * raw['engine_s'] / raw['rows']:.1f} ms of the engine",
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_runner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512, help="default 512")
    add_flags(parser, size="demo")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
