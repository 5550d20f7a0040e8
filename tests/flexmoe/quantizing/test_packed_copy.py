"""Weights are packed once for all runs: what a run does, says and refuses."""

import errno
import json
import logging
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest

from cost_model import solve
from flexmoe import LLM, SamplingParams
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.errors import InfeasibleError, UsageError
from flexmoe.models.loader import load_model
from flexmoe.quantizing import quantize as job_of
from flexmoe.quantizing.quantize import quantize
from policies.common import file_io
from policies.policy import Policy, PolicyFile
from policies.workload import Workload
from tests.support.command_lines import RESIDENT, THREE_TIERS, assert_one_sentence, body

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk", "loads_cost_their_bytes")
INT4 = ["--compress-weight", "int4"]
POLICY = Policy.from_percent((20, 30, 100, 0, 100, 0), gpu_batch_size=2, num_gpu_batches=2, prompt_len=30, gen_len=4)


@pytest.fixture
def quantized(job, tmp_path):
    """`quantized(format)`: the job's model, packed by hand."""

    def make(form):
        out = tmp_path / f"by hand in {form}"
        if not out.exists():
            quantize(job.model, out, form)
        return out

    return make


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO, "flexmoe.quantizing")
    return caplog


def copies(job):
    directory = job.directory / "offload" / "packed"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def ids(job):
    return [body(line)["choices"][0]["token_ids"] for line in job.lines()]


def policy_file(job, **changes):
    path = job.directory / "policy.json"
    PolicyFile(policy=replace(POLICY, **changes)).save(path)
    return ["--policy", str(path)]


@pytest.mark.parametrize("form", ["int4", "int8", "fp8", "mxfp4"])
def test_a_run_packs_once_and_computes_what_the_packed_checkpoint_does(form, job, main, quantized, said):
    asked = [*THREE_TIERS, "--compress-weight", form]
    code, _, err = main(job.args(*asked))
    assert (code, err) == (0, "")
    [name] = copies(job)
    assert f"-{form}-" in name and "packing them once in " + form in said.text
    packed = job.directory / "offload" / "packed" / name
    written = (packed / "model.safetensors").stat().st_mtime_ns
    first = ids(job)
    said.clear()
    code, _, err = main(job.args(*asked, "--overwrite"))
    assert (code, err, copies(job)) == (0, "", [name]) and "packed before in " + form in said.text
    assert (packed / "model.safetensors").stat().st_mtime_ns == written
    assert main(job.args(*THREE_TIERS, "--overwrite", model=quantized(form)))[0] == 0
    assert ids(job) == first


def test_a_model_that_moved_is_the_same_and_another_one_is_not(job, main, tiny):
    moved = job.directory / "moved" / job.model.name
    shutil.copytree(job.model, moved)
    for model in (job.model, moved, tiny("gqa-4-to-1").directory):
        assert main(job.args(*INT4, "--overwrite", model=model))[0] in (0, 3)
    assert len(copies(job)) == 2


def test_a_job_is_not_resumed_in_another_format(job, main):
    assert main(job.args(*INT4))[0] == 0
    for other, words in (
        ([], ["--compress-weight was int4 and is not given"]),
        (["--compress-weight", "int8"], ["--compress-weight was int4 and is int8"]),
    ):
        code, _, err = main(job.args(*other))
        assert code == 2
        assert_one_sentence(err, *words)
    code, out, _ = main(job.args(*policy_file(job, compress_weight="int4")))
    assert code == 0 and "finished already" in out


def test_a_packed_checkpoint_is_not_packed_again(job, main, quantized):
    code, _, err = main(job.args(*INT4, model=quantized("int4")))
    assert code == 2
    assert_one_sentence(err, "--compress-weight int4", "packed already, in int4 in groups of 32")
    assert not job.output.exists() and not copies(job)


def test_a_policy_says_what_weights_are_packed_in(job, main, quantized):
    asked = policy_file(job, compress_weight="int8")
    metrics = job.directory / "metrics.json"
    assert main(job.args(*asked, "--metrics-json", str(metrics)))[0] == 0
    assert len(copies(job)) == 1 and json.loads(metrics.read_text())["policy"]["compress_weight"] == "int8"
    first = ids(job)
    # A checkpoint that was packed so by hand is what the policy asks for.
    assert main(job.args(*asked, "--overwrite", model=quantized("int8")))[0] == 0
    assert ids(job) == first and len(copies(job)) == 1
    code, _, err = main(job.args(*asked, "--overwrite", model=quantized("fp8")))
    assert code == 4
    assert_one_sentence(err, "the policy is for weights in int8", "packed in fp8", "give the original checkpoint")
    code, _, err = main(job.args(*asked, *INT4, "--overwrite"))
    assert code == 2
    assert_one_sentence(err, "--policy already says what --compress-weight would")


def test_a_saved_policy_is_of_the_packed_model(job, main):
    saved = job.directory / "saved.json"
    assert main(job.args(*INT4, "--save-policy", str(saved)))[0] == 0
    file = PolicyFile.load(saved)
    assert file.policy.compress_weight == "int4" and file.model["weight_format"].startswith("int4 in groups of 32")
    assert main(job.args("--policy", str(saved), "--overwrite"))[0] == 0
    PolicyFile(policy=replace(file.policy, compress_weight=None), model=file.model).save(saved)
    code, _, err = main(job.args("--policy", str(saved), "--overwrite"))
    assert code == 4
    assert_one_sentence(err, "weight_format is int4", "absent in the model")


def test_a_dry_run_plans_packed_weights_and_packs_none(job, main, machine):
    plain = main(job.args(*RESIDENT, "--dry-run", "--hardware", str(machine)))
    packed = main(job.args(*RESIDENT, "--dry-run", "--hardware", str(machine), *INT4))
    assert plain[0] == packed[0] == 0 and not copies(job)
    assert "weights in int4" in packed[1] and "weights in int4" not in plain[1]


def test_the_planner_of_a_run_keeps_to_the_format(job, main, machine, monkeypatch):
    monkeypatch.setattr("cost_model.solve", partial(solve, effort=0.001))
    metrics = job.directory / "metrics.json"
    asked = ["--policy", "auto", "--hardware", str(machine), "--metrics-json", str(metrics)]
    asked += ["--schedule", "rolling", "--gpu-batch-size", "4", "--num-gpu-batches", "2"]
    code, out, err = main(job.args(*asked, *INT4))
    assert (code, err) == (0, "") and "weights in int4" in out and len(copies(job)) == 1
    assert json.loads(metrics.read_text())["policy"]["compress_weight"] == "int4"


def test_a_disk_without_room_is_refused_with_the_option_that_chooses_another(job, main, monkeypatch):
    monkeypatch.setattr(job_of, "free_disk_bytes", lambda directory: 1000)
    code, _, err = main(job.args(*INT4))
    assert code == 74
    assert_one_sentence(err, "has 1000 bytes left", "--offload-dir")
    assert not job.output.exists() and not [name for name in copies(job) if not name.startswith(".")]


def test_a_directory_that_cannot_be_made_is_refused(job, main):
    in_the_way = job.directory / "file"
    in_the_way.write_text("")
    code, _, err = main(job.args(*INT4, "--offload-dir", str(in_the_way / "below")))
    assert code == 74
    assert_one_sentence(err, "--offload-dir")


def test_packing_that_was_stopped_is_resumed_by_the_next_run(job, main, monkeypatch, said):
    write, calls = file_io.write_at, iter(range(40))

    def failing(descriptor, data, offset):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, data, offset)

    monkeypatch.setattr("flexmoe.quantizing.outputs.SHARD_BYTES", 30_000)
    with monkeypatch.context() as patch:
        patch.setattr(file_io, "write_at", failing)
        assert main(job.args(*INT4))[0] == 74
    [begun] = copies(job)
    assert begun.endswith(".quantizing")
    assert main(job.args(*INT4))[0] == 0
    assert "files are there, and unchanged" in said.text and copies(job) == [begun[1:].removesuffix(".quantizing")]


def test_what_does_not_fit_is_refused_before_anything_is_packed(job, main):
    code, _, err = main(job.args(*RESIDENT, "--gpu-mem", "0.0001", *INT4))
    assert code == 4 and not copies(job), err


def test_random_weights_are_not_packed(job, main):
    code, _, err = main(job.args(*INT4, "--load-format", "dummy"))
    assert code == 2
    assert_one_sentence(err, "random weights", "--compress-weight int4")


def test_llm_packs_as_a_run_does(job, tiny, quantized):
    about = {"device": "cpu", "offload_dir": job.directory / "offload", "longest_row": 40}
    params = SamplingParams(max_tokens=4, ignore_eos=True)

    def generated(model, **options):
        with LLM(model, **about, **options) as llm:
            [output] = llm.generate([tiny().prompts[1]], params, use_tqdm=False)
            return output.outputs[0].token_ids

    first = generated(job.model, policy=None, compress_weight="int4")
    assert len(copies(job)) == 1
    assert first == generated(job.model, policy=replace(POLICY, compress_weight="int4"))
    assert first == generated(quantized("int4"), policy=None)
    with pytest.raises(UsageError, match="already says what compress_weight would"):
        LLM(job.model, policy=POLICY, compress_weight="int4", **about)
    with pytest.raises(UsageError, match="packed already"):
        LLM(quantized("int4"), policy=None, compress_weight="int4", **about)


def test_an_engine_by_itself_packs_nothing(job):
    config = EngineConfig(
        policy=replace(POLICY, compress_weight="int4"), workload=Workload(prompt_len=8, gen_len=4), device="cpu"
    )
    with pytest.raises(InfeasibleError, match="weights in int4, and those of .* are not packed"):
        Engine(load_model(str(job.model)), config)
