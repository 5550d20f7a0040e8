"""lm-evaluation-harness with the model ``flexmoe`` and with its own ``hf``, on tasks that need no network: scores, and tokens/s of both.

    python -m scripts.scaling.evaluation [--size demo] [--rows 48] [-o benchmarks/scaling.json]

Both score in float32, in turn, from one checkpoint. Tokens are those of the requests: contexts and continuations, and what is
generated. The limit is their FLOPs over the rate of float32 products of the experts' shape. The best of the rounds counts.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flexmoe.lm_eval import FlexMoELM
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.make_checkpoint import SIZES
from scripts.scaling.tasks import TASKS, write_tasks
from scripts.support.sized_model import add_flags, checkpoint_of

_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
#: Scores of the same model differ by rounding alone.
_CLOSE = 1e-4


class Timed:
    """A model of the harness that counts tokens and seconds of each kind of request."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokens, self.seconds = model, Counter[str](), Counter[str]()
        for kind in _KINDS:
            setattr(model, kind, self._timed(kind, getattr(model, kind)))

    def _timed(self, kind: str, method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def run(requests: list[Any], **options: Any) -> list[Any]:
            started_s = time.perf_counter()
            answers = method(requests, **options)
            self.seconds[kind] += time.perf_counter() - started_s
            texts = [text for each in requests for text in each.args if isinstance(text, str)]
            texts += [answer for answer in answers if isinstance(answer, str)]
            self.tokens[kind] += sum(len(self.model.tok_encode(text)) for text in texts)
            return answers

        return run


def main(argv: list[str]) -> int:
    """Measure; the exit code is 1 where scores differ."""
    args = _parser().parse_args(argv)
    began_s, checkpoint = time.perf_counter(), checkpoint_of(args)
    tasks = write_tasks(args.workdir / "tasks", rows=args.rows, words=args.words)
    ours = Timed(FlexMoELM(str(checkpoint), policy="none", max_length=args.max_length, device="cpu", dtype="float32"))
    theirs = Timed(
        HFLM(str(checkpoint), device="cpu", dtype="float32", max_length=args.max_length, batch_size=args.batch_size)
    )
    rounds, worst = [], 0.0
    for _ in range(args.rounds):
        results = [evaluate(timed.model, tasks) for timed in (ours, theirs)]
        worst = max(worst, _difference(*results))
        rounds.append([_take(timed) for timed in (ours, theirs)])
    figures = _figures(args, rounds, worst, ours.model.llm.model.arch)
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {"machine": machine(), "versions": versions() | {"lm_eval": lm_eval.__version__}, "model": args.size}
        about["command"] = shlex.join(["python", "-m", "scripts.scaling.evaluation", *argv])
        Record(args.out, about).add("lm-eval", figures, {"rounds": rounds}, time.perf_counter() - began_s)
    return 0 if all(figure.met is not False for figure in figures) else 1


def evaluate(model: Any, tasks: Path) -> dict[str, dict[str, float]]:
    """The metrics of each task."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    return {
        task: {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
        for task in TASKS
    }


def _difference(ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> float:
    """The largest relative difference of a metric."""
    pairs = [(value, theirs[task][name]) for task in TASKS for name, value in ours[task].items()]
    return max(abs(one - other) / max(abs(other), 1e-9) for one, other in pairs if one == one)


def _take(timed: Timed) -> dict[str, list[float]]:
    """Tokens and seconds of a round, which are counted anew then."""
    taken = {kind: [timed.tokens[kind], timed.seconds[kind]] for kind in _KINDS}
    timed.tokens.clear()
    timed.seconds.clear()
    return taken


def _figures(
    args: argparse.Namespace, rounds: list[list[dict[str, list[float]]]], worst: float, arch: Any
) -> list[Figure]:
    figures = [
        Figure(
            what=f"metrics of {len(TASKS)} tasks, {args.rows} documents each: largest relative difference from hf",
            value=f"{worst:.1e}",
            beside=f"{_CLOSE:.0e}",
            ratio=worst / _CLOSE,
            target=1,
            at_most=True,
        )
    ]
    limit = _products(args) / arch.flops_per_token
    for kind in _KINDS:
        ours, theirs = (max(r[side][kind][0] / r[side][kind][1] for r in rounds) for side in (0, 1))
        beside = f"hf {theirs:.0f}, products {limit:.0f} tokens/s"
        figures.append(Figure(what=kind, value=f"{ours:.0f} tokens/s", beside=beside, ratio=ours / theirs))
    return figures


def _products(args: argparse.Namespace) -> float:
    """FLOP/s of float32 products of an expert's shape over 512 tokens."""
    shape = SIZES[args.size]
    hidden, ffn = shape["hidden_size"], shape.get("intermediate_size", shape["hidden_size"])
    x_TD, w_FD = torch.randn(512, hidden), torch.randn(ffn, hidden)
    best_s = float("inf")
    for _ in range(20):
        started_s = time.perf_counter()
        torch.nn.functional.linear(x_TD, w_FD)
        best_s = min(best_s, time.perf_counter() - started_s)
    return float(2 * 512 * hidden * ffn / best_s)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.scaling.evaluation", description="flexmoe beside hf.")
    parser.add_argument("--rows", type=int, default=32, help="documents of each task")
    parser.add_argument("--words", type=int, default=48, help="of a question")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16, help="of hf")
    parser.add_argument("--rounds", type=int, default=2)
    add_flags(parser, size="demo", workdir=Path("build/scaling"))
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
