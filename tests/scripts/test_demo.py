"""The demo: its budgets make the planner use all three tiers, and it tells what was planned, predicted and measured."""

import json
from types import SimpleNamespace

import pytest
from transformers import MixtralConfig

from cost_model import Hardware, ModelArch, Workload, solve
from flexmoe.cli.arguments import parser
from flexmoe.system.device import Device
from scripts.demo import Setting, command, introduction, write_requests
from scripts.make_checkpoint import SIZES
from scripts.support.demo_report import compared, planned, put_beside, under_compute_percent
from tests.support.pretend_cuda import PretendCuda

CONTEXT_BYTES = 600 << 20
BUDGETS = {"gpu_mem": 0.12, "cpu_mem": 0.15, "nvme_mem": 0.25}


class Gpu(PretendCuda):
    def room(self, budget_bytes):
        return budget_bytes - CONTEXT_BYTES


def shape(size):
    config = MixtralConfig(**SIZES[size]).to_dict()
    return ModelArch.from_config(config | {"dtype": "bfloat16"}, name=size)


@pytest.mark.parametrize("device, machine", [(Device("cpu"), "cpu"), (Gpu(), "t4")], ids=["cpu", "gpu"])
def test_budgets_make_the_planner_spread_over_three_tiers(device, machine):
    setting, hardware = Setting.of(device), Hardware.preset(machine)
    budgets = dict(setting.budgets)
    if device.is_cuda:
        budgets["gpu_mem"] -= (CONTEXT_BYTES - hardware.gpu.reserved_bytes) / 2**30
    arch = shape(setting.size)
    assert arch.total_bytes > (setting.gpu_mem + setting.cpu_mem) * 2**30 - (CONTEXT_BYTES if device.is_cuda else 0)
    plan = solve(arch, hardware.with_budgets(**budgets), Workload(prompt_len=97, gen_len=18, num_requests=96))
    homes = {tier: items.keys() & {"weights", "kv"} for tier, items in plan.prediction.memory.parts.items()}
    assert homes["gpu"] and homes["cpu"] and "weights" in homes["disk"], plan.policy


def test_command_is_one_that_the_runtime_understands(tmp_path):
    setting = Setting.of(Device("cpu"))
    args = parser().parse_args(command(setting, tmp_path / "checkpoint", tmp_path))
    assert (str(args.policy), args.device) == ("auto", "cpu")
    assert {name: getattr(args, name) for name in BUDGETS} == setting.budgets
    assert {args.input_file.parent, args.output_file.parent, args.trace.parent, args.offload_dir.parent} == {tmp_path}


def test_introduction_says_whether_the_machine_is_measured_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2**20)
    about = (Setting.of(Device("cpu")), tmp_path, Device("cpu"), tmp_path)
    text = introduction(*about)
    assert "0.12 GiB of memory in a GPU's role" in text and "measured first: about a minute, once" in text
    kept = text.split("(kept in ")[1].split(")")[0]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / kept.rsplit("/", 1)[1]).write_text("{}")
    assert "are known from an earlier run" in introduction(*about)


def test_requests_are_ragged_and_of_every_kind(tmp_path):
    write_requests(tmp_path / "requests.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == 96
    assert {type(row.get("prompt")) for row in rows} == {str, list, type(None)}


METRICS = {
    "device": "cpu",
    "wall_s": 8.0,
    "most_rows_in_flight": 60,
    "memory": {
        "gpu": {"planned_bytes": 50 << 20, "weights": 30 << 20, "slots": 20 << 20},
        "cpu": {"planned_bytes": 40 << 20, "weights": 25 << 20, "kv": 15 << 20},
        "disk": {"planned_bytes": 70 << 20, "weights": 70 << 20},
    },
    "lanes": {"gpu": {"busy_s": 6.0}, "disk_read": {"busy_s": 2.0}, "d2h": {"busy_s": 0.001}},
}


def test_plan_is_told_tier_by_tier_with_the_reason_for_the_third():
    lines = planned(METRICS, BUDGETS)
    assert lines[3].split() == ["cpu", "25.0", "15.0", "0.0", "40.0", "153.6"]
    assert lines[2].split() == ["gpu", "30.0", "0.0", "20.0", "50.0", "122.9"]
    text = " ".join(lines)
    assert "125 MiB of weights, 15 MiB of KV cache" in text
    assert "every sweep reads 70 MiB" in text and "60 rows" in text


def test_prediction_is_told_beside_the_measurement():
    predicted = SimpleNamespace(job_s=10.0, lanes_s={"gpu": 9.0, "d2h": 0.002, "disk_read": 2.5})
    whole, *lanes = [line.split() for line in compared(METRICS, predicted)[1:-1]]
    assert whole[2:4] == ["10.00", "8.00"] and "+25.0" in whole
    assert lanes == [["gpu", "9.00", "6.00"], ["disk_read", "2.50", "2.00"]]


def trace(*spans):
    lanes = sorted({lane for lane, _, _ in spans})
    events = [
        {"ph": "M", "pid": 1, "tid": i, "name": "thread_name", "args": {"name": lane}} for i, lane in enumerate(lanes)
    ]
    events += [
        {"ph": "X", "pid": 1, "tid": lanes.index(lane), "name": "x", "ts": a, "dur": b - a} for lane, a, b in spans
    ]
    return {"traceEvents": events}


def test_predicted_tracks_begin_to_compute_where_the_measured_ones_do(tmp_path):
    above, below = tmp_path / "measured.json", tmp_path / "predicted.json"
    above.write_text(json.dumps(trace(("disk_read/0", 100, 130), ("gpu", 120, 140))))
    below.write_text(json.dumps(trace(("disk_read", 0, 10), ("gpu", 10, 25))))
    put_beside(above, below)
    events = json.loads(above.read_text())["traceEvents"]
    starts = {(e["pid"], e["ts"]) for e in events if e["ph"] == "X"}
    assert starts == {(1, 100), (1, 120), (2, 110), (2, 120)}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["measured", "predicted"]


def test_share_of_the_reads_under_computation():
    assert under_compute_percent(trace(("gpu", 0, 10), ("disk_read/0", 5, 15), ("disk_read/1", 2, 4))) == pytest.approx(
        700 / 12
    )
    assert under_compute_percent(trace(("gpu", 0, 10))) == 0
