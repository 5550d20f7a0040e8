"""Is the cost model true? Probe the machine once, run configurations it has never seen, print predicted beside measured.

``python -m scripts.validate_cost_model`` has three sets, with placements over three tiers and both schedules:

- even: two synthetic models, rows of like lengths, in three classes by what bounds them (disk, compute, both);
- mixed: MT-Bench prompts with 1 to 512 new tokens, Zipf's and two-peaked lengths, few rows, prompts that are scored, samples
  of one prompt, and a real model (SmolLM2 as a mixture of experts, downloaded once; without a network a synthetic one whose
  routers have favourites);
- packed: the two synthetic models with weights in int4, int8, fp8 and mxfp4, on the disk, over all tiers and resident, with
  many rows and few; two of the twelve keep their KV cache as int8.

No constant comes from these runs. A shared machine changes its speed within seconds, so between the sweeps of a run, about
every 1.5 s of them, reads, the memory and products of experts are timed, and the run is predicted for the speeds found; beside it
the record has what was predicted for the machine as the probe found it. A run is repeated when more than 3 % of the cores' time
went to other virtual machines, beside what serving its own reads costs. The median of three runs counts; all are recorded.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from cost_model.hardware.hardware import Hardware
from cost_model.hardware.link_curves import transfer_s
from cost_model.hardware.speeds import with_speeds
from cost_model.model.arch import ModelArch
from cost_model.model.packing import packed_as
from cost_model.simulation.simulate import Simulation, simulate
from flexmoe.errors import FlexMoEError
from flexmoe.quantizing.quantize import quantize
from flexmoe.text.tokenizer import Tokenizer
from policies.policy import WEIGHT_FORMATS
from scripts.benchmark.probes import machine, versions
from scripts.checkpoints.shapes import SIZES
from scripts.demonstration.models import REAL
from scripts.make_checkpoint import make_checkpoint
from scripts.support.corpus import corpus_words
from scripts.support.stolen import wait_for_calm
from scripts.validation.configs import Configuration, draw
from scripts.validation.drift import corrected
from scripts.validation.jobs import REAL_WEIGHTS, draw_jobs
from scripts.validation.looks import TOKENS, UNIT_BYTES, mean_look
from scripts.validation.packed import draw_packed
from scripts.validation.record import lines, summary, write
from scripts.validation.runs import Run, Subject, measure

MODELS = {
    "bench": SIZES["bench"],
    "small": {**SIZES["demo"], "num_hidden_layers": 12, "intermediate_size": 1792, "vocab_size": 16000},
}
#: What takes the place of the real model where it cannot be had: routers prefer experts by Zipf's law.
SKEWED = {**SIZES["demo"], "num_hidden_layers": 12, "num_local_experts": 8}
EVEN, MIXED, PACKED = "even", "mixed", "packed"
EACH = {EVEN: 8, MIXED: 3}
REPEATS, MOST_TRIES = 3, 5


def main(argv: list[str] | None = None) -> int:
    """Run the validation; 1 when it misses its targets."""
    args = _arguments(argv)
    sets = (EVEN, MIXED, PACKED) if args.set == "all" else (args.set,)
    subjects = {name: _subject(_checkpoint(args.work / name, config)) for name, config in MODELS.items()}
    synthetic = {name: s.arch for name, s in subjects.items()}
    if MIXED in sets:
        subjects[REAL_WEIGHTS] = _real(args.work)
    archs = {name: s.arch for name, s in subjects.items()}
    hardware = _hardware(args)
    results: dict[str, list[dict]] = {name: [] for name in sets}
    print(f"{machine()['cpu']}, {machine()['cores']} cores", flush=True)
    for name in sets:
        for c in _configurations(name, args, archs, synthetic, hardware):
            if args.only is None or c.name in args.only:
                subject = _packed(subjects, c.model) if name == PACKED else subjects[c.model]
                results[name].append(validate(c, subject, hardware, args.work))
                print(*lines(results[name][-1]), sep="\n", flush=True)
    summaries = {name: summary(found) for name, found in results.items() if found}
    print(*(f"{name}: {found['text']}" for name, found in summaries.items()), sep="\n")
    if args.record:
        about = {"machine": machine(), "versions": versions(), "seed": args.seed, "hardware": hardware.to_json()}
        write(args.record, about | {"results": sum(results.values(), []), "summaries": summaries})
    return 0 if summaries and all(found["met"] for found in summaries.values()) else 1


def _configurations(
    name: str,
    args: argparse.Namespace,
    archs: dict[str, ModelArch],
    synthetic: dict[str, ModelArch],
    hardware: Hardware,
) -> list[Configuration]:
    if name == EVEN:
        return draw(synthetic, hardware, args.seed, args.each or EACH[name])
    if name == PACKED:
        pairs = [(model, format) for model in MODELS for format in WEIGHT_FORMATS]
        packed = {f"{model}-{format}": packed_as(synthetic[model], format) for model, format in pairs}
        return draw_packed(packed, hardware, args.seed)
    return draw_jobs(archs, hardware, args.seed, args.each or EACH[name])


def validate(
    c: Configuration,
    subject: Subject,
    hardware: Hardware,
    work: Path,
    *,
    repeats: int = REPEATS,
    most: int = MOST_TRIES,
) -> dict:
    """Runs of one configuration, each with its prediction, until ``repeats`` are clean or ``most`` were made."""
    runs: list[dict] = []
    predict = partial(simulate, subject.arch, workload=c.workload, policy=c.policy, full=True, rows=c.waiting)

    for run in measure(c, subject, hardware, work, most):
        runs.append(_compare(run, partial(predict, cache_experts=run.cache_experts), hardware))
        if sum(r["clean"] for r in runs) == repeats:
            break
    counted = [r for r in runs if r["clean"]] or runs
    middle = sorted(counted, key=lambda r: r["error"])[len(counted) // 2]
    errors = {name: statistics.median(r[name] for r in counted) for name in ("error", "error_as_probed")}
    return {**c.to_json(), "runs": runs, "median": middle, **errors}


def _compare(run: Run, predict: Callable[..., Simulation], probed: Hardware) -> dict:
    found = mean_look(run.stretches)
    as_looked_at_s = transfer_s(probed.disk_read_curve, probed.disk_read_bytes_per_s, UNIT_BYTES)
    here = with_speeds(probed, disk_read=found.disk * as_looked_at_s / UNIT_BYTES)
    predicted = corrected(lambda machine: predict(hardware=machine), here, found.memory, list(zip(TOKENS, found.cores)))
    as_probed = predict(hardware=probed)
    return {
        "clean": run.stolen <= run.most_stolen,
        "disk_bytes_per_s": found.disk,
        "memory_against_probe": found.memory,
        "cores_against_probe": found.cores,
        "stretches": [asdict(stretch) for stretch in run.stretches],
        "stolen": run.stolen,
        "measured_s": run.wall_s,
        "predicted_s": predicted.job_s,
        "predicted_as_probed_s": as_probed.job_s,
        "error": predicted.job_s / run.wall_s - 1,
        "error_as_probed": as_probed.job_s / run.wall_s - 1,
        "sweeps": [run.sweeps, as_probed.sweeps],
        "lanes_s": {lane: [run.lanes_s.get(lane, 0.0), seconds] for lane, seconds in predicted.lanes_s.items()},
    }


def _hardware(args: argparse.Namespace) -> Hardware:
    if args.hardware:
        return Hardware.load(args.hardware)
    command = [sys.executable, "-m", "flexmoe.probe", "-o", str(args.work / "machine.json"), "--dir", str(args.work)]
    wait_for_calm(300.0)
    subprocess.run([*command, "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
    return Hardware.load(args.work / "machine.json")


def _subject(path: Path) -> Subject:
    return Subject(arch=ModelArch.from_dir(path), path=path, disk_files=tuple(sorted(path.glob("*.safetensors"))))


def _packed(subjects: dict[str, Subject], name: str) -> Subject:
    """A model with its weights packed, beside the one that it is made of; the name ends in the format."""
    model, format = name.rsplit("-", 1)
    path = subjects[model].path.with_name(name)
    if not path.exists():
        print(f"packing {path} …", file=sys.stderr, flush=True)
        quantize(subjects[model].path, path, format)
    return _subject(path)


def _real(work: Path) -> Subject:
    """The real model with text of its language; where it cannot be had, one whose routers have favourites."""
    try:
        subject = _subject(REAL.checkpoint(work))
    except FlexMoEError as error:
        print(f"no real model: {error}. A synthetic one with skewed routers takes its place.", file=sys.stderr)
        return _subject(_checkpoint(work / "skewed", SKEWED, router_skew=1.0))
    return replace(subject, text=tuple(Tokenizer.load(subject.path).encode(" ".join(corpus_words()))))


def _checkpoint(path: Path, config: dict, **options: float) -> Path:
    if not (path / "config.json").exists():
        print(f"making {path} …", file=sys.stderr, flush=True)
        make_checkpoint(path, config, **options)
    return path


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--work", type=Path, default=Path("build"), help="where checkpoints and disk tiers go (default build)"
    )
    p.add_argument("--hardware", type=Path, help="a file of `python -m flexmoe.probe`, instead of probing now")
    p.add_argument("--set", choices=[EVEN, MIXED, PACKED, "all"], default="all", help="what is run (default all)")
    p.add_argument("--seed", type=int, default=1, help="of the drawn configurations (default 1)")
    p.add_argument("--each", type=int, help="configurations of a class (default 8) and of a kind of job (default 3)")
    p.add_argument("--only", nargs="+", help="names of the configurations to run")
    p.add_argument("--record", type=Path, help="write the record here (.json; a .md beside it)")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
