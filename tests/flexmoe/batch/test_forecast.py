"""`--policy auto` plans for the rows of the file and runs that plan; what was predicted stands beside what was measured."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import cost_model
from cost_model import Hardware, ModelArch, Workload
from cost_model.hardware.speeds import with_speeds
from cost_model.planner.constraints import Fixed
from cost_model.timing.evaluate import evaluate
from flexmoe.cli import run as command
from flexmoe.cli.running.report import comparison_lines
from flexmoe.engine.router_counter import coactivation_bytes
from flexmoe.planning import drift, kept_plans
from flexmoe.planning.forecast import Forecaster
from flexmoe.probing import cache
from policies.common.errors import InfeasibleError
from policies.policy import Policy, PolicyFile
from tests.support.tiny import assert_greedy

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes", "planned_soon")
ROWS = (0, 1, 2, 3, 5, 6, 8)
BUDGETS = ["--gpu-mem", "0.004", "--cpu-mem", "0.004", "--nvme-mem", "0.1"]


@pytest.fixture
def run(tiny, tmp_path, machine, capsys):
    """Runs a small job with more flags; returns (exit code, stdout, stderr)."""
    variant = tiny()
    lines = [
        {"custom_id": f"r{row}", "prompt": variant.prompts[row], "return_token_ids": True, "max_tokens": 4 + row % 3}
        for row in ROWS
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fixed = ["--model", str(variant.directory), "--device", "cpu", "--offload-dir", str(tmp_path / "offload")]
    fixed += ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--hardware", str(machine)]

    def call(*more):
        code = command.main([*fixed, *more])
        return (code, *capsys.readouterr())

    return call


def test_planned_job_gives_the_tokens_of_transformers_within_its_budgets(run, tiny, tmp_path):
    metrics = tmp_path / "metrics.json"
    code, out, err = run("--policy", "auto", *BUDGETS, "--metrics-json", str(metrics))
    assert code == 0, err
    for line, row in zip((tmp_path / "out.jsonl").read_text().splitlines(), ROWS, strict=True):
        ids = json.loads(line)["response"]["body"]["choices"][0]["token_ids"]
        assert_greedy(tiny(), row, ids, tiny().expected(row, 4 + row % 3, eos=True))
    record = json.loads(metrics.read_text())
    assert Policy(**record["policy"]).block_size >= 1
    for tier, gib in (("gpu", 0.004), ("cpu", 0.004), ("disk", 0.1)):
        memory = record["memory"][tier]
        assert memory["planned_bytes"] - memory.get("process", 0) <= gib * 2**30
    predicted = record["predicted"]
    assert predicted["wall_s"] > 0 and predicted["sweeps"] > 0 and record["lanes"].keys() <= predicted["lanes"].keys()
    assert all(predicted["peak_bytes"][tier] == record["memory"][tier]["planned_bytes"] for tier in ("gpu", "disk"))
    job = Workload(**record["workload"])
    assert (job.num_requests, job.longest_row) == (len(ROWS), max(len(tiny().prompts[r]) + 4 + r % 3 for r in ROWS))
    assert re.search(r"^policy: --gpu-batch-size \d+", out, re.M)
    assert re.search(r"^predicted: [\d.]+ generated tokens/s, [\d.]+ s$", out, re.M)
    assert re.search(r"^time: [\d.]+ s for .*; predicted: [\d.]+ s \([+-]\d+ %\)$", out, re.M)


def test_prediction_is_made_for_a_given_policy_too(run):
    code, out, err = run("--percent", "20", "30", "30", "30", "50", "0", "--gpu-batch-size", "3", "-v")
    assert code == 0, err
    assert "predicted/measured busy seconds: " in out and "--percent 20 30 30 30 50 0" in out


def test_dry_run_plans_and_predicts_and_loads_nothing(run, tmp_path):
    code, out, err = run("--policy", "auto", *BUDGETS, "--dry-run")
    assert code == 0, err
    assert "predicted: " in out and "memory  gpu" in out
    assert not (tmp_path / "out.jsonl").exists()


def test_budget_that_nothing_fits_exits_4_and_names_it(run):
    code, _, err = run("--policy", "auto", "--gpu-mem", "0.0001")
    assert code == 4
    assert "gpu" in err and "Traceback" not in err


def test_percents_beside_a_plan_are_refused(run):
    code, _, err = run("--policy", "auto", "--percent", "1", "2", "3", "4", "5", "6")
    assert code == 2 and "--percent" in err


def test_without_a_policy_the_planner_decides_and_keeps_to_what_is_fixed(run, tmp_path):
    saved = tmp_path / "policy.json"
    code, out, err = run(*BUDGETS, "--gpu-batch-size", "3", "--schedule", "static", "--save-policy", str(saved))
    assert code == 0, err
    file = PolicyFile.load(saved)
    assert (file.policy.gpu_batch_size, file.policy.schedule) == (3, "static")
    assert file.planned_workload().num_requests == len(ROWS) and file.predicted["job_s"] > 0
    code, again, err = run("--policy", str(saved), "--overwrite")
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("policy:")] == again.splitlines()[:1]


@pytest.fixture
def planned(monkeypatch):
    """The jobs that were planned for; the plan puts all weights into host memory, one row at a time."""
    jobs = []
    policy = Policy.from_percent(
        (0, 100, 100, 0, 100, 0), gpu_batch_size=1, num_gpu_batches=1, prompt_len=20, gen_len=4
    )

    def solve(arch, hardware, workload, *, fixed, **_):
        jobs.append(workload)
        return SimpleNamespace(policy=fixed.applied(policy))

    monkeypatch.setattr(cost_model, "solve", solve)
    return jobs


@pytest.fixture
def forecaster(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path / "cache"))
    return Forecaster(
        arch=ModelArch.from_dir(tiny().directory),
        hardware=Hardware.preset("cpu").with_budgets(gpu_mem=0.004, cpu_mem=0.004, nvme_mem=0.1),
        workload=Workload(prompt_len=20, gen_len=4, num_requests=6),
        dtype_bytes=2,
    )


def changed(forecaster, **hardware):
    return replace(forecaster, hardware=replace(forecaster.hardware, **hardware))


def test_the_same_job_on_the_same_machine_is_planned_once(forecaster, planned):
    first = forecaster.plan()
    disk = forecaster.hardware.disk_bytes
    for same in (forecaster, changed(forecaster, disk_bytes=disk // 2), changed(forecaster, disk_bytes=disk + 1)):
        assert same.plan() == first
    assert len(planned) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda f: replace(f, workload=replace(f.workload, prompt_len=21)),
        lambda f: replace(f, dtype_bytes=4),
        lambda f: replace(f, on_demand=False),
        lambda f: replace(f, arch=replace(f.arch, ffn=f.arch.ffn + 8)),
        lambda f: changed(f, disk_read_bytes_per_s=1e9),
        lambda f: changed(f, disk_bytes=2 * f.hardware.disk_bytes),
        lambda f: replace(f, hardware=f.hardware.with_budgets(gpu_mem=0.0001)),
        lambda f: replace(f, hardware=f.hardware.with_budgets(gpu_mem=0.006)),
    ],
)
def test_another_job_model_or_machine_is_planned_anew(forecaster, planned, other):
    forecaster.plan()
    other(forecaster).plan()
    assert len(planned) == 2


def test_what_is_fixed_is_part_of_the_plan(forecaster, planned):
    assert forecaster.plan(fixed=Fixed(gpu_batch_size=2)).gpu_batch_size == 2
    assert forecaster.plan(fixed=Fixed(gpu_batch_size=3)).gpu_batch_size == 3
    assert len(planned) == 2


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "flexmoe.policy"', "[1]"])
def test_a_kept_plan_that_is_damaged_is_made_again(forecaster, planned, tmp_path, content):
    first = forecaster.plan()
    [kept] = (tmp_path / "cache" / "plans").glob("*.json")
    kept.write_text(content)
    assert forecaster.plan() == first and len(planned) == 2
    assert forecaster.plan() == first and len(planned) == 2


def test_a_cache_that_cannot_be_written_costs_only_the_planning(forecaster, planned, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path / "file" / "below"))
    assert forecaster.plan() == forecaster.plan() and len(planned) == 2


def test_the_oldest_plans_go(forecaster, planned, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_plans, "MOST_PLANS", 2)
    for rows in (6, 7, 8):
        replace(forecaster, workload=replace(forecaster.workload, num_requests=rows)).plan()
    assert len(planned) == 3 and len(list((tmp_path / "cache" / "plans").glob("*.json"))) == 2


def test_benchmark_without_a_number_of_prompts_cannot_be_planned_for(tiny, machine, capsys):
    code = command.main(["--model", str(tiny().directory), "--policy", "auto", "--hardware", str(machine)])
    assert code == 2 and "--num-prompts" in capsys.readouterr().err


def test_benchmark_is_planned_for_its_prompts(tiny, tmp_path, machine, capsys):
    args = ["--model", str(tiny().directory), "--policy", "auto", "--hardware", str(machine), "--device", "cpu"]
    args += ["--num-prompts", "6", "--prompt-len", "20", "--gen-len", "5", "--offload-dir", str(tmp_path / "offload")]
    code = command.main(args)
    out = capsys.readouterr().out
    assert code == 0 and "; predicted: " in out and "total throughput" in out


def test_plan_leaves_a_tenth_of_what_is_free_to_others(tmp_path):
    path = tmp_path / "machine.json"
    machine = Hardware.preset("cpu")
    machine.save(path)
    arch = ModelArch.from_name("mixtral-8x7b")
    forecaster = Forecaster.of_machine(
        arch,
        Workload(prompt_len=64, gen_len=16, num_requests=100),
        torch.bfloat16,
        hardware=path,
        device="cpu",
        directory=tmp_path,
        budgets={"gpu_mem": None, "cpu_mem": None, "nvme_mem": None},
    )
    assert forecaster.hardware.host_memory_bytes == int(0.9 * machine.host_memory_bytes)
    assert forecaster.hardware.disk_bytes == int(0.9 * machine.disk_bytes)


def test_plan_leaves_room_for_the_router_statistics(run, tiny, monkeypatch, tmp_path):
    made, of_machine = [], Forecaster.of_machine

    def stop(*args, **options):
        made.append(of_machine(*args, **options))
        raise InfeasibleError("far enough")

    monkeypatch.setattr("flexmoe.batch.plan.Forecaster.of_machine", stop)
    for flags in ([], ["--router-stats", str(tmp_path / "stats.json")]):
        assert run("--policy", "auto", *BUDGETS, *flags)[0] == 4
    without, with_them = (forecaster.hardware.gpu.memory_bytes for forecaster in made)
    assert without - with_them == coactivation_bytes(ModelArch.from_dir(tiny().directory)) > 0


def test_comparison_names_every_lane_of_either_side():
    class Predicted:
        job_s, lanes_s = 8.0, {"gpu": 7.0, "cpu": 0.5}

    metrics = {"wall_s": 10.0, "lanes": {"gpu": {"busy_s": 9.0}, "disk_read": {"busy_s": 2.0}}}
    [line] = comparison_lines(Predicted(), metrics)
    assert line.endswith("cpu 0.50/0.00, disk_read 0.00/2.00, gpu 7.00/9.00")


def test_policy_file_with_the_planners_sections_runs_as_any_other(run, tiny, tmp_path):
    arch = ModelArch.from_dir(tiny().directory)
    workload = Workload(prompt_len=20, gen_len=6, num_requests=7)
    policy = Policy.from_percent((20, 30, 30, 30, 50, 0), gpu_batch_size=3, num_gpu_batches=2, prompt_len=20, gen_len=6)
    prediction = evaluate(arch, Hardware.preset("cpu"), workload, policy)
    file = PolicyFile(
        policy,
        model=arch.fingerprint(),
        workload=workload.to_json(),
        predicted=prediction.to_json(),
        hardware=Hardware.preset("cpu").fingerprint(),
    )
    file.save(tmp_path / "p.json")
    code, out, err = run("--policy", str(tmp_path / "p.json"))
    assert code == 0, err
    assert "; predicted: " in out


# A machine that is not as it was measured.


@pytest.fixture
def small_jobs_are_judged(monkeypatch):
    """Few sweeps of little work are enough to be judged by."""
    low = drift.Thresholds(sweeps=1, times=1, seconds=0.0, tokens=0.5, busy=0.0)
    monkeypatch.setattr(drift, "Thresholds", lambda: low)


def test_run_that_finds_the_machine_faster_says_so_and_has_it_measured_again(
    run, machine, tmp_path, monkeypatch, small_jobs_are_judged, caplog
):
    slow = with_speeds(Hardware.load(machine), compute=1e-7)
    asked = []
    monkeypatch.setattr(cache, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(cache, "_measured_apart", lambda *args: asked.append(args) or slow)
    flags = ["--hardware", "auto", "--percent", "100", "0", "100", "0", "100", "0", "--gpu-batch-size", "8"]
    metrics = tmp_path / "metrics.json"
    code, out, err = run(*flags, "--metrics-json", str(metrics))
    assert code == 0, err
    assert re.search(r"computation is \d+ % above the measurement; about \d+:\d\d left", caplog.text)
    assert re.search(r"^drift: computation is \d+ % above the measurement; predicted with that: [\d.]+ s \(", out, re.M)
    record = json.loads(metrics.read_text())
    (lane,) = record["drift"]["lanes"]
    assert lane["lane"] == "gpu" and lane["speed"] > 1.2
    assert record["drift"]["predicted_wall_s"] < 0.9 * record["predicted"]["wall_s"]
    assert len(asked) == 1 and len(list((tmp_path / "cache").glob("*.stale"))) == 1
    run(*flags, "--overwrite")
    assert len(asked) == 2, "measured again at the next start"
    assert not list((tmp_path / "cache").glob("*.stale")), "for the same reason not twice a day"


def test_rates_of_a_file_are_not_measured_again(run, machine, tmp_path, monkeypatch, small_jobs_are_judged):
    monkeypatch.setattr(cache, "cache_directory", lambda: tmp_path / "cache")
    with_speeds(Hardware.load(machine), compute=1e-7).save(tmp_path / "slow.json")
    flags = ["--hardware", str(tmp_path / "slow.json"), "--percent", "100", "0", "100", "0", "100", "0"]
    code, out, err = run(*flags, "--gpu-batch-size", "8")
    assert code == 0 and "above the measurement" in out, err
    assert not list((tmp_path / "cache").glob("*.stale"))
