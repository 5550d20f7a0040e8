"""The GPU benchmark: every figure beside its limit or peer, measured in the same run. One NVIDIA GPU.

    python -m scripts.bench_gpu --stage probe        # copies, GEMM curve, HBM, CPU attention, disk
    python -m scripts.bench_gpu --stage 24           # Mixtral 8x7B, dummy weights, process capped to 24 GB
    python -m scripts.bench_gpu --stage validate     # is the cost model true on a GPU? predicted beside measured
    python -m scripts.bench_gpu --stage 24 --rehearse   # a tiny model on the cpu: does the benchmark work?

Stages: `parity` runs the tests marked gpu; `races` those of exactness, with random sleeps before copies and kernels and with
freed memory poisoned; `probe`; `16` and `24` plan for the cap with the rates of `flexmoe.probe` and time
the steady state at 512/256 and 77/128 against the prediction, per lane, and against the overlapped limit of ANCHORS at
the rates of this run; `validate` runs whole jobs of drawn and of planned policies and compares predicted with measured (12 drawn ones by `--seed`);
`peer` is transformers with accelerate's CPU offload on 8 of the 32 layers. Each takes up to 8 minutes and writes
benchmarks/gpu-<stage>.json with a table beside it; what `flexmoe.probe` found is gpu-machine.json, which `--hardware`
takes in further stages.

It needs torch 2.11, transformers 5.17 and what they bring, pytest for `parity` and `races`, and accelerate for `peer`. The
planner's pulp may travel as a wheel where it is not installed:

    python -m pip download --no-deps --only-binary=:all: -d build/wheels pulp
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from flexmoe.errors import FlexMoEError
from flexmoe.system.machine import filesystem
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.benchmark.worker import Worker, WorkerError
from scripts.gpu.context import Context
from scripts.support.wheels import use_wheels

Stage = Callable[[Context], tuple[list[Figure], dict]]
STAGES = ("parity", "races", "probe", "16", "24", "validate", "peer")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--workload", action="append", metavar="S/N", help="stages 16 and 24: only 512/256 or 77/128")
    parser.add_argument("--host-mem", type=float, default=100.0, metavar="GB", help="host memory for weights and KV")
    parser.add_argument("--nvme-mem", type=float, default=40.0, metavar="GB", help="most weight bytes on disk")
    parser.add_argument(
        "--hardware", type=Path, metavar="FILE", help="rates for the planner, instead of probing for them"
    )
    parser.add_argument("--seed", type=int, default=1, help="validate: of the drawn configurations (default 1)")
    parser.add_argument("--each", type=int, default=3, help="validate: configurations drawn per class (default 3)")
    parser.add_argument("--seconds", type=float, default=460.0, help="end the stage's timed part by then")
    parser.add_argument("--workdir", type=Path, default=Path("build"), metavar="DIR", help="offload files")
    parser.add_argument(
        "--wheels",
        type=Path,
        default=Path("build/wheels"),
        metavar="DIR",
        help="packages to import that are not installed",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="record, table and traces; default benchmarks")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on device cpu; its numbers mean nothing")
    return parser


def _stage(name: str) -> Stage:
    """Imported when the wheels are in their place."""
    from scripts.gpu import stages
    from scripts.gpu.capped import capped
    from scripts.gpu.exactness import parity, races
    from scripts.gpu.validate import validate

    capped_to = {"16": lambda run: capped(run, 16), "24": lambda run: capped(run, 24)}
    others = {"parity": parity, "probe": stages.probe, "peer": stages.peer, "races": races, "validate": validate}
    return {**capped_to, **others}[name]


def _model(stage: str, run: Context) -> str:
    if stage in ("parity", "races"):
        return "the tests' own, tiny ones in float32"
    if stage == "validate":
        from scripts.gpu.validate import DESCRIPTION

        return DESCRIPTION
    return f"{run.model}, dummy weights, bfloat16"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code: 0 when every target is met or it is a rehearsal, else 3."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        carried = use_wheels(args.wheels)
        run, stage = Context.of(args), _stage(args.stage)
        with Worker("scripts.gpu.probe") as worker:
            about = worker.ask("about", device=run.device)
        record = Record(
            run.out / f"gpu-{args.stage}.json",
            {
                "command": shlex.join(["python", "-m", "scripts.bench_gpu", *argv]),
                "machine": machine() | about | {"filesystem": filesystem(run.workdir)},
                "versions": versions(),
                "wheels": carried,
                "model": _model(args.stage, run),
            },
        )
        run.say(f"stage {args.stage} on {about}; {machine()}; {versions()}")
        begin = time.perf_counter()
        figures, raw = stage(run)
        section = f"{args.stage}, seed {run.seed}" if args.stage == "validate" else args.stage
        record.add(section, figures, raw, time.perf_counter() - begin)
    except (FlexMoEError, WorkerError, OSError) as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print("\n".join(figure_table(figures)), flush=True)
    missed = [figure.what for figure in figures if figure.met is False]
    run.say(f"record: {run.out}/gpu-{args.stage}.json; {len(missed)} targets missed")
    return 3 if missed and not args.rehearse else 0


if __name__ == "__main__":
    sys.exit(main())
