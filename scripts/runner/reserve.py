"""What `--reserve p95` is worth: rows that ask for 1024 tokens and take far fewer, on KV that limits how many are in flight.

    python -m scripts.runner.reserve                       # a tiny model, a minute on 2 cores
    python -m scripts.runner.reserve --out benchmarks/runner.json

The same rows run with KV kept for their `max_tokens` and with KV kept for what rows have come to need; they must give the same
tokens. A row ends with one of a few stop ids, so that lengths are spread as those of real answers are. A sweep of the tiny model
costs nearly the same for few rows and for many, as one does whose weights stream from afar.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shlex
import sys
from dataclasses import dataclass

from flexmoe.llm import LLM
from flexmoe.models.loader import Model, load_model
from flexmoe.params import EngineRequest, SamplingParams
from policies.policy import Policy, Workload
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.support.sized_model import add_flags, checkpoint_of

_PROMPT_TOKENS, _MOST_TOKENS, _BLOCK_ROWS = 32, 1024, 96
#: KV for so many rows of full length.
_FULL_ROWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The job under one rule."""

    wall_s: float
    sweeps: int
    mean_rows: float
    restarts: int
    tokens: dict[str, tuple[int, ...]]


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code is 1 where the default is not the faster rule."""
    args = _parser().parse_args(argv)
    checkpoint = checkpoint_of(args)
    model = load_model(str(checkpoint))
    rows = requests(args.rows, args.mean_tokens, model.arch.vocab_size)
    kept, learned = (run(model, rows, reserve) for reserve in ("max", "p95"))
    if kept.tokens != learned.tokens:
        raise ValueError("the two rules gave other tokens")
    figures = figures_of(kept, learned)
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {"machine": machine(), "versions": versions(), "model": args.size}
        about["command"] = shlex.join(["python", "-m", "scripts.runner.reserve", *argv])
        raw = {name: [r.wall_s, r.sweeps, r.mean_rows, r.restarts] for name, r in (("max", kept), ("p95", learned))}
        Record(args.out, about).add("reserve", figures, raw, kept.wall_s + learned.wall_s)
    return 0 if figures[0].met else 1


def requests(rows: int, mean_tokens: int, vocab: int) -> list[EngineRequest]:
    """Rows of which every drawn token ends its row with a chance of one in ``mean_tokens``."""
    rng = random.Random(0)
    stops = tuple(rng.sample(range(3, vocab), max(1, vocab // mean_tokens)))
    params = SamplingParams(temperature=1.0, max_tokens=_MOST_TOKENS, stop_token_ids=stops, ignore_eos=True)
    return [
        EngineRequest(
            request_id=str(row),
            prompt_token_ids=tuple(rng.randrange(3, vocab) for _ in range(_PROMPT_TOKENS)),
            params=params,
        )
        for row in range(rows)
    ]


def run(model: Model, rows: list[EngineRequest], reserve: str) -> Run:
    """Runs all rows under one rule."""
    shape = {"prompt_len": _PROMPT_TOKENS, "gen_len": _MOST_TOKENS}
    policy = Policy.from_percent(
        (100, 0, 100, 0, 100, 0),
        gpu_batch_size=_BLOCK_ROWS,
        num_gpu_batches=1,
        **shape,
        prefill_tokens=8 * _PROMPT_TOKENS,
    )
    options = {"kv_tokens": _FULL_ROWS * (_PROMPT_TOKENS + _MOST_TOKENS), "device": "cpu", "dtype": "float32"}
    workload = Workload(**shape)
    with contextlib.closing(LLM(model, policy=policy, workload=workload, reserve=reserve, **options)) as llm:
        tokens = {output.request_id: output.outputs[0].token_ids for output in llm.stream(rows)}
        metrics = llm.metrics()
    return Run(
        wall_s=metrics["wall_s"],
        sweeps=metrics["sweeps"],
        mean_rows=metrics["mean_rows_in_flight"],
        restarts=metrics["restarts"],
        tokens=tokens,
    )


def figures_of(kept: Run, learned: Run) -> list[Figure]:
    """The job that learns lengths against the one that keeps room for the limit."""
    lengths = [len(tokens) for tokens in kept.tokens.values()]
    what = (
        f"{len(lengths)} rows that ask for {_MOST_TOKENS} tokens and take {sum(lengths) / len(lengths):.0f} on average"
    )
    return [
        Figure(
            what=f"--reserve p95: {what}",
            value=f"{learned.wall_s:.1f} s",
            beside=f"{kept.wall_s:.1f} s with --reserve max",
            ratio=kept.wall_s / learned.wall_s,
            target=1.0,
        ),
        Figure(
            what="sweeps",
            value=f"{learned.sweeps}",
            beside=f"{kept.sweeps}",
            ratio=kept.sweeps / learned.sweeps,
            target=1.0,
        ),
        Figure(
            what="rows in flight, mean",
            value=f"{learned.mean_rows:.1f}, {learned.restarts} restarts",
            beside=f"{kept.mean_rows:.1f}",
            ratio=learned.mean_rows / kept.mean_rows,
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.runner.reserve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=300, help="default 300")
    parser.add_argument("--mean-tokens", type=int, default=200, help="about the mean completion (default 200)")
    add_flags(parser, size="tiny")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
