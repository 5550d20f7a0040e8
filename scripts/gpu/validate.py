"""The stage `validate` of the GPU benchmark: predicted beside measured, as `validate_cost_model` does it, on the GPU.

Two models with dummy weights; configurations of every class drawn by the seed, and for each model the policy that the
planner finds for a job that fits neither GPU nor host memory. What the time does not allow is left out and said.
"""

from __future__ import annotations

from pathlib import Path

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.planner.solve import solve
from cost_model.timing.evaluate import evaluate
from flexmoe.probing.disk import random_buffers, transfer
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DirectFile
from policies.common.errors import UsageError
from policies.policy import Workload
from scripts.benchmark.record import Figure
from scripts.gpu.context import TINY, Context, reduced_model
from scripts.gpu.plan import Budget
from scripts.make_checkpoint import SIZES
from scripts.validate_cost_model import validate as validate_one
from scripts.validation.configs import CLASSES, Configuration, classify, draw
from scripts.validation.record import MEAN_TARGET, WORST_TARGET, lines, summary
from scripts.validation.runs import Subject

DESCRIPTION = (
    "Mixtral 8x7B cut to 4 layers (wide), 16 layers of 8 experts of 1024 x 3584 (deep); dummy weights, bfloat16"
)
MODELS = {"wide": {"num_hidden_layers": 4}, "deep": SIZES["bench"]}
REHEARSED = {"wide": TINY, "deep": TINY | {"hidden_size": 128, "num_hidden_layers": 6}}
SECONDS, REHEARSED_SECONDS = (1.0, 10.0), (0.05, 1.0)
TURNS, REPEATS, MOST_TRIES = 3000, 3, 4
DISK_FILE_BYTES, REHEARSED_DISK_FILE_BYTES = 1 << 30, 32 << 20
_PIECE_BYTES = 8 << 20
#: Of the weights' bytes, what a planned job may take on the GPU and in host memory.
PLANNED_GPU, PLANNED_HOST = 0.45, 0.65
PLANNED_JOB = Workload(prompt_len=256, gen_len=16, num_requests=192)
REHEARSED_JOB = Workload(prompt_len=24, gen_len=8, num_requests=24)
#: Loading and the disk's rate take about so much beside the runs of a configuration.
AROUND_S = 15.0


def validate(run: Context) -> tuple[list[Figure], dict]:
    """Predicted against measured, whole job and per lane."""
    hardware = run.hardware()
    disk_file = run.workdir / "disk-rate.bin"
    try:
        _write(disk_file, REHEARSED_DISK_FILE_BYTES if run.rehearse else DISK_FILE_BYTES)
        results = _results(run, _subjects(run, disk_file), hardware)
    finally:
        disk_file.unlink(missing_ok=True)
    if not results:
        raise UsageError("no time was left to run a single configuration; raise --seconds")
    total = summary(results)
    run.say(total["text"])
    return [*map(_figure, results), *_summary_figures(total)], {
        "hardware": hardware.to_json(),
        "seed": run.seed,
        "results": results,
        "summary": total,
    }


def _results(run: Context, subjects: dict[str, Subject], hardware: Hardware) -> list[dict]:
    results, (repeats, most) = [], (1, 1) if run.rehearse else (REPEATS, MOST_TRIES)
    for c in _configurations(run, subjects, hardware):
        subject = subjects[c.model]
        expected_s = evaluate(subject.arch, hardware, c.workload, c.policy).wall_s
        if run.left_s() < repeats * expected_s + (0 if run.rehearse else AROUND_S):
            run.say(f"{c.name} is left out: {run.left_s():.0f} s are left")
            continue
        results.append(validate_one(c, subject, hardware, run.workdir, repeats=repeats, most=most))
        run.say("\n".join(lines(results[-1])))
    return results


def _subjects(run: Context, disk_file: Path) -> dict[str, Subject]:
    subjects = {}
    for name, changes in (REHEARSED if run.rehearse else MODELS).items():
        path = Path(reduced_model(run.workdir / f"validate-{name}", changes))
        subjects[name] = Subject(
            arch=ModelArch.from_dir(path), path=path, disk_files=(disk_file,), device=run.device, load_format="dummy"
        )
    return subjects


def _write(path: Path, nbytes: int) -> None:
    """A file that nothing can compress, on the disk that the disk tier lives on."""
    file = DirectFile(path, writable=True)
    try:
        transfer("disk_write", file, random_buffers(Device("cpu"), _PIECE_BYTES, 4), nbytes, 120.0)
    finally:
        file.close()


def _configurations(run: Context, subjects: dict[str, Subject], hardware: Hardware) -> list[Configuration]:
    """The planned ones, then those that were drawn, one of each class in turn."""
    free = hardware.gpu.memory_bytes - hardware.gpu.reserved_bytes
    capped = Budget(gpu_bytes=free, host_bytes=hardware.host_memory_bytes, disk_bytes=run.disk_bytes)
    archs = {name: subject.arch for name, subject in subjects.items()}
    found = draw(
        archs,
        capped.of(hardware),
        run.seed,
        1 if run.rehearse else run.each,
        seconds=REHEARSED_SECONDS if run.rehearse else SECONDS,
        turns=TURNS,
    )
    order = CLASSES[hardware.device]
    found.sort(key=lambda c: (int(c.name.rsplit("-", 1)[1]), order.index(c.kind)))
    return [*(_planned(run, name, archs[name], hardware) for name in archs), *found]


def _planned(run: Context, name: str, arch: ModelArch, hardware: Hardware) -> Configuration:
    """The planner's policy where weights have to be in all three tiers."""
    job = REHEARSED_JOB if run.rehearse else PLANNED_JOB
    budget = Budget(
        gpu_bytes=int(PLANNED_GPU * arch.total_bytes),
        host_bytes=int(PLANNED_HOST * arch.total_bytes),
        disk_bytes=max(run.disk_bytes, arch.total_bytes),
    )
    plan = solve(arch, budget.of(hardware), job)
    bound = classify(plan.prediction, hardware.device)
    rows = ((job.prompt_len, job.gen_len),) * job.num_requests
    return Configuration(name=f"plan-{name}", model=name, kind=bound, policy=plan.policy, rows=rows)


def _figure(result: dict) -> Figure:
    m = result["median"]
    return Figure(
        what=f"{result['name']}, {result['model']}: whole job of {result['rows']} rows, {result['kind']}",
        value=f"{m['measured_s']:.2f} s",
        beside=f"predicted: {m['predicted_s']:.2f} s ({100 * result['error']:+.1f} %)",
        ratio=abs(result["error"]),
        target=WORST_TARGET,
        at_most=True,
    )


def _summary_figures(total: dict) -> list[Figure]:
    mean, worst = total["mean_abs_error"], total["worst_abs_error"]
    return [
        Figure(
            what="mean absolute error of whole-job time",
            value=f"{100 * mean:.1f} %",
            beside="what was measured",
            ratio=mean,
            target=MEAN_TARGET,
            at_most=True,
        ),
        Figure(
            what="worst error of whole-job time",
            value=f"{100 * worst:.1f} %",
            beside="what was measured",
            ratio=worst,
            target=WORST_TARGET,
            at_most=True,
        ),
    ]
