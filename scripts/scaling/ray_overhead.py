"""What Ray costs: the same rows through `LLM.generate` and through `flexmoe.ray.generate` with one actor, in turn.

    python -m scripts.scaling.ray_overhead [--size demo] [--rows 2000] [-o benchmarks/scaling.json]

Both run with one policy and give the same tokens. The run without Ray is the limit of the one with it. Counted is the time from the first row that
an engine is given to the last row that the caller has; the start of Ray and of the actor is printed beside it, and what the engine's sweeps took:
Ray can make them more (an engine that is starved of rows), or the time between them longer. The best of the rounds counts.

Ray's workers have the lowest priority of a machine (nice 15). Here they have that of the run without Ray, so that both lose alike to what else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

import flexmoe.ray
import flexmoe.ray.dataset
from flexmoe.llm import LLM
from flexmoe.params import SamplingParams
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.support.corpus import corpus_words
from scripts.support.sized_model import add_flags, checkpoint_of

#: The run with Ray takes so much longer at most.
TARGET = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way, once.

    Args:
        wall_s: from the first row in to the last row out.
        start_s: before that.
        tokens: generated, by row.
        sweeps, sweeps_s: of the engine, and the time within them.
        engine_cpu_s, others_cpu_s: processor time of the engine's process in ``wall_s``, and that of all other processes of the machine.
    """

    wall_s: float
    start_s: float
    tokens: list[list[int]]
    sweeps: int
    sweeps_s: float
    engine_cpu_s: float
    others_cpu_s: float


class CPUTime:
    """Processor time since this was made: of this process, and of all others together."""

    def __init__(self) -> None:
        self._own_s, self._all_s = time.process_time(), _busy_s()

    def spent(self) -> tuple[float, float]:
        """Seconds of this process, and of the others."""
        own_s = time.process_time() - self._own_s
        return own_s, _busy_s() - self._all_s - own_s


def _busy_s() -> float:
    """Of all processes, by the kernel's counters of user, nice and system time, proc(5)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return sum(int(fields[at]) for at in (1, 2, 3)) / os.sysconf("SC_CLK_TCK")


class Timed(flexmoe.ray.Generate):
    """Notes when its first row came, and beside that its sweeps."""

    def __init__(self, model: str, *, note: str, **options: Any) -> None:
        super().__init__(model, **options)
        self._note = note

    async def __call__(self, batch: Any) -> Any:
        """As its base."""
        if not os.path.exists(self._note):
            Path(self._note).write_text(repr(time.time()))
            self._cpu = CPUTime()
        done = await super().__call__(batch)
        metrics = self.llm.metrics()
        noted = [metrics["sweeps"], metrics["wall_s"], *self._cpu.spent()]
        Path(self._note).with_suffix(".json").write_text(json.dumps(noted))
        return done


def main(argv: list[str]) -> int:
    """Measure; the exit code is 1 where the target is missed."""
    args = _parser().parse_args(argv)
    checkpoint = checkpoint_of(args)
    words, began_s = corpus_words(), time.perf_counter()
    prompts = [" ".join((words[11 * row % len(words) :] + words)[: args.words]) for row in range(args.rows)]
    # The actor has all cores, and what reads and divides the rows needs one to be scheduled.
    cpus, niceness = (os.cpu_count() or 1) + 1, {"worker_niceness": 0}
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, _system_config=niceness)
    ray.data.DataContext.get_current().enable_progress_bars = False
    flexmoe.ray.dataset.Generate = Timed  # type: ignore[misc]
    pairs = [(plain(args, checkpoint, prompts), through_ray(args, checkpoint, prompts)) for _ in range(args.rounds)]
    ray.shutdown()
    if args.dtype == "float32" and any(one.tokens != other.tokens for one, other in pairs):
        raise RuntimeError("the tokens of both runs differ")
    figures, raw = _figures(args, pairs)
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {"machine": machine(), "versions": versions() | {"ray": ray.__version__}, "model": args.size}
        about["command"] = shlex.join(["python", "-m", "scripts.scaling.ray_overhead", *argv])
        Record(args.out, about).add("Ray Data", figures, raw, time.perf_counter() - began_s)
    return 0 if all(figure.met is not False for figure in figures) else 1


def plain(args: argparse.Namespace, checkpoint: Path, prompts: list[str]) -> Run:
    """Without Ray."""
    began_s = time.time()
    with LLM(str(checkpoint), policy=None, device="cpu", dtype=args.dtype, longest_row=512) as llm:
        first_s, cpu = time.time(), CPUTime()
        outputs = llm.generate(prompts, SamplingParams(max_tokens=args.max_tokens, ignore_eos=True), use_tqdm=False)
        end_s, metrics, (engine_cpu_s, others_cpu_s) = time.time(), llm.metrics(), cpu.spent()
    return Run(
        wall_s=end_s - first_s,
        start_s=first_s - began_s,
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
        sweeps=metrics["sweeps"],
        sweeps_s=metrics["wall_s"],
        engine_cpu_s=engine_cpu_s,
        others_cpu_s=others_cpu_s,
    )


def through_ray(args: argparse.Namespace, checkpoint: Path, prompts: list[str]) -> Run:
    """With it."""
    params = {"max_tokens": args.max_tokens, "ignore_eos": True}
    engine = {"policy": None, "device": "cpu", "dtype": args.dtype, "longest_row": 512}
    with tempfile.TemporaryDirectory() as notes:
        note = Path(notes) / "first"
        began_s = time.time()
        done = flexmoe.ray.generate(
            ray.data.from_items([{"row": row, "prompt": prompt} for row, prompt in enumerate(prompts)]),
            str(checkpoint),
            rows_in_flight=args.rows_in_flight,
            batch_size=args.batch_size,
            arguments={**engine, "sampling_params": params, "note": str(note)},
            num_cpus=os.cpu_count(),
        )
        rows = done.take_all()
        end_s, first_s = time.time(), float(note.read_text())
        sweeps, sweeps_s, engine_cpu_s, others_cpu_s = json.loads(note.with_suffix(".json").read_text())
    tokens = {row["row"]: list(row["generated_tokens"]) for row in rows}
    return Run(
        wall_s=end_s - first_s,
        start_s=first_s - began_s,
        tokens=[tokens[row] for row in range(len(prompts))],
        sweeps=sweeps,
        sweeps_s=sweeps_s,
        engine_cpu_s=engine_cpu_s,
        others_cpu_s=others_cpu_s,
    )


def _figures(args: argparse.Namespace, pairs: list[tuple[Run, Run]]) -> tuple[list[Figure], dict[str, Any]]:
    generated = args.rows * args.max_tokens
    without, with_ray = (min(run.wall_s for run in runs) for runs in zip(*pairs, strict=True))
    starts = [min(run.start_s for run in runs) for runs in zip(*pairs, strict=True)]
    figures = [
        Figure(
            what=f"{args.rows} rows of {args.words} words and {args.max_tokens} new tokens, one actor, batches of {args.batch_size}",
            value=f"{generated / with_ray:.1f} tokens/s",
            beside=f"without Ray {generated / without:.1f} tokens/s",
            ratio=with_ray / without,
            target=TARGET,
            at_most=True,
        ),
        *_of_sweeps(*pairs[-1]),
        Figure(what="before the first row", value=f"{starts[1]:.1f} s", beside=f"without Ray {starts[0]:.1f} s"),
    ]
    walls = [[run.wall_s for run in pair] for pair in pairs]
    sweeps = [[[run.sweeps, run.sweeps_s] for run in pair] for pair in pairs]
    cpu = [[[run.engine_cpu_s, run.others_cpu_s] for run in pair] for pair in pairs]
    return figures, {
        "rounds_wall_s": walls,
        "rounds_sweeps": sweeps,
        "rounds_cpu_s": cpu,
        "start_s": starts,
        "generated_tokens": generated,
    }


def _of_sweeps(without: Run, with_ray: Run) -> list[Figure]:
    """What Ray does to the engine, apart from how fast the machine is at the time: of the last round."""
    shares = [100 * (1 - run.sweeps_s / run.wall_s) for run in (without, with_ray)]
    return [
        Figure(
            what="sweeps",
            value=f"{with_ray.sweeps}",
            beside=f"without Ray {without.sweeps}",
            ratio=with_ray.sweeps / without.sweeps,
        ),
        Figure(what="time outside of sweeps", value=f"{shares[1]:.1f} %", beside=f"without Ray {shares[0]:.1f} %"),
        Figure(
            what="processor time of the engine",
            value=f"{with_ray.engine_cpu_s:.1f} s",
            beside=f"without Ray {without.engine_cpu_s:.1f} s",
            ratio=with_ray.engine_cpu_s / without.engine_cpu_s,
        ),
        Figure(
            what="processor time of all other processes",
            value=f"{with_ray.others_cpu_s:.1f} s",
            beside=f"without Ray {without.others_cpu_s:.1f} s",
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.scaling.ray_overhead", description="What Ray costs.")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--words", type=int, default=24, help="of a prompt")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument(
        "--dtype", default="float32", help="in others tokens depend on which rows meet, and are not compared"
    )
    parser.add_argument("--rows-in-flight", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    add_flags(parser, size="demo", workdir=Path("build/scaling"))
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
