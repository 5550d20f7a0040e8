"""Is the cost model true? Probe the machine once, run configurations it has never seen, print predicted beside measured.

``python -m scripts.validate_cost_model``: three classes (disk-bound, compute-bound, balanced), two models, placements over
three tiers. No constant comes from these runs. Disks drift, so the disk rate just before and after a run is fed to its
prediction. A run is repeated when its two disk rates differ by more than 20 %, or when the cores, timed before and after
it, are more than 20 % off what they were right after the probe (shared machines drift too; this is not fed to anything).
The median of three runs counts; all are recorded.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import flexmoe  # noqa: F401 - sets how idle threads wait, before torch is loaded
from cost_model.hardware.hardware import Hardware
from cost_model.hardware.speeds import with_speeds
from cost_model.model.arch import ModelArch
from cost_model.simulation.simulate import Simulation, simulate
from scripts.benchmark.probes import machine, versions
from scripts.make_checkpoint import SIZES, make_checkpoint
from scripts.validation.configs import Configuration, draw
from scripts.validation.record import lines, summary, write
from scripts.validation.runs import Run, Subject, cpu_rate, measure

MODELS = {
    "bench": SIZES["bench"],
    "small": {**SIZES["demo"], "num_hidden_layers": 12, "intermediate_size": 1792, "vocab_size": 16000},
}
REPEATS, MOST_TRIES, DRIFT = 3, 7, 0.2


def main(argv: list[str] | None = None) -> int:
    """Run the validation; 1 when it misses its targets."""
    args = _arguments(argv)
    subjects = {name: _subject(_checkpoint(args.work / name, config)) for name, config in MODELS.items()}
    hardware = _hardware(args)
    cpu_then = statistics.median(cpu_rate() for _ in range(5))
    configurations = draw({name: s.arch for name, s in subjects.items()}, hardware, args.seed, args.each)
    chosen = [c for c in configurations if args.only is None or c.name in args.only]
    results = []
    for configuration in chosen:
        result = validate(configuration, subjects[configuration.model], hardware, args.work, cpu_then)
        results.append(result)
        print(*lines(result), sep="\n", flush=True)
    record = {"machine": machine(), "versions": versions(), "seed": args.seed, "hardware": hardware.to_json()}
    record |= {"results": results, "summary": summary(results)}
    print(record["summary"]["text"])
    if args.record:
        write(args.record, record)
    return 0 if record["summary"]["met"] else 1


def validate(
    c: Configuration,
    subject: Subject,
    hardware: Hardware,
    work: Path,
    cpu_then: float,
    *,
    repeats: int = REPEATS,
    most: int = MOST_TRIES,
) -> dict:
    """Runs of one configuration, each with its prediction, until ``repeats`` are clean or ``most`` were made.

    Args:
        cpu_then: `cpu_rate` right after the probe that ``hardware`` is from.
    """
    runs: list[dict] = []
    for run in measure(c, subject, work, most):
        here = with_speeds(hardware, disk_read=run.disk_read_bytes_per_s / hardware.disk_read_bytes_per_s)
        predicted = simulate(subject.arch, here, c.workload, c.policy, full=True)
        runs.append(_compare(run, predicted, cpu_then))
        if sum(r["clean"] for r in runs) == repeats:
            break
    counted = [r for r in runs if r["clean"]] or runs
    middle = sorted(counted, key=lambda r: r["error"])[len(counted) // 2]
    return {**c.to_json(), "runs": runs, "median": middle, "error": statistics.median(r["error"] for r in counted)}


def _compare(run: Run, predicted: Simulation, cpu_then: float) -> dict:
    before, after = run.disk_before, run.disk_after
    cores = [rate / cpu_then for rate in (run.cpu_before, run.cpu_after)]
    return {
        "clean": abs(before - after) <= DRIFT * max(before, after) and all(abs(c - 1) <= DRIFT for c in cores),
        "disk_bytes_per_s": [before, after],
        "cores_against_probe": cores,
        "measured_s": run.wall_s,
        "predicted_s": predicted.job_s,
        "error": predicted.job_s / run.wall_s - 1,
        "sweeps": [run.sweeps, predicted.sweeps],
        "lanes_s": {lane: [run.lanes_s.get(lane, 0.0), predicted.lanes_s.get(lane, 0.0)] for lane in predicted.lanes_s},
    }


def _hardware(args: argparse.Namespace) -> Hardware:
    if args.hardware:
        return Hardware.load(args.hardware)
    command = [sys.executable, "-m", "flexmoe.probe", "-o", str(args.work / "machine.json"), "--dir", str(args.work)]
    subprocess.run([*command, "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
    return Hardware.load(args.work / "machine.json")


def _subject(path: Path) -> Subject:
    return Subject(arch=ModelArch.from_dir(path), path=path, disk_files=tuple(sorted(path.glob("*.safetensors"))))


def _checkpoint(path: Path, config: dict) -> Path:
    if not (path / "config.json").exists():
        print(f"making {path} …", file=sys.stderr, flush=True)
        make_checkpoint(path, config)
    return path


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--work", type=Path, default=Path("build"), help="where checkpoints and disk tiers go (default build)"
    )
    p.add_argument("--hardware", type=Path, help="a file of `python -m flexmoe.probe`, instead of probing now")
    p.add_argument("--seed", type=int, default=1, help="of the drawn configurations (default 1)")
    p.add_argument("--each", type=int, default=8, help="configurations per class (default 8)")
    p.add_argument("--only", nargs="+", help="names of the configurations to run")
    p.add_argument("--record", type=Path, help="write the record here (.json; a .md beside it)")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
