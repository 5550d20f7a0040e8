"""What debug mode writes: rows, ranges, experts and operations of every sweep."""

import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.debugging.ranges import Range
from flexmoe.errors import DataError, UsageError
from policies import Policy, Workload
from tests.support.command_lines import THREE_TIERS
from tests.support.edited import edited
from tests.support.engines import RESIDENT, STREAMED
from tests.support.paths import ROOT
from tests.support.tiny import offload

pytestmark = pytest.mark.usefixtures("small_halves", "one_thread")
#: None begins like another.
PROMPTS = [[11 + count + 5 * at for at in range(count)] for count in (20, 4, 33, 1, 17)]


def lines(directory, name):
    return [json.loads(line) for line in (directory / name).read_text("utf-8").splitlines()]


@pytest.fixture
def make(tmp_path):
    made = []

    def call(directory, percent=RESIDENT, batches=2, rows=2, **options):
        counts = {"gpu_batch_size": rows, "num_gpu_batches": batches, "prefill_tokens": 64}
        policy = Policy.from_percent(percent, **counts, prompt_len=40, gen_len=6, half_blocks=batches // 2 or 1)
        options = {"workload": Workload(prompt_len=40, gen_len=6), "debug_dir": tmp_path / "d"} | options
        made.append(LLM(directory, policy=policy, **offload(tmp_path), **options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


@pytest.mark.parametrize(
    "percent, batches, rows, gpu_mem",
    [
        pytest.param(RESIDENT, 1, 2, None, id="resident"),
        pytest.param(STREAMED, 2, 2, None, id="half-blocks"),
        pytest.param((20, 0, 100, 0, 100, 0), 1, 1, 1.0, id="on demand"),
    ],
)
def test_the_experts_of_all_tokens_add_up_to_the_router_statistics(
    percent, batches, rows, gpu_mem, tiny, make, tmp_path, loads_cost_their_bytes
):
    llm = make(tiny("skewed").directory, percent, batches, rows, gpu_mem=gpu_mem, router_stats=True)
    llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True, n=2, temperature=1.0))
    if gpu_mem is not None:
        assert llm.metrics()["expert_cache"]["on_demand_sweeps"]
    llm.close()
    run = json.loads((tmp_path / "d" / "run.json").read_text())
    assert (run["layers"], run["experts"], run["experts_per_token"], run["dtype"]) == (3, 4, 2, "float32")
    found = lines(tmp_path / "d", "experts.jsonl")
    for layer in range(run["layers"]):
        chosen = torch.tensor([ids for line in found if line["layer"] == layer for ids in line["experts"]])
        together = torch.zeros(len(chosen), 4, dtype=torch.int64).scatter_(1, chosen, 1)
        stats = llm.router_stats(layer)
        assert stats.tokens == len(chosen) and torch.equal(stats.counts, together.sum(0))
        assert torch.equal(stats.coactivation, together.T @ together)


def test_every_computed_token_is_in_the_steps_once(tiny, make, tmp_path):
    llm = make(tiny().directory, STREAMED)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
    steps, tokens = lines(tmp_path / "d", "steps.jsonl"), {}
    assert [step["sweep"] for step in steps] == list(range(len(steps))) and all(step["finished"] for step in steps)
    assert sum(step["tokens"] for step in steps) == llm.metrics()["computed_tokens"]
    for step in steps:
        assert step["tokens"] == sum(len(row["token_ids"]) for row in step["rows"]) and step["seconds"] > 0
        for row in step["rows"]:
            known = tokens.setdefault(row["request"], [])
            assert len(known) == row["position"] and row["kv_tier"] in ("gpu", "cpu", "disk")
            known += row["token_ids"]
    for number, output in enumerate(outputs):  # the last one never enters the model
        assert tokens[str(number)] == [*PROMPTS[number], *output.outputs[0].token_ids[:-1]]


@torch.no_grad()
def test_ranges_of_hidden_states_and_logits_are_those_of_transformers(tiny, make, tmp_path):
    variant = tiny("gqa-8-to-2")
    make(variant.directory).generate(PROMPTS[2:3], SamplingParams(max_tokens=1))
    got = {(line["unit"], line["tensor"]): line for line in lines(tmp_path / "d", "ranges.jsonl")}
    want = variant.model(torch.tensor(PROMPTS[2:3]), output_hidden_states=True)
    tensors = {(f"layers.{layer}.attention", "hidden_states"): h[0] for layer, h in enumerate(want.hidden_states[:-1])}
    tensors |= {("embed", "hidden_states"): want.hidden_states[0][0]}
    tensors |= {("head.0", "final_norm"): want.hidden_states[-1][0, -1:]}
    tensors |= {(f"head.{half}", "logits"): want.logits[0, -1:].chunk(2, -1)[half] for half in (0, 1)}
    for key, x in tensors.items():
        line = got[key]
        assert (line["values"], line["finite"]) == (x.numel(), x.numel())
        expected = [float(value) for value in (x.min(), x.max(), x.abs().max(), x.square().mean().sqrt())]
        assert [line[name] for name in ("min", "max", "absmax", "rms")] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_each_unit_has_ranges_and_each_expert_those_of_its_tokens(tiny, make, tmp_path):
    llm = make(tiny().directory, STREAMED)
    llm.generate(PROMPTS, SamplingParams(max_tokens=1))
    ranges, hidden = lines(tmp_path / "d", "ranges.jsonl"), llm.model.arch.hidden
    for layer in range(3):
        own = [line for line in ranges if line["layer"] == layer]
        assert {line["unit"] for line in own if line["expert"] is None} == {f"layers.{layer}.attention"}
        tensors = ["query", "key", "value", "attention", "hidden_states_after_attention", "post_attention_norm"]
        assert {*tensors, "router_logits", "routing_weights"} <= {line["tensor"] for line in own}
        values = Counter()
        for line in own:
            if line["expert"] is not None:
                assert (line["unit"], line["tensor"]) == (f"layers.{layer}.expert.{line['expert']}", "expert_output")
                values[line["expert"]] += line["values"]
        counts = llm.router_stats(layer).counts.tolist()
        assert values == {expert: count * hidden for expert, count in enumerate(counts) if count}


def test_operations_have_the_bytes_and_seconds_of_the_lanes(tiny, make, tmp_path):
    llm = make(tiny().directory, STREAMED)
    llm.generate(PROMPTS, SamplingParams(max_tokens=3))
    llm.close()
    moved, seconds = Counter(), Counter()
    operations = lines(tmp_path / "d", "operations.jsonl")
    for line in operations:
        if line["sweep"] is not None:
            lane = line["lane"].split("/")[0]
            moved[lane] += line["bytes"]
            seconds[lane] += line["seconds"]
    totals = llm.engine.recorder.totals()
    assert {"disk_read", "h2d", "gpu"} <= moved.keys()
    assert any(line["sweep"] is None for line in operations)
    early = Counter()  # what the stream did ahead of the first sweep
    for line in operations:
        early[line["lane"].split("/")[0]] += line["bytes"] if line["sweep"] is None else 0
    for lane, total in totals.items():
        assert moved[lane] <= total.nbytes <= moved[lane] + early[lane]
    assert seconds["gpu"] == pytest.approx(totals["gpu"].worker_s)


def test_a_value_that_is_not_finite_is_told_once_counted_and_ends_nothing(tiny, make, tmp_path, caplog):
    def edit(tensors):
        tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][4, 4] = math.nan

    llm = make(edited(tiny, tmp_path / "m", edit))
    assert llm.generate(PROMPTS, SamplingParams(max_tokens=3))[0].error_code == "non_finite_logits"
    told = [r.message for r in caplog.records if r.name == "flexmoe.debugging.watch"]
    assert len(told) == 1 and told[0].startswith("expert_output of layers.1.expert.2 (layer 1, expert 2) is not finite")
    ranges = lines(tmp_path / "d", "ranges.jsonl")
    first = next(line for line in ranges if line["finite"] < line["values"])
    assert (first["layer"], first["unit"], first["tensor"]) == (1, "layers.1.expert.2", "expert_output")
    experts = next(line["experts"] for line in lines(tmp_path / "d", "experts.jsonl") if line["layer"] == 1)
    assert first["values"] - first["finite"] == sum(2 in ids for ids in experts) > 0 and first["max"] is not None


def test_a_sweep_that_ends_with_an_error_is_recorded_as_far_as_it_came(tiny, make, tmp_path):
    def edit(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][4, 4] = math.inf

    llm = make(edited(tiny, tmp_path / "m", edit), check_finite=True)
    with pytest.raises(DataError):
        llm.generate(PROMPTS[:1], SamplingParams(max_tokens=3))
    llm.close()
    (step,) = lines(tmp_path / "d", "steps.jsonl")
    assert not step["finished"] and step["rows"][0]["token_ids"] == PROMPTS[0]
    last = lines(tmp_path / "d", "ranges.jsonl")[-1]
    assert (last["unit"], last["tensor"]) == ("layers.1.attention", "key") and last["finite"] < last["values"]


def test_a_job_names_its_rows_and_the_guide_reads_them_without_torch(job, main):
    code, out, err = main(job.args(*THREE_TIERS, "--debug"))
    directory = job.directory / "out.jsonl.debug"
    assert (code, err) == (0, "") and f"debug records: {directory}" in out
    guide = (ROOT / "docs" / "debugging.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    blocked = "import sys\nsys.modules['torch'] = sys.modules['numpy'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + example], cwd=job.directory, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert len(shown) == sum(step["tokens"] for step in lines(directory, "steps.jsonl"))
    assert shown[0].startswith("r0/0 0 0 {0: [") and {line.split("/")[0] for line in shown} == {
        json.loads(line)["custom_id"] for line in (job.directory / "in.jsonl").read_text().splitlines()
    }


def test_check_finite_ends_a_job_with_one_sentence_and_exit_code_65(tiny, job, main):
    def edit(tensors):
        tensors["model.layers.2.block_sparse_moe.experts.1.w2.weight"][4, 4] = math.nan

    model = edited(tiny, job.directory / "m", edit)
    code, _, err = main(job.args("--check-finite", model=model))
    assert code == 65 and "(layer 2, expert 1) is not finite in sweep 0: it holds nan for row r" in err
    assert not job.output.exists()


def test_a_directory_that_cannot_be_written_is_refused_before_weights_are_loaded(job, main, monkeypatch):
    monkeypatch.setattr("flexmoe.engine.build.WeightStore", lambda *_: pytest.fail("weights were loaded"))
    code, _, err = main(job.args("--debug-dir", str(job.directory / "in.jsonl")))
    assert code == 2 and "--debug-dir is" in err and "which is a file; give a directory" in err
    code, _, err = main(job.args("--debug-dir", str(job.directory / "no" / "where")))
    assert code == 74 and "there is no directory" in err


def test_a_dry_run_leaves_no_directory(job, main, machine):
    assert main(job.args("--dry-run", "--debug", "--hardware", str(machine)))[0] == 0
    assert not (job.directory / "out.jsonl.debug").exists()


@pytest.mark.parametrize("name", ["check_finite", "debug"])
def test_other_values_than_true_and_false_are_refused(name, make, tiny):
    with pytest.raises(UsageError, match=f"{name} is 'yes'; give True or False"):
        make(tiny().directory, debug_dir=None, **{name: "yes"})


def test_a_range_is_that_of_all_pieces_without_what_is_not_finite():
    pieces = [
        torch.randn(3, 70),
        torch.tensor([math.nan, -9.0, math.inf]),
        torch.empty(0, 4),
        torch.full((2,), math.nan),
    ]
    found = Range()
    for piece in pieces:
        found.add(piece.to(torch.bfloat16))
    x = torch.cat([piece.to(torch.bfloat16).double().flatten() for piece in pieces])
    x, record = x[x.isfinite()], found.record()
    assert (record["values"], record["finite"]) == (215, 211)
    want = [x.min(), x.max(), 9.0, x.square().mean().sqrt()]
    assert [record[name] for name in ("min", "max", "absmax", "rms")] == pytest.approx([float(v) for v in want])
    empty = Range()
    empty.add(pieces[-1])
    assert empty.record() == {"values": 2, "finite": 0, "min": None, "max": None, "absmax": None, "rms": None}
