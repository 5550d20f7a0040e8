"""The command line: what it prints and writes, and how it fails (one sentence, the right code, nothing half-written)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexmoe.cli import run as command
from flexmoe.models.loader import load_model
from policies.policy import Policy, PolicyFile
from tests.support.command_lines import RESIDENT, ROWS, THREE_TIERS, assert_one_sentence, body
from tests.support.forked import Forked
from tests.support.paths import ROOT
from tests.support.tiny import assert_greedy
from tests.support.tokenizers import build_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")


# Jobs.


@pytest.mark.parametrize(
    "more",
    [
        [],
        THREE_TIERS,
        [*THREE_TIERS, "--schedule", "static", "--overlap", "false"],
        [*THREE_TIERS, "--cpu-cache-compute", "--prefill-tokens", "20", "--half-blocks", "2", "--num-gpu-batches", "4"],
    ],
    ids=len,
)
def test_a_job_exits_0_with_transformers_tokens_in_input_order(more, job, tiny, main):
    code, out, err = main(job.args(*more))
    assert (code, err) == (0, "")
    lines = job.lines()
    assert [line["custom_id"] for line in lines] == [f"r{row}" for row in ROWS]
    for row, line in zip(ROWS, lines):
        choice = body(line)["choices"][0]
        want = tiny().expected(row, 4 + row % 3, eos=True)
        assert_greedy(tiny(), row, choice["token_ids"], want)
        assert choice["finish_reason"] == ("stop" if want[-1] in tiny().eos_ids else "length")
    assert f"rows: {len(ROWS)} ok, 0 failed; completions: {job.output}" in out
    assert not job.errors.exists()
    assert not list((job.directory / "offload").glob("*")), "the disk tier leaves no files"


def test_text_and_chat_rows_are_tokenized_and_completed_with_text(job, main):
    model = job.directory / "with tokenizer"
    shutil.copytree(job.model, model)
    build_tokenizer(model)
    job.write([{"prompt": "zqzq"}, {"messages": [{"role": "user", "content": "zq"}]}])
    code, _, err = main(job.args("--gen-len", "3", model=model))
    assert (code, err) == (0, "")
    completion, chat = job.lines()
    assert isinstance(body(completion)["choices"][0]["text"], str)
    assert isinstance(body(chat)["choices"][0]["message"]["content"], str)
    assert [line["custom_id"] for line in (completion, chat)] == ["row-1", "row-2"]


def test_rows_that_cannot_run_go_to_the_error_file_and_the_exit_code_is_3(job, main, caplog):
    job.write([{"prompt": [5, 6]}, {"prompt": [999]}, {"prompt": [7] * 600}, {"prompt": [8]}])
    code, out, err = main(job.args("--gen-len", "2"))
    assert code == 3
    assert "Traceback" not in err and "2 of 4 rows cannot run" in caplog.text
    assert [line["custom_id"] for line in job.lines()] == ["row-1", "row-4"]
    failed = [json.loads(line) for line in job.errors.read_text().splitlines()]
    assert [line["custom_id"] for line in failed] == ["row-2", "row-3"]
    assert f"rows: 2 ok, 2 failed; completions: {job.output}" in out and f"failed rows: {job.errors}" in out


def test_a_policy_file_runs_what_it_says(job, tiny, main):
    policy = Policy.from_percent(
        (10, 40, 0, 100, 0, 100), gpu_batch_size=2, num_gpu_batches=3, prompt_len=30, gen_len=4
    )
    path = job.directory / "policy.json"
    PolicyFile(policy=policy, model=load_model(str(job.model)).arch.fingerprint()).save(path)
    metrics = job.directory / "metrics.json"
    code, _, err = main(job.args("--policy", str(path), "--metrics-json", str(metrics)))
    assert (code, err) == (0, "")
    record = json.loads(metrics.read_text())
    assert record["policy"]["num_gpu_batches"] == 3 and record["policy"]["w_cpu_percent"] == 40
    assert max(record["rows_in_flight"]) <= 6


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "auto"))
def test_the_compute_dtype_is_the_one_asked_for(dtype, job, main):
    metrics = job.directory / "metrics.json"
    code, _, err = main(job.args(*THREE_TIERS, "--dtype", dtype, "--metrics-json", str(metrics)))
    assert (code, err) == (0, "")
    assert json.loads(metrics.read_text())["dtype"] == f"torch.{'float32' if dtype == 'auto' else dtype}"


def test_metrics_json_adds_up(job, main):
    path = job.directory / "metrics.json"
    code, out, err = main(job.args(*THREE_TIERS, "--metrics-json", str(path)))
    assert (code, err) == (0, "")
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    completions = [body(line) for line in job.lines()]
    assert record["prompt_tokens"] == sum(c["usage"]["prompt_tokens"] for c in completions)
    assert record["generated_tokens"] == sum(c["usage"]["completion_tokens"] for c in completions)
    assert record["total_num_tokens"] == record["prompt_tokens"] + record["generated_tokens"]
    assert (record["num_requests"], record["rows_ok"], record["rows_failed"]) == (len(ROWS), len(ROWS), 0)
    assert record["tokens_per_second"] == pytest.approx(record["total_num_tokens"] / record["elapsed_time"])
    assert sum(record["achieved_weight_percent"]) == pytest.approx(100)
    for lane in ("disk_read", "h2d", "d2h", "gpu"):
        assert record["lanes"][lane]["busy_s"] > 0
    for tier, items in record["memory"].items():
        assert items["planned_bytes"] == sum(v for k, v in items.items() if k != "planned_bytes"), tier
    assert record["peak_process_bytes"] > 0 and record["device"] == "cpu"
    assert f"for {record['generated_tokens']} generated and {record['prompt_tokens']} prompt tokens" in out
    assert record["asked_weight_percent"] == [20, 30, 50] and record["asked_cache_percent"] == [30, 30, 40]


@pytest.mark.parametrize("placement", [(0, 0, 0, 0, 0, 0), (0, 50, 30, 30, 30, 30), (20, 30, 0, 100, 0, 100)], ids=str)
def test_the_trace_has_a_track_per_lane_in_which_nothing_overlaps_and_disk_reads_under_compute(placement, job, main):
    path = job.directory / "trace.json"
    code, out, err = main(
        job.args(
            "--percent", *map(str, placement), "--gpu-batch-size", "2", "--num-gpu-batches", "3", "--trace", str(path)
        )
    )
    assert (code, err) == (0, "") and f"trace: {path}" in out
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    tracks = {
        name: sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e["ph"] == "X" and e["tid"] == tid)
        for tid, name in names.items()
    }
    assert {"gpu", "h2d", "d2h", "disk_read"} <= {name.split("/")[0] for name in tracks}
    for name, spans in tracks.items():
        for one, other in zip(spans, spans[1:]):
            assert one[1] <= other[0] + 0.01, f"{name}: {one[2]} and {other[2]} overlap"
    reads = [s for name, spans in tracks.items() if name.startswith("disk_read") for s in spans]
    under = sum(any(a < end and start < b for a, b, _ in tracks["gpu"]) for start, end, _ in reads)
    assert under > 0, "no disk read ran while the device computed"


def test_a_dry_run_checks_and_prints_the_plan_and_neither_loads_nor_writes(job, main, machine, monkeypatch):
    monkeypatch.setattr("flexmoe.engine.build.WeightStore", lambda *_: pytest.fail("weights were loaded"))
    before = sorted(job.directory.rglob("*"))
    metrics, trace = job.directory / "m.json", job.directory / "t.json"
    files = ["--metrics-json", str(metrics), "--trace", str(trace), "--hardware", str(machine)]
    code, out, err = main(job.args(*THREE_TIERS, "--dry-run", *files))
    assert (code, err) == (0, "")
    for words in (
        "weights: asked 20/30/50 %, placed",
        "memory  gpu:",
        "memory  cpu:",
        "memory disk:",
        f"rows: {len(ROWS)}",
        "predicted: ",
    ):
        assert words in out
    assert sorted(job.directory.rglob("*")) == before


def test_a_run_ends_with_five_lines_and_tells_the_rest_only_when_asked(job, main):
    code, out, err = main(job.args(*THREE_TIERS))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["rows", "speed", "time", "memory", "bottleneck"]
    code, verbose, _ = main(job.args(*THREE_TIERS, "--overwrite", "-v"))
    assert code == 0 and [line.split(":")[0] for line in verbose.splitlines()[-5:]] == [
        line.split(":")[0] for line in lines
    ]
    for words in ("weights: asked 20/30/50 %, placed", "lane  disk_read: busy ", "memory  gpu: ", "sweeps: "):
        assert words in verbose and words not in out


def test_a_job_that_only_scores_tells_prompt_tokens_per_second(job, main, machine):
    job.write([{"prompt": [5, 6, 7], "max_tokens": 0, "echo": True, "logprobs": 0}])
    code, out, _ = main(job.args("--hardware", str(machine)))
    told = [line for line in out.splitlines() if line.startswith(("speed: ", "predicted: "))]
    assert code == 0 and len(told) == 2
    assert all("generated" not in line and "prompt tokens/s" in line for line in told)


# The benchmark.


def benchmark(job, *more):
    return job.args(
        "--prompt-len", "20", "--gen-len", "6", "--gpu-batch-size", "2", "--num-gpu-batches", "2", *more, files=False
    )


def test_without_an_input_it_prints_flexllmgens_summary(job, main):
    path = job.directory / "metrics.json"
    code, out, err = main(benchmark(job, "--metrics-json", str(path)))
    assert (code, err) == (0, "")
    for words in (
        "model size: ",
        "cache size: ",
        "hidden size (prefill): ",
        "peak gpu mem: ",
        "prefill latency: ",
        "prefill throughput: ",
        "decode latency: ",
        "decode throughput: ",
        "total latency: ",
        "total throughput: ",
    ):
        assert words in out
    record = json.loads(path.read_text())
    assert (record["num_requests"], record["prompt_tokens"], record["generated_tokens"]) == (4, 4 * 20, 4 * 6)
    assert "projected" not in out


def test_the_seed_and_the_number_of_prompts_are_flags(job, main):
    path = job.directory / "metrics.json"
    assert main(benchmark(job, "--num-prompts", "7", "--seed", "3", "--metrics-json", str(path)))[0] == 0
    assert json.loads(path.read_text())["prompt_tokens"] == 7 * 20


def test_cut_gen_len_generates_that_many_tokens_and_projects_the_rest(job, main):
    path = job.directory / "metrics.json"
    code, out, err = main(benchmark(job, "--schedule", "static", "--cut-gen-len", "3", "--metrics-json", str(path)))
    assert (code, err) == (0, "")
    record = json.loads(path.read_text())
    assert record["generated_tokens"] == 4 * 3
    decode_s = sum(record["sweep_s"][1:]) * (6 - 1) / (3 - 1)
    assert f"decode latency: {decode_s:.3f} s (projected)" in out
    total_s = record["sweep_s"][0] + decode_s
    assert (
        f"total latency: {total_s:.3f} s (projected)\ttotal throughput: {4 * 6 / total_s:.3f} token/s (projected)"
        in out
    )


def test_dummy_weights_need_a_config_alone(tiny, job, main):
    shape = job.directory / "shape"
    shape.mkdir()
    shutil.copy(tiny().directory / "config.json", shape)
    code, out, err = main(
        benchmark(replace_model(job, shape), "--load-format", "dummy", "--percent", "20", "30", "0", "50", "0", "0")
    )
    assert (code, err) == (0, "")
    assert "total throughput" in out
    assert not list((job.directory / "offload").iterdir())


def replace_model(job, model):
    job.model = model
    return job


# Faults: code and sentence; all before anything is loaded.

FLAG_FAULTS = {
    "percents that do not add up": (
        ["--percent", "80", "30", "0", "100", "100", "0"],
        2,
        ["80", "30", "110", "at most 100"],
    ),
    "five percents": (["--percent", "80", "20", "0", "100", "100"], 2, ["--percent"]),
    "an unknown flag": (["--no-such-flag"], 2, ["--no-such-flag"]),
    "a count of zero": (["--gen-len", "0"], 2, ["--gen-len", "0"]),
    "an unknown device": (["--device", "tpu"], 2, ["tpu", "cpu"]),
    "an unknown dtype": (["--dtype", "int3"], 2, ["int3", "bfloat16"]),
    "a flag that is neither true nor false": (["--overlap", "maybe"], 2, ["maybe"]),
    "a negative budget": (["--gpu-mem", "-1"], 2, ["--gpu-mem", "-1"]),
    "cut-gen-len of a job": (["--cut-gen-len", "2"], 2, ["--cut-gen-len"]),
    "a GPU budget that is too small": (["--gpu-mem", "0.0001"], 4, ["gpu", "are missing", "--gpu-mem"]),
    "a CPU budget that is too small": (
        ["--percent", "0", "100", "0", "100", "100", "0", "--cpu-mem", "0.0001"],
        4,
        ["cpu", "are missing", "--cpu-mem"],
    ),
    "a disk budget that is too small": (
        ["--percent", "0", "0", "0", "0", "0", "0", "--nvme-mem", "0"],
        4,
        ["disk", "are missing", "--nvme-mem"],
    ),
    "a missing policy file": (["--policy", "/no/such/policy.json"], 66, ["/no/such/policy.json"]),
    "a trace where nothing can be written": (["--trace", "/proc/trace.json"], 74, ["/proc/trace.json"]),
    "metrics in no directory": (["--metrics-json", "/no/such/m.json"], 74, ["/no/such"]),
}


@pytest.mark.parametrize("flags, code, parts", FLAG_FAULTS.values(), ids=FLAG_FAULTS)
def test_a_fault_of_the_flags_is_one_sentence_with_its_code(flags, code, parts, job, main):
    before = sorted(job.directory.rglob("*"))
    got, out, err = main(job.args(*flags))
    assert (got, out) == (code, "")
    assert_one_sentence(err, *parts)
    assert sorted(job.directory.rglob("*")) == before


def test_a_missing_input_exits_66(job, main):
    (job.directory / "in.jsonl").unlink()
    code, _, err = main(job.args())
    assert code == 66
    assert_one_sentence(err, "in.jsonl")
    assert not job.output.exists()


def test_a_malformed_line_exits_65_and_is_named(job, main):
    with open(job.directory / "in.jsonl", "a") as file:
        file.write("{broken\n")
    code, _, err = main(job.args())
    assert code == 65
    told, way_out = err.splitlines()
    assert_one_sentence(told, f"line {len(ROWS) + 1}")
    assert "--on-invalid record" in way_out
    assert not job.output.exists()


@pytest.mark.parametrize("output", ["/proc/out.jsonl", "/no/such/directory/out.jsonl"])
def test_an_output_that_cannot_be_written_exits_74_before_the_model_is_opened(output, job, main, monkeypatch):
    monkeypatch.setattr("flexmoe.batch.job_parts.load_model", lambda *_: pytest.fail("the model was opened"))
    job.output = Path(output)
    code, _, err = main(job.args())
    assert code == 74
    assert_one_sentence(err, output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
def test_a_read_only_output_directory_exits_74(job, main):
    sealed = job.directory / "sealed"
    sealed.mkdir(mode=0o555)
    job.output = sealed / "out.jsonl"
    code, _, err = main(job.args())
    assert code == 74
    assert_one_sentence(err, str(job.output))


def test_output_without_input_is_a_usage_error(job, main):
    code, _, err = main(job.args("-o", str(job.output), files=False))
    assert code == 2
    assert_one_sentence(err, "-i", "-o")


def test_a_truncated_shard_exits_65_and_names_file_and_cause(job, main):
    broken = job.directory / "broken"
    shutil.copytree(job.model, broken)
    (shard,) = broken.glob("*.safetensors")
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    code, _, err = main(job.args(model=broken))
    assert code == 65
    assert_one_sentence(err, shard.name, "download is probably incomplete")
    assert not job.output.exists()


def other_policy(job):
    fingerprint = load_model(str(job.model)).arch.fingerprint() | {"num_layers": 99}
    policy = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=4, num_gpu_batches=1, prompt_len=9, gen_len=4)
    path = job.directory / "policy.json"
    PolicyFile(policy=policy, model=fingerprint).save(path)
    return path


def test_a_policy_for_another_model_exits_4_with_what_differs_and_can_be_forced(job, main):
    path = other_policy(job)
    code, _, err = main(job.args("--policy", str(path)))
    assert code == 4
    assert_one_sentence(err, "another model", "num_layers is 99", "--force-policy")
    assert not job.output.exists()
    code, _, err = main(job.args("--policy", str(path), "--force-policy"))
    assert (code, err) == (0, "")
    assert len(job.lines()) == len(ROWS)


@pytest.mark.parametrize(
    "flags",
    [
        ["--percent", *["100", "0", "100", "0", "100", "0"]],
        ["--gpu-batch-size", "3"],
        ["--overlap", "false"],
        ["--cpu-cache-compute"],
    ],
    ids=lambda f: f[0],
)
def test_a_policy_file_and_a_flag_that_it_already_answers_do_not_go_together(flags, job, main):
    code, _, err = main(job.args("--policy", str(other_policy(job)), *flags))
    assert code == 2
    assert_one_sentence(err, "--policy", flags[0])


def test_an_offload_directory_that_cannot_be_made_exits_74(job, main):
    in_the_way = job.directory / "file"
    in_the_way.write_text("")
    code, _, err = main(
        job.args("--percent", *["0", "0", "0", "0", "0", "0"], "--offload-dir", str(in_the_way / "below"))
    )
    assert code == 74
    assert_one_sentence(err, str(in_the_way))
    assert not job.output.exists()


def test_an_interrupted_job_exits_130_and_keeps_the_old_output(job, main, monkeypatch):
    job.output.write_text("what was there\n")
    steps = []

    def interrupted_step(engine):
        steps.append(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr("flexmoe.engine.engine.Engine.step", interrupted_step)
    code, _, err = main(job.args(*THREE_TIERS, "--overwrite"))
    assert code == 130 and steps
    assert_one_sentence(err, "interrupted")
    assert job.output.read_text() == "what was there\n"
    assert sorted(p.name for p in job.directory.iterdir()) == ["in.jsonl", "offload", "out.jsonl"]


def test_a_full_disk_while_the_job_runs_exits_74(job, main, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexmoe.engine.engine.Engine.step", full)
    code, _, err = main(job.args())
    assert code == 74
    assert_one_sentence(err, "No space left on device")
    assert not job.output.exists()


# As a program.


def start(args):
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "flexmoe.run", *args],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_help_opens_with_an_example_and_explains_the_six_numbers(tmp_path):
    code, out, err = Forked(lambda: command.main(["--help"]), tmp_path).wait()
    assert (code, err) == (0, "")
    example = "python -m flexmoe.run --model DIR -i requests.jsonl -o out.jsonl"
    assert out.index(example) < out.index("options:") < out.index("--percent W W C C A A")
    for words in ("weights on the GPU", "KV cache in CPU memory", "activations on the GPU", "exit codes"):
        assert words in out


def test_as_a_program_it_exits_with_the_code_and_a_sentence(job):
    process = start(job.args("--percent", *["90", "20", "0", "100", "100", "0"]))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert_one_sentence(err, "90", "20", "110")


def test_ctrl_c_exits_130_with_a_sentence_and_no_file_under_the_final_name(job, tiny, tmp_path):
    job.write([{"prompt": tiny().prompts[1], "max_tokens": 400} for _ in range(400)])
    model = job.directory / "endless"
    shutil.copytree(job.model, model)
    (model / "generation_config.json").write_text('{"eos_token_id": [299]}')
    args = job.args(*THREE_TIERS, "--checkpoint-interval", "0", model=model)
    forked = Forked(lambda: sys.exit(command.main(args)), tmp_path)
    journal = job.directory / "out.jsonl.flexmoe" / "journal"
    while forked.is_running() and not (journal.exists() and journal.stat().st_size > 1000):
        time.sleep(0.01)  # until sweeps run
    os.kill(forked.process, signal.SIGINT)
    code, _, err = forked.wait(60)
    assert code == 130
    stopping, told = err.splitlines()
    assert "stopping after this sweep" in stopping
    assert_one_sentence(told, "interrupted", "of 400 rows are done", "the same command resumes it")
    assert not job.output.exists()


def test_a_reader_that_closes_the_pipe_does_not_stop_the_job(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": [5, 6], "max_tokens": 2}\n')
    command = [sys.executable, "-m", "flexmoe.run", "--model", str(tiny().directory), "-i", str(tmp_path / "in.jsonl")]
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out.jsonl"), *RESIDENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert "Traceback" not in process.stderr.read()
    assert (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("flag", "name"), (("--metrics-json", "in.jsonl"), ("--trace", "out.jsonl"), ("--trace", "out.errors.jsonl"))
)
def test_a_file_that_is_read_or_written_already_is_not_overwritten(job, main, flag, name):
    before = (job.directory / "in.jsonl").read_bytes()
    code, _, stderr = main(job.args(flag, str(job.directory / name)))
    assert code == 2
    assert_one_sentence(stderr, "choose another")
    assert (job.directory / "in.jsonl").read_bytes() == before


def test_rates_of_a_run_do_not_count_what_loading_moved(job, main):
    metrics = job.directory / "metrics.json"
    assert main(job.args("--metrics-json", str(metrics)))[0] == 0
    assert "disk_read" not in json.loads(metrics.read_text())["lanes"]


def test_a_cut_benchmark_without_a_decode_step_is_refused(job, main):
    code, _, stderr = main(job.args("--prompt-len", "4", "--gen-len", "8", "--cut-gen-len", "1", files=False))
    assert code == 2
    assert_one_sentence(stderr, "at least 2")
