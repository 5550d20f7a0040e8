"""Whether a large file costs more than a small one, row by row: the whole program over files of 1 KB rows, tiny model.

    python -m scripts.runner.flat                          # 50,000, 150,000 and 500,000 rows, minutes on 2 cores
    python -m scripts.runner.flat --out benchmarks/runner.json

Memory is the most that a process held (VmHWM) beyond what it held for the smallest file, which has the model, the engine and what
its libraries keep of every shape that they have met in it already. Time is that of the processors, those of the pre-flight's
processes included, so that neighbours do not count; per row it is that of the rows beyond the next smaller file, without
the start of the program thereby.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.make_checkpoint import SIZES, make_checkpoint

SIZES_ROWS = (50_000, 150_000, 500_000)
LIMIT_BYTES = 300 << 20
#: A row of the largest file may take so much longer than one of the smaller, the noise of a shared machine included.
SLOWER = 1.25
_ROW_BYTES, _VOCAB = 1000, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One job of so many rows, as a process of its own."""

    rows: int
    wall_s: float
    cpu_s: float
    peak_bytes: int


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code is 1 where a target is missed."""
    args = _parser().parse_args(argv)
    directory = args.workdir / "bench-flat"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    checkpoint = args.workdir / "checkpoint-tiny"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint, SIZES["tiny"])
    runs = [run(checkpoint, directory, rows) for rows in args.rows]
    shutil.rmtree(directory)
    figures = figures_of(runs)
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {"machine": machine(), "versions": versions(), "model": "tiny"}
        about["command"] = shlex.join(["python", "-m", "scripts.runner.flat", *argv])
        raw = {str(each.rows): [each.wall_s, each.cpu_s, each.peak_bytes] for each in runs}
        Record(args.out, about).add("flat", figures, raw, sum(each.wall_s for each in runs))
    return 0 if all(figure.met in (True, None) for figure in figures) else 1


def run(checkpoint: Path, directory: Path, rows: int) -> Run:
    """Runs the program over so many rows.

    Raises:
        ValueError: a row is missing in the output, or out of order.
    """
    source, output, metrics = directory / "in.jsonl", directory / "out.jsonl", directory / "metrics.json"
    write_rows(source, rows)
    command = [sys.executable, "-m", "flexmoe.run", "--model", str(checkpoint), "-i", str(source), "-o", str(output)]
    command += ["--percent", "100", "0", "100", "0", "100", "0"]
    command += [
        "--metrics-json",
        str(metrics),
        "--gpu-batch-size",
        "512",
        "--prefill-tokens",
        "2048",
        "--device",
        "cpu",
    ]
    begin, cpu_s = time.perf_counter(), _cpu_s()
    subprocess.run([*command, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    wall_s, cpu_s = time.perf_counter() - begin, _cpu_s() - cpu_s
    with open(output, encoding="utf-8") as lines:
        wrong = next((n for n, line in enumerate(lines) if json.loads(line)["custom_id"] != custom_id(n)), None)
    record = json.loads(metrics.read_text(encoding="utf-8"))
    if wrong is not None or record["rows_ok"] != rows:
        raise ValueError(f"{record['rows_ok']} of {rows} rows came out, row {wrong} is the first that is not its own")
    return Run(rows=rows, wall_s=wall_s, cpu_s=cpu_s, peak_bytes=record["peak_process_bytes"])


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def custom_id(row: int) -> str:
    """Of a row."""
    return f"request-{row:09}"


def write_rows(path: Path, rows: int) -> None:
    """Short prompts in rows of 1 KB: what the engine computes is not what is measured."""
    rng, note = random.Random(0), "x" * _ROW_BYTES
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            prompt = [rng.randrange(3, _VOCAB) for _ in range(4)]
            line = {"custom_id": custom_id(row), "prompt": prompt, "max_tokens": 1, "ignore_eos": True}
            file.write(json.dumps(line | {"metadata": {"note": note[: _ROW_BYTES - len(str(line))]}}) + "\n")


def figures_of(runs: list[Run]) -> list[Figure]:
    """Each larger file against the smallest one."""
    small, *larger = runs
    figures = []
    for each in larger:
        beyond = each.peak_bytes - small.peak_bytes
        figures.append(
            Figure(
                what=f"memory of a job of {each.rows:,} rows beyond that of one of {small.rows:,}",
                value=f"{beyond / 2**20:.0f} MiB",
                beside=f"{LIMIT_BYTES >> 20} MiB; {beyond / (each.rows - small.rows):.0f} bytes a row",
                ratio=beyond / LIMIT_BYTES,
                target=1.0,
                at_most=True,
            )
        )
    rates = [(b.cpu_s - a.cpu_s) / (b.rows - a.rows) for a, b in zip(runs, larger)]
    if len(rates) > 1:
        figures.append(
            Figure(
                what=f"processor time of each row beyond {runs[-2].rows:,}",
                value=f"{1e6 * rates[-1]:.0f} us",
                beside=f"{1e6 * rates[0]:.0f} us, each row beyond {small.rows:,}",
                ratio=rates[-1] / rates[0],
                target=SLOWER,
                at_most=True,
            )
        )
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.runner.flat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES_ROWS, help="of each job, the smallest first")
    parser.add_argument("--workdir", type=Path, default=Path("build"), metavar="DIR", help="checkpoint and files")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON record, with a table beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
