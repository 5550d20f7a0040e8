"""The demo: its budgets make the planner use all three tiers, and it tells what was planned, predicted and measured."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from transformers import MixtralConfig

from cost_model import Hardware, ModelArch, Workload, solve
from cost_model.simulation.simulate import simulate
from flexmoe.cli.running.arguments import parser
from flexmoe.errors import InputMissingError
from flexmoe.probing.cache import mark_stale
from flexmoe.system.device import Device
from policies.policy import Policy
from scripts.demo import Setting, command, forecast, introduction
from scripts.demonstration import models
from scripts.demonstration.models import LARGE, REAL, SMALL, choose
from scripts.demonstration.report import answers, compared, planned, put_beside, under_compute_percent
from scripts.make_checkpoint import SIZES, make_checkpoint
from tests.support.pretend_cuda import PretendCuda

CONTEXT_BYTES = 600 << 20
BUDGETS = {"gpu_mem": 0.12, "cpu_mem": 0.15, "nvme_mem": 0.25}
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_local_experts": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


class Gpu(PretendCuda):
    def room(self, budget_bytes):
        return budget_bytes - CONTEXT_BYTES


def setting(model, device, tmp_path):
    return Setting.of(model, tmp_path / model.name, tmp_path, device)


CASES = {
    "real-soon": (REAL, SMOLLM2, Device("cpu"), "cpu", 0.1),
    "real": (REAL, SMOLLM2, Device("cpu"), "cpu", 1),
    "real-gpu": (REAL, SMOLLM2, Gpu(), "t4", 1),
    "synthetic": (SMALL, SIZES["demo"], Device("cpu"), "cpu", 1),
    "synthetic-gpu": (LARGE, SIZES["bench"], Gpu(), "t4", 1),
}


@pytest.mark.parametrize(
    "model, shape, device, machine, effort",
    [pytest.param(*case, id=name, marks=() if case[-1] < 1 else pytest.mark.slow) for name, case in CASES.items()],
)
@pytest.mark.slow
def test_budgets_make_the_planner_spread_over_three_tiers(tmp_path, model, shape, device, machine, effort):
    budgets, hardware = setting(model, device, tmp_path).budgets, Hardware.preset(machine)
    if device.is_cuda:
        budgets["gpu_mem"] -= (CONTEXT_BYTES - hardware.gpu.reserved_bytes) / 2**30
    arch = ModelArch.from_config(MixtralConfig(**shape).to_dict() | {"dtype": "bfloat16"}, name=model.name)
    assert arch.total_bytes > (model.gpu_mem + model.cpu_mem) * 2**30
    job = (
        Workload(prompt_len=50, gen_len=56, num_requests=20)
        if model is REAL
        else Workload(prompt_len=97, gen_len=18, num_requests=96)
    )
    plan = solve(arch, hardware.with_budgets(**budgets), job, effort=effort)
    homes = {tier: items.keys() & {"weights", "kv"} for tier, items in plan.prediction.memory.parts.items()}
    assert homes["gpu"] and homes["cpu"] and "weights" in homes["disk"], plan.policy


def test_command_is_one_that_the_runtime_understands(tmp_path):
    args = parser().parse_args(command(setting(SMALL, Device("cpu"), tmp_path)))
    assert (str(args.policy), args.device) == ("auto", "cpu")
    assert {name: getattr(args, name) for name in BUDGETS} == BUDGETS
    assert {args.input_file.parent, args.output_file.parent, args.trace.parent, args.offload_dir.parent} == {tmp_path}


def test_introduction_says_what_the_text_is_and_whether_the_machine_is_measured_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path / "cache"))
    about = setting(REAL, Device("cpu"), tmp_path)
    about.checkpoint.mkdir()
    (about.checkpoint / "model.safetensors").write_bytes(b"x" * 2**20)
    text = " ".join(introduction(about).split())
    assert "each of the 8 experts of a layer is a copy of its dense MLP" in text and "often wrong" in text
    assert "0.5 GiB of memory in a GPU's role" in text and "measured first: one to seven minutes, once" in text
    kept = text.split("(kept in ")[1].split(")")[0]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / kept.rsplit("/", 1)[1]).write_text("{}")
    assert "are known from an earlier run" in " ".join(introduction(about).split())


def made(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


def absent(path):
    raise InputMissingError("pip cannot download it")


@pytest.fixture
def makes(monkeypatch):
    """`makes(real=..., synthetic=...)`: what stands for the making of checkpoints."""

    def set_to(real, synthetic=made):
        monkeypatch.setattr(models, "REAL", replace(REAL, make=real))
        monkeypatch.setattr(models, "SMALL", replace(SMALL, make=synthetic))

    return set_to


def test_prediction_is_by_the_rates_that_the_run_had_though_it_found_them_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path / "cache"))
    here = setting(SMALL, Device("cpu"), tmp_path)
    make_checkpoint(here.checkpoint, SIZES["tiny"])
    job = Workload(prompt_len=12, gen_len=4, num_requests=6)
    policy = Policy.from_percent(
        (100, 0, 100, 0, 100, 0), gpu_batch_size=3, num_gpu_batches=2, prompt_len=12, gen_len=4
    )
    rates = Hardware.preset("cpu")
    here.rates.parent.mkdir(parents=True)
    rates.save(here.rates)
    mark_stale("cpu", here.home / "offload", ["gpu"])
    assert here.rates.with_suffix(".stale").exists()
    metrics = {"workload": job.to_json(), "policy": asdict(policy), "sweeps": 2}
    predicted = forecast(here, metrics)
    assert predicted.job_s == simulate(ModelArch.from_dir(here.checkpoint), rates, job, policy).job_s


def test_real_model_is_made_once(tmp_path, makes):
    makes(real=made)
    assert choose(tmp_path, on_cuda=False)[1] == tmp_path / REAL.name
    makes(real=absent)
    model, checkpoint = choose(tmp_path, on_cuda=False)
    assert (model.name, checkpoint) == (REAL.name, tmp_path / REAL.name)


def test_what_a_killed_demo_left_of_a_checkpoint_is_removed(tmp_path, makes):
    makes(real=made)
    left = tmp_path / f".{REAL.name}.0123abcd.unfinished"
    made(left)
    assert choose(tmp_path, on_cuda=False)[1] == tmp_path / REAL.name
    assert not left.exists()


def test_synthetic_model_takes_the_place_of_one_that_cannot_be_had_and_it_is_said(tmp_path, makes, capsys):
    makes(real=absent)
    model, checkpoint = choose(tmp_path, on_cuda=False)
    assert (model.name, checkpoint) == (SMALL.name, tmp_path / SMALL.name)
    assert capsys.readouterr().out == "no real model: pip cannot download it. A synthetic one takes its place.\n"


def test_synthetic_model_can_be_asked_for(tmp_path, makes, capsys):
    makes(real=pytest.fail)
    assert choose(tmp_path, on_cuda=False, real=False)[0].name == SMALL.name
    assert capsys.readouterr().out == ""


def test_where_no_model_can_be_made_the_error_is_raised(tmp_path, makes):
    makes(real=absent, synthetic=absent)
    with pytest.raises(InputMissingError):
        choose(tmp_path, on_cuda=False)


def test_synthetic_requests_are_ragged_and_of_every_kind():
    rows = SMALL.requests()
    assert len({row["custom_id"] for row in rows}) == 96
    assert {type(row.get("prompt")) for row in rows} == {str, list, type(None)}


def test_questions_are_chats_of_eight_kinds():
    rows = REAL.requests()
    assert len({row["custom_id"] for row in rows}) == len(rows) == 20
    assert len({row["custom_id"].split("-")[0] for row in rows}) == 8
    assert all(row["messages"][0]["role"] == "user" and row["max_tokens"] == 64 for row in rows)


def completion(custom_id, reason, **choice):
    return {"custom_id": custom_id, "response": {"body": {"choices": [choice | {"finish_reason": reason}]}}}


def test_answers_stand_below_what_was_asked():
    asked = [
        {"custom_id": "a", "messages": [{"role": "user", "content": "Why is the sky blue?"}]},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": [5, 6, 7]}},
        {"custom_id": "c", "prompt": "word " * 80},
    ]
    given = [
        completion("c", "stop", text=""),
        completion("b", "length", text=" more"),
        completion("a", "stop", message={"content": f"It is scattered:\n    {'light ' * 16}red"}),
    ]
    lines = answers(asked, given)
    assert lines[:2] == ["Q: Why is the sky blue?", "A: It is scattered:"]
    assert lines[2:4] == [f"       {'light ' * 14}light", "   light red"]
    assert lines[5:7] == ["Q: (3 token ids)", "A: more […]"]
    assert lines[8].startswith("Q: word") and len(" ".join(lines[8:11])) < 220
    assert "A:" in lines and lines[-1].startswith("3 of 3 answers")


METRICS = {
    "device": "cpu",
    "wall_s": 8.0,
    "most_rows_in_flight": 60,
    "memory": {
        "gpu": {"planned_bytes": 50 << 20, "weights": 30 << 20, "slots": 20 << 20},
        "cpu": {"planned_bytes": 340 << 20, "weights": 25 << 20, "kv": 15 << 20, "process": 300 << 20},
        "disk": {"planned_bytes": 70 << 20, "weights": 70 << 20},
    },
    "lanes": {"gpu": {"busy_s": 6.0}, "disk_read": {"busy_s": 2.0}, "d2h": {"busy_s": 0.001}},
}


def test_plan_is_told_tier_by_tier_with_the_reason_for_the_third():
    lines = planned(METRICS, BUDGETS)
    assert lines[3].split() == ["cpu", "25.0", "15.0", "0.0", "40.0", "153.6"]
    assert lines[2].split() == ["gpu", "30.0", "0.0", "20.0", "50.0", "122.9"]
    text = " ".join(lines)
    assert "the process itself takes 300 MiB, beside that" in text
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
