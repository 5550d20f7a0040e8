"""The arithmetic of the GPU benchmark: ANCHORS' limit, and policies that fit their budgets."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from cost_model import Hardware
from cost_model.memory.allocation import PAGE_TOKENS, kv_pages_per_tier, kv_tokens_wanted
from cost_model.model.arch import ModelArch
from cost_model.timing.evaluate import evaluate
from flexmoe.engine.scheduler import Row, Scheduler
from flexmoe.errors import InfeasibleError
from flexmoe.kv.cache import KVCache, KVExhausted, KVShape
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.system import device as device_module
from flexmoe.system.device import Device
from policies.admission.row_state import AttentionMode
from policies.policy import Policy, Workload
from scripts.bench_gpu import main
from scripts.gpu import steady as gpu_steady
from scripts.gpu.context import TINY, reduced_model
from scripts.gpu.limit import Rates, Traffic, machine_limit, sweep_terms
from scripts.gpu.plan import Budget, own_limit, plan
from scripts.support.wheels import use_wheels
from tests.support.paths import ROOT

ARCH = ModelArch.from_name("mixtral-8x7b")
LONG, SHORT = Workload(prompt_len=512, gen_len=256), Workload(prompt_len=77, gen_len=128)
# GPU GB, host GB, PCIe GB/s, DRAM GB/s, TFLOP/s, and the table's overlapped end-to-end limit in tokens/s.
ANCHORS = {
    "T4": (16, 192, 12, 80, 21, 178),
    "A5000": (24, 512, 25, 140, 75, 981),
    "4090": (24, 128, 25, 65, 130, 196),
    "capped to 16 GB": (16, 128, 50, 150, 500, 295),
    "capped to 24 GB": (24, 128, 50, 150, 500, 393),
}
RATES = Rates(pcie=50e9, host_dram=150e9, gpu_flops=((1, 1e12), (512, 500e12)), cpu_attention=100e9, nvme=5e9)
H200 = Hardware.preset("h200")


@pytest.mark.parametrize("machine", ANCHORS)
def test_limit_reproduces_the_table_of_anchors(machine):
    gpu, host, pcie, dram, tflops, expected = ANCHORS[machine]
    rates = Rates(pcie=pcie * 1e9, host_dram=dram * 1e9, gpu_flops=((1.0, tflops * 1e12),))
    limit = machine_limit(ARCH, LONG, rates, gpu_bytes=gpu * 1e9, host_bytes=0.95 * host * 1e9)
    assert limit.tokens_per_s == pytest.approx(expected, rel=0.02)


def test_limit_with_a_share_on_nvme_is_the_lever_of_anchors():
    rates = Rates(pcie=50e9, host_dram=150e9, gpu_flops=((1.0, 500e12),), nvme=7e9)
    none, best = (
        machine_limit(ARCH, LONG, rates, gpu_bytes=24e9, host_bytes=0.95 * 128e9, disk_bytes=d) for d in (0, 40e9)
    )
    assert best.tokens_per_s > 1.15 * none.tokens_per_s
    assert 0 < best.traffic.w_on_disk <= 40e9


def test_every_term_of_a_sweep_is_its_bytes_over_its_rate():
    traffic = Traffic(
        w_streamed=100e9, w_on_disk=10e9, kv_over_pcie=50e9, kv_read=200e9, kv_attended_on_cpu=40e9, tokens=4.0
    )
    terms = sweep_terms(ARCH, traffic, RATES)
    assert terms["pcie"] == pytest.approx(3.0) and terms["host_dram"] == pytest.approx(2.0)
    assert terms["cpu_attention"] == pytest.approx(0.4) and terms["nvme"] == pytest.approx(2.0)
    assert terms["gpu_flops"] == pytest.approx(ARCH.flops_per_token * 4 / 1e12)


def test_gemm_rate_is_interpolated_and_does_not_leave_the_curve():
    rates = Rates(pcie=1, host_dram=1, gpu_flops=((1, 10.0), (3, 30.0), (5, 40.0)))
    assert [rates.gpu_flops_at(t) for t in (0.5, 1, 2, 3, 4, 5, 9)] == [10, 10, 20, 30, 35, 40, 40]


def rates_like(hardware):
    """The rates of the limit, as the planner has them."""
    experts = hardware.gpu.experts[2]
    return Rates(
        pcie=hardware.gpu.h2d_bytes_per_s,
        host_dram=hardware.host_bytes_per_s,
        gpu_flops=tuple(zip(experts.tokens, experts.flops_per_s[0])),
        cpu_attention=hardware.cpu_attention_bytes_per_s,
        nvme=hardware.disk_read_bytes_per_s,
    )


@pytest.mark.usefixtures("planned_soon")
@pytest.mark.parametrize("workload, gpu, disk", [(LONG, 15, 0), (SHORT, 23, 40)], ids=str)
def test_planned_policy_fits_its_budgets_and_stays_below_the_limit_of_its_bytes(workload, gpu, disk):
    budget = Budget(gpu_bytes=int(gpu * 1e9), host_bytes=int(100e9), disk_bytes=int(disk * 1e9))
    chosen = plan(ARCH, workload, H200, budget, rates_like(H200))
    memory = chosen.prediction.memory
    assert memory.total("gpu") <= budget.gpu_bytes
    assert memory.total("cpu") <= budget.host_bytes and memory.total("disk") <= budget.disk_bytes
    assert chosen.policy.schedule == "rolling" and 0 < chosen.rows <= chosen.policy.block_size
    assert chosen.limit.tokens_per_s >= 0.99 * chosen.prediction.tokens_per_s
    rates = rates_like(H200)
    best = machine_limit(ARCH, workload, rates, gpu_bytes=(gpu + 1) * 1e9, host_bytes=100e9, disk_bytes=disk * 1e9)
    assert chosen.prediction.tokens_per_s > 0.5 * best.tokens_per_s


def test_budget_without_room_for_a_row_is_refused():
    tiny = Budget(gpu_bytes=int(15e9), host_bytes=int(10e9), disk_bytes=0)
    with pytest.raises(InfeasibleError, match="no policy .* fits this machine"):
        plan(ARCH, LONG, H200, tiny, rates_like(H200))


def test_limit_of_a_policy_counts_its_bytes_where_they_go():
    policy = Policy.from_percent(
        (10, 60, 20, 50, 100, 0),
        gpu_batch_size=50,
        num_gpu_batches=2,
        prompt_len=512,
        gen_len=256,
        cpu_attention_percent=40,
    )
    prediction = evaluate(ARCH, H200, LONG, policy, ignore_memory=True)
    traffic = own_limit(ARCH, LONG, rates_like(H200), policy, prediction).traffic
    on_tier = prediction.allocation.placement.bytes_per_tier
    kv = prediction.rows_in_flight * 640 * 131072
    assert traffic.w_on_disk == on_tier["disk"]
    assert on_tier["cpu"] + on_tier["disk"] - traffic.w_streamed in (0, ARCH.embed_params * 2)
    assert traffic.kv_on_disk == pytest.approx(0.3 * kv, rel=0.01)
    assert traffic.kv_attended_on_cpu == pytest.approx(0.2 * kv, rel=0.01)
    assert traffic.kv_over_pcie == pytest.approx(0.6 * kv, rel=0.01)
    assert traffic.kv_read == pytest.approx(0.8 * kv, rel=0.01)


@pytest.mark.usefixtures("one_thread")
def test_steady_state_is_entered_with_kv_on_disk_too(tmp_path):
    policy = Policy.from_percent(
        (0, 60, 30, 30, 100, 0), gpu_batch_size=8, num_gpu_batches=2, prompt_len=24, gen_len=8, weight_slots=4
    )
    budgets = {"gpu_mem": None, "cpu_mem": None, "nvme_mem": None}
    measured = gpu_steady.steady(
        reduced_model(tmp_path / "tiny", TINY),
        asdict(policy),
        [24, 8],
        budgets,
        "cpu",
        str(tmp_path / "offload"),
        rows=16,
        warm=1,
        timed=8,
        deadline_s=60.0,
    )
    assert measured["generated"] == pytest.approx(16 * 8, rel=0.1) and measured["restarts"] == 0
    assert measured["planned"]["disk"]["kv"] > 0
    read = measured["lanes"]["disk_read"]
    assert (
        0 < read["busy_s"] <= read["worker_s"]
        and read["bytes"] > measured["sweeps"] * measured["planned"]["disk"]["weights"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, expected",
    [("16", "error of the prediction"), ("24", "error of the prediction"), ("validate", "mean absolute error")],
)
def test_rehearsal_prints_predicted_beside_measured(tmp_path, capsys, stage, expected):
    assert main(["--stage", stage, "--rehearse", "--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert expected in out and "predicted: " in out
    (section,) = json.loads((tmp_path / "gpu-rehearsal" / f"gpu-{stage}.json").read_text())["sections"].values()
    assert any(expected in figure["what"] for figure in section["figures"])
    assert Hardware.load(tmp_path / "gpu-rehearsal" / "gpu-machine.json").device == "cpu"
    assert not list(tmp_path.glob("*.bin"))


def rehearsed(stage, tmp_path):
    """What the stage wrote in a rehearsal."""
    assert main(["--stage", stage, "--rehearse", "--workdir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu-rehearsal" / f"gpu-{stage}.json").read_text())
    (section,) = record["sections"].values()
    return section


@pytest.mark.slow
def test_rehearsal_of_the_probes_has_a_rate_beside_every_limit(tmp_path):
    figures = rehearsed("probe", tmp_path)["figures"]
    assert {"expert in int4, 512 tokens", "unpack mxfp4 to bf16, read and written"} <= {
        figure["what"] for figure in figures
    }
    assert len(figures) > 15 and all(figure["beside"] for figure in figures)


@pytest.mark.slow
def test_rehearsal_of_the_peer_compares_logits_and_prints_limit_and_prediction(tmp_path):
    pytest.importorskip("accelerate")
    figures = rehearsed("peer", tmp_path)["figures"]
    beside = " ".join(figure["beside"] for figure in figures)
    assert all(
        text in beside for text in ("transformers + accelerate", "predicted: ", "limit of the policy's own bytes")
    )


@pytest.mark.slow
def test_rehearsal_of_the_races_runs_the_tests_of_exactness_disturbed(tmp_path):
    section = rehearsed("races", tmp_path)
    (only,) = section["raw"]["rounds"]
    assert only["passed"] == only["tests"] - only["skipped"] > 0 and only["exit_code"] == 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="without CUDA the tests marked gpu are skipped")
def test_rehearsal_of_parity_counts_the_tests_marked_gpu(tmp_path):
    section = rehearsed("parity", tmp_path)
    assert section["raw"]["tests"] == section["raw"]["skipped"] > 50


def test_the_benchmark_starts_without_what_it_can_do_without(tmp_path):
    absent = ("pulp", "openai", "jsonschema", "pynvml", "accelerate", "matplotlib", "pyarrow", "datasets", "gguf")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from scripts.bench_gpu import main; main()"
    run = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--stage {parity,races,probe,16,24,validate,peer}" in run.stdout


def test_wheels_that_travel_are_imported_by_this_process_and_those_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/before")
    with zipfile.ZipFile(tmp_path / "carried_thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_thing/__init__.py", "VALUE = 7\n")
        program = zipfile.ZipInfo("carried_thing/solver")
        program.external_attr = 0o755 << 16
        wheel.writestr(program, "#!/bin/sh\n")
    assert use_wheels(tmp_path) == ["carried_thing-1-py3-none-any.whl"]
    assert os.access(tmp_path / "site" / "carried_thing" / "solver", os.X_OK)
    code = "import carried_thing; print(carried_thing.VALUE)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "7\n"
    assert use_wheels(tmp_path / "none") == []


def _aged_scheduler(rows, prompt, gen):
    chosen = Policy.from_percent(
        (10, 90, 0, 100, 100, 0),
        gpu_batch_size=rows // 2,
        num_gpu_batches=2,
        prompt_len=prompt,
        gen_len=gen,
        cpu_attention_percent=100,
    )
    workload = Workload(prompt_len=prompt, gen_len=gen)
    blocks = kv_pages_per_tier(
        chosen, kv_tokens_wanted(chosen, workload) / PAGE_TOKENS, -(-(prompt + gen) // PAGE_TOKENS)
    )
    shape = KVShape(layers=1, kv_heads=1, head_dim=2, dtype=torch.bfloat16)
    return Scheduler(chosen, KVCache(Device("cpu"), shape, blocks))


def _row(prompt, gen, age=0):
    request = EngineRequest(request_id="r", prompt_token_ids=(1,) * prompt, params=SamplingParams(max_tokens=gen))
    return Row(request, [1] * (prompt + age), prompt + gen)


@pytest.mark.parametrize("rows, prompt, gen", [(300, 512, 256), (200, 77, 128)])
def test_block_of_all_ages_is_in_the_steady_state_from_its_first_sweep(rows, prompt, gen):
    scheduler = _aged_scheduler(rows, prompt, gen)
    for place in reversed(range(rows)):
        age = place * gen // rows
        scheduler.enter_aged(_row(prompt, gen, age)) if age else scheduler.waiting.append(_row(prompt, gen))
    generated = prefilled = sweeps = 0
    for sweeps in range(1, 31):
        scheduler.waiting.extend(_row(prompt, gen) for _ in range(8))
        runs = scheduler.plan_sweep()
        for run in runs:
            prefilled += scheduler.commit(run.owner, 1 if run.logits else None)
            generated += run.logits
        for run in runs:
            if len(run.owner.tokens) >= run.owner.limit:
                scheduler.finish(run.owner)
        scheduler.end_sweep()
    assert scheduler.restarts == 0
    assert generated == pytest.approx(rows * sweeps, rel=0.03)
    assert prefilled == pytest.approx(rows * sweeps * prompt / gen, rel=0.06)


def test_aged_row_decodes_its_last_token_next_and_gives_everything_back():
    scheduler = _aged_scheduler(4, 20, 10)
    row = _row(20, 10, age=7)
    scheduler.enter_aged(row)
    assert (row.kv.length, row.prompt_done, row.generated) == (26, 20, 7)
    (run,) = scheduler.plan_sweep()
    assert (len(run.tokens), run.logits, run.mode) == (1, 1, AttentionMode.CPU)
    scheduler.commit(row, 1)
    scheduler.finish(row)
    assert scheduler._cache.free("cpu") == scheduler._cache.total("cpu")


def test_aged_row_without_room_is_refused():
    scheduler = _aged_scheduler(2, 64, 2)
    for _ in range(2):
        scheduler.enter_aged(_row(64, 2, age=1))
    with pytest.raises(KVExhausted):
        scheduler.enter_aged(_row(64, 2, age=1))


def test_memory_is_unregistered_before_it_is_unmapped(monkeypatch):
    freed = []
    cudart = SimpleNamespace(cudaHostUnregister=lambda address: freed.append(address))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    buffer = Device("cpu").host_buffer(5000)
    view, address = buffer[10:20], buffer.data_ptr()
    del buffer
    assert not freed
    del view
    assert freed == []  # what was never registered is not unregistered
    pages = device_module._map_pages(4096, False)
    pages.registered_at = address
    del pages
    assert freed == [address]
