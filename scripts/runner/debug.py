"""What debug mode costs: the same rows without it, with `--check-finite` and with `--debug`, and beside an older version.

    python -m scripts.runner.debug                              # the modes of this version
    python -m scripts.runner.debug --before DIR                 # also a checkout without debug mode, in DIR

Every way runs in a process of its own that stays, and all do the rows in turn, so that a busy machine is busy for all. They
must give the same tokens; the median of the rounds counts. Resident weights are the worst case: nothing hides what is added.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.support.sized_model import add_flags, checkpoint_of

_PROMPT_TOKENS, _NEW_TOKENS = 64, 16
_MODES: dict[str, dict[str, Any]] = {
    "off": {},
    "--check-finite": {"check_finite": True},
    "--debug": {"debug": True},
}
#: The older version.
_BEFORE = "before"
#: What a process runs; it needs nothing but the package, since an older version has no script like this one.
_WORKER = """
import json, sys, time
from flexmoe import LLM, Policy, SamplingParams, Workload
about = json.loads(sys.argv[1])
shape = {"prompt_len": about["prompt"], "gen_len": about["new"]}
policy = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=about["rows"], num_gpu_batches=1, **shape)
llm = LLM(about["model"], policy=policy, workload=Workload(**shape), device="cpu", **about["options"])
params = SamplingParams(max_tokens=about["new"], ignore_eos=True)
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    outputs = llm.generate(json.loads(line), params, use_tqdm=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}), flush=True)
"""


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code is 1 where this version is slower than the older one."""
    args = _parser().parse_args(argv)
    checkpoint = checkpoint_of(args)
    vocab = json.loads((checkpoint / "config.json").read_text("utf-8"))["vocab_size"]
    rng, began = random.Random(0), time.monotonic()
    prompts = [[rng.randrange(3, vocab) for _ in range(_PROMPT_TOKENS)] for _ in range(args.rows)]
    with _workers(args, checkpoint) as workers:
        seconds = measure(workers, prompts, args.rounds)
    figures = figures_of(seconds, args.rows)
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {"machine": machine(), "versions": versions(), "model": args.size}
        about["command"] = shlex.join(["python", "-m", "scripts.runner.debug", *argv])
        Record(args.out, about).add("debug mode", figures, seconds, time.monotonic() - began)
    return 1 if any(figure.met is False for figure in figures) else 0


def measure(workers: dict[str, subprocess.Popen[str]], prompts: list[list[int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by way; the first round only warms up.

    Raises:
        ValueError: two ways give other tokens.
    """
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    wanted = None
    for at in range(rounds + 1):
        names = list(workers)
        for name in names[at % len(names) :] + names[: at % len(names)]:
            answer = _ask(workers[name], prompts)
            wanted = wanted or answer["tokens"]
            if answer["tokens"] != wanted:
                raise ValueError(f"{name} gave other tokens")
            if at:
                seconds[name].append(answer["seconds"])
    return seconds


def figures_of(seconds: dict[str, list[float]], rows: int) -> list[Figure]:
    """Each way against this version with everything off, and that against the older version."""
    rate = {name: rows * _NEW_TOKENS / statistics.median(each) for name, each in seconds.items()}
    figures = []
    if _BEFORE in rate:
        # Of each round, so that what the machine did meanwhile is in neither.
        ratio = statistics.median(before / off for before, off in zip(seconds[_BEFORE], seconds["off"]))
        beside = f"{rate[_BEFORE]:.1f} before there was debug mode"
        figures.append(Figure(what="off", value=_tokens(rate["off"]), beside=beside, ratio=ratio, target=0.99))
    for name in rate:
        if name not in ("off", _BEFORE):
            ratio = statistics.median(off / own for off, own in zip(seconds["off"], seconds[name]))
            figures.append(
                Figure(what=name, value=_tokens(rate[name]), beside=f"{rate['off']:.1f} without it", ratio=ratio)
            )
    return figures


def _tokens(rate: float) -> str:
    return f"{rate:.1f} tokens/s"


def _ask(worker: subprocess.Popen[str], prompts: list[list[int]]) -> Any:
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("a process of the benchmark has no pipes")
    worker.stdin.write(json.dumps(prompts) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


@contextlib.contextmanager
def _workers(args: argparse.Namespace, checkpoint: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each way, its model loaded."""
    ways = {name: (Path.cwd(), options) for name, options in _MODES.items()}
    if args.before is not None:
        ways[_BEFORE] = (args.before, {})
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {}
        for at, (name, (root, options)) in enumerate(ways.items()):
            options = options | ({"debug_dir": str(scratch / str(at))} if options.get("debug") else {})
            about = {"model": str(checkpoint.resolve()), "prompt": _PROMPT_TOKENS, "new": _NEW_TOKENS}
            about |= {"rows": args.rows, "options": options}
            worker = subprocess.Popen(
                [sys.executable, "-c", _WORKER, json.dumps(about)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=root,
                env=os.environ | {"PYTHONPATH": str(root.resolve())},
            )
            stack.callback(worker.wait)
            stack.callback(worker.terminate)
            if worker.stdout is None or worker.stdout.readline() != "ready\n":
                raise RuntimeError(f"the process of {name} did not load the model")
            workers[name] = worker
        yield workers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.runner.debug",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=32, help="in flight together (default 32)")
    parser.add_argument("--rounds", type=int, default=9, help="default 9")
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout of an older version")
    add_flags(parser, size="tiny")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
