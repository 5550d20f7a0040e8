"""The speed benchmark: every figure beside its limit and a peer, measured in the same run, on the same machine.

    python -m scripts.bench                      # everything, about 40 minutes on 2 cores
    python -m scripts.bench --section limit      # one section
    python -m scripts.bench --quick              # does the benchmark work? its numbers mean nothing

Sections: `check` outputs against transformers'; `limit` three classes of jobs against max(D, C) and a bare loop;
`resident` and `ragged` prompts against transformers in memory; `offload` against accelerate's disk offload; `rows` tokens/s against rows in
flight; `memory` peak against plan; `steady` rows in flight against the KV capacity; `packed` the model in int8, fp8, int4
and mxfp4 against bf16 and against its own limits. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flexmoe.errors import FlexMoEError
from scripts.benchmark import loads
from scripts.benchmark.checks import check, memory, steady
from scripts.benchmark.compare import ragged, resident
from scripts.benchmark.context import QUICK, Bench, Scale, make_checkpoint
from scripts.benchmark.limit import limit, rows
from scripts.benchmark.offload import offload
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.benchmark.worker import WorkerError
from scripts.packed.section import packed

Section = Callable[[Bench], tuple[list[Figure], dict]]
SECTIONS: dict[str, Section] = {
    "check": check,
    "memory": memory,
    "steady": steady,
    "limit": limit,
    "rows": rows,
    "resident": resident,
    "ragged": ragged,
    "offload": offload,
    "packed": packed,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="a small model and short runs, to see that it works")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: `make_checkpoint --size bench`, made")
    parser.add_argument(
        "--workdir", type=Path, default=Path("build"), metavar="DIR", help="checkpoints and offload files"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON record, table beside it; default benchmarks/cpu.json"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds per class; default 5")
    parser.add_argument(
        "--class",
        action="append",
        choices=list(loads.CLASSES),
        dest="classes",
        help="of jobs, in the section limit; repeatable; default: all",
    )
    parser.add_argument("--full-peers", action="store_true", help="no peer is projected: an hour more")
    return parser


def _bench(args: argparse.Namespace) -> tuple[Bench, Path]:
    """The run's context, and where its record goes; a quick run leaves the real record alone."""
    scale = QUICK if args.quick else Scale()
    asked = {"repeats": args.repeats, "classes": args.classes and tuple(args.classes)}
    scale = replace(scale, **{name: value for name, value in asked.items() if value is not None})
    size = "demo" if args.quick else "bench"
    model = args.checkpoint
    if model is None:
        model = args.workdir / size
        make_checkpoint(model, "--size", size)
    out = args.out or (args.workdir / "bench-quick.json" if args.quick else Path("benchmarks/cpu.json"))
    plot = out.with_name("rows-quick.png" if args.quick else "rows.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        model=model.resolve(), workdir=args.workdir.resolve(), plot=plot, scale=scale, full_peers=args.full_peers
    )
    bench.workdir.mkdir(parents=True, exist_ok=True)
    return bench, out


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code: 0 when every target is met or the run is quick, else 3."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    missed = []
    try:
        bench, out = _bench(args)
        arch = bench.arch
        about = {
            "command": shlex.join(["python", "-m", "scripts.bench", *argv]),
            "machine": machine(),
            "versions": versions(),
            "model": f"{arch.name}: {arch.model_type}, {arch.total_bytes / 1e9:.2f} GB in {8 * arch.dtype_bytes} bits, "
            f"{arch.num_layers} layers of {arch.num_experts} experts, hidden {arch.hidden}, ffn {arch.ffn}",
        }
        record = Record(out, about)
        bench.say(f"{about['model']}; {about['machine']}; load average {os.getloadavg()[0]:.2f}; {about['versions']}")
        for name in args.section or SECTIONS:
            bench.say(f"--- {name}")
            begin = time.perf_counter()
            figures, raw = SECTIONS[name](bench)
            record.add(name, figures, raw, time.perf_counter() - begin)
            print("\n".join(figure_table(figures)), flush=True)
            missed += [figure.what for figure in figures if figure.met is False]
    except (FlexMoEError, WorkerError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    bench.say(f"record: {out}, table: {out.with_suffix('.md')}; {len(missed)} targets missed")
    return 3 if missed and not args.quick else 0


if __name__ == "__main__":
    sys.exit(main())
