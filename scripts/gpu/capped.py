"""The stages `16` and `24` of the GPU benchmark: a full-size model in a capped process, by the planner's policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from cost_model.timing.evaluate import Prediction
from policies.common.memory_units import GIB
from policies.policy import Policy, Workload
from scripts.benchmark.record import Figure
from scripts.benchmark.worker import Worker
from scripts.gpu.context import Context, rates_of
from scripts.gpu.limit import Limit, machine_limit
from scripts.gpu.plan import Budget, Planned, plan
from scripts.validation.record import WORST_TARGET

TARGET = 0.8
WARM, TIMED = 5, 24
JOB_BLOCKS = 10
REHEARSAL_CAP_BYTES = int(322e6)


def capped(run: Context, cap_gb: int) -> tuple[list[Figure], dict]:
    """The steady state of a full-size model in a process capped to so many GB on the GPU."""
    found, hardware = run.measure(), run.hardware()
    rates, cap = rates_of(found), REHEARSAL_CAP_BYTES if run.rehearse else cap_gb * 10**9
    figures, raw = [], {"probes": found, "hardware": hardware.to_json(), "cap_bytes": cap}
    for place, workload in enumerate(run.workloads):
        name = f"{workload.prompt_len}/{workload.gen_len}"
        with Worker("scripts.gpu.steady") as worker:
            room = worker.ask("room", device=run.device, gpu_bytes=cap, host_bytes=run.host_bytes)
            budget = Budget(**room, disk_bytes=run.disk_bytes)
            chosen = plan(run.arch, workload, hardware, budget, rates)
            run.say(f"{name}: {chosen.policy}; {_expected(chosen)}")
            trace = run.out / f"gpu-{cap_gb}-{name.replace('/', '-')}.trace.json"
            measured = worker.ask(
                "steady",
                **engine_arguments(run, run.model, chosen.policy, workload, cap, run.host_bytes),
                warm=WARM,
                timed=TIMED,
                rows=chosen.rows,
                deadline_s=run.left_s() / (len(run.workloads) - place),
                trace=str(trace),
            )
        raw[name] = {
            "policy": asdict(chosen.policy),
            "budget": asdict(budget),
            "predicted": chosen.prediction.to_json(),
            "own_limit": chosen.limit.to_json(),
            **measured,
        }
        if not run.rehearse:
            best = machine_limit(
                run.arch, workload, rates, gpu_bytes=cap, host_bytes=budget.host_bytes, disk_bytes=budget.disk_bytes
            )
            raw[name]["limit"] = best.to_json()
            figures.append(_against_limit(f"{name}, {cap_gb} GB", best, measured))
        figures += _figures(f"{name}, {cap_gb} GB", cap, workload, chosen, measured)
        run.say(f"{name}: {_rate(measured):.1f} tok/s; {_expected(chosen)}; loaded in {measured['load_s']:.0f} s")
    return figures, raw


def engine_arguments(
    run: Context, model: str, policy: Policy, workload: Workload, cap: int, host_bytes: int
) -> dict[str, object]:
    """What a worker needs to open the engine."""
    budgets = {"gpu_mem": cap / GIB, "cpu_mem": host_bytes / GIB, "nvme_mem": run.disk_bytes / GIB}
    return {
        "model": model,
        "policy": asdict(policy),
        "lengths": [workload.prompt_len, workload.gen_len],
        "budgets": budgets,
        "device": run.device,
        "offload_dir": str(run.workdir / "offload"),
    }


def tokens_figure(what: str, value: float, beside: str, against: float, target: float | None = None) -> Figure:
    """Tokens per second beside others."""
    return Figure(what=what, value=f"{value:.2f} tok/s", beside=beside, ratio=value / max(1e-9, against), target=target)


def _rate(measured: Mapping) -> float:
    return measured["generated"] / measured["wall_s"]


def _expected(chosen: Planned) -> str:
    limit = chosen.limit
    return (
        f"predicted {chosen.prediction.tokens_per_s:.1f} tok/s, {chosen.prediction.bottleneck}; limit of its bytes "
        f"{limit.tokens_per_s:.1f} tok/s, {limit.bound_by}"
    )


def _against_limit(name: str, best: Limit, measured: Mapping) -> Figure:
    beside = f"overlapped e2e limit at this run's rates: {best.tokens_per_s:.1f} tok/s ({best.bound_by}, {best.rows:.0f} rows)"
    return tokens_figure(f"{name}: generated, steady state, e2e", _rate(measured), beside, best.tokens_per_s, TARGET)


def _figures(name: str, cap: int, workload: Workload, chosen: Planned, measured: Mapping) -> list[Figure]:
    wall_s, sweeps, own = measured["wall_s"], measured["sweeps"], chosen.limit
    beside = f"limit of the policy's own bytes: {own.tokens_per_s:.1f} tok/s ({own.bound_by}, {own.rows:.0f} rows)"
    same = f"{name}: generated, {sweeps} sweeps of {wall_s / sweeps:.3f} s"
    ideal = measured["generated"] * workload.prompt_len / workload.gen_len
    return [
        tokens_figure(same, _rate(measured), beside, own.tokens_per_s),
        *_predicted(name, chosen.prediction, measured),
        Figure(
            what=f"{name}: prompt tokens prefilled meanwhile",
            value=f"{measured['prompt']}",
            beside=f"generated · s / n = {ideal:.0f}",
            ratio=measured["prompt"] / ideal,
            target=0.95,
        ),
        Figure(
            what=f"{name}: GPU memory at its peak ({measured['gpu_peak_source']})",
            value=f"{measured['gpu_peak_bytes'] / 1e9:.2f} GB",
            beside=f"cap {cap / 1e9:.2f} GB",
            ratio=measured["gpu_peak_bytes"] / cap,
            target=1.0,
            at_most=True,
        ),
        Figure(
            what=f"{name}: host memory at its peak",
            value=f"{measured['host_peak_bytes'] / 1e9:.1f} GB",
            beside="128 GB",
            ratio=measured["host_peak_bytes"] / 128e9,
            target=1.0,
            at_most=True,
        ),
        _whole_job(name, workload, chosen, measured),
    ]


def _predicted(name: str, prediction: Prediction, measured: Mapping) -> list[Figure]:
    """Predicted beside measured: the rate, its error, and each lane's seconds at work in a sweep."""
    rate, sweeps = _rate(measured), measured["sweeps"]
    error = prediction.tokens_per_s / rate - 1
    figures = [
        tokens_figure(
            f"{name}: measured against predicted",
            rate,
            f"predicted: {prediction.tokens_per_s:.2f} tok/s",
            prediction.tokens_per_s,
        ),
        Figure(
            what=f"{name}: error of the prediction",
            value=f"{100 * error:+.1f} %",
            beside="what was measured",
            ratio=abs(error),
            target=WORST_TARGET,
            at_most=True,
        ),
    ]
    for lane in sorted({*prediction.lanes_s, *measured["lanes"]}):
        did = measured["lanes"].get(lane, {"busy_s": 0.0, "worker_s": 0.0, "bytes": 0})
        expected_s = prediction.lanes_s.get(lane, 0.0) * prediction.sweep_s / prediction.wall_s
        moved = f", {did['bytes'] / measured['wall_s'] / 1e9:.1f} GB/s over the run" if did["bytes"] else ""
        figures.append(
            Figure(
                what=f"{name}: lane {lane} at work",
                value=f"{did['busy_s'] / sweeps:.3f} s a sweep (its workers together {did['worker_s'] / sweeps:.3f}){moved}",
                beside=f"predicted: {expected_s:.3f} s of {prediction.sweep_s:.3f} s",
                ratio=did["busy_s"] / sweeps / expected_s if expected_s else None,
            )
        )
    return figures


def _whole_job(name: str, workload: Workload, chosen: Planned, measured: Mapping) -> Figure:
    n, rows = workload.gen_len, chosen.rows
    job_s = (JOB_BLOCKS + 1) * n * measured["wall_s"] / measured["sweeps"]
    return Figure(
        what=f"{name}: a whole job of {JOB_BLOCKS} blocks ({JOB_BLOCKS * rows} rows)",
        value=f"predicted, not measured: {job_s / 3600:.2f} h, {JOB_BLOCKS * rows * n / job_s:.1f} tok/s",
        beside=f"steady state {_rate(measured):.1f} tok/s",
    )
