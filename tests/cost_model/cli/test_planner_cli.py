"""The planner's command line: what it prints and writes, and how it fails (one sentence, the right code)."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest

import cost_model.__main__ as command
from cost_model.cli import plan
from cost_model.hardware.hardware import Hardware
from policies.common.memory_units import GIB
from policies.policy import PolicyFile
from policies.workload import Workload
from tests.support.paths import ROOT
from tests.support.usage import MIXTRAL, skewed


def six(numbers):
    return numbers.split()


MACHINE = ["--gpu-mem", "16", "--cpu-mem", "200", "--nvme-mem", "1500"]
SHAPE = ["--model", "mixtral-8x7b"]
SIZES = ["--gpu-batch-size", "16", "--num-gpu-batches", "2"]
GIVEN = [*SIZES, "--percent", *six("10 90 0 100 0 100")]
#: What a plan is asked to keep; the rest is chosen.
FIXED = ["--wg", "0", "--hg", "100", "--gbs", "64", "--schedule", "rolling"]
#: Emitted by a fork of FlexLLMGen for this machine, which it says needs 12.8 GB of GPU memory.
PUBLISHED = ["--gbs", "64", "--num-gb", "9", "--percent", *six("54 46 0 99 0 100")]


@pytest.fixture
def main(capsys):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""

    def call(*args):
        code = command.main(list(args))
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def judged(main):
    """The JSON report of a run that succeeds."""

    def call(*args):
        code, out, err = main(*args, "--json")
        assert (code, err) == (0, "")
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return call


def assert_one_sentence(result, code, *parts):
    assert result[0] == code, result
    assert result[1] == ""
    stderr = result[2]
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1 and stderr.startswith("cost_model: "), stderr
    for part in parts:
        assert part in stderr, stderr


# A given policy.


def test_a_given_policy_is_judged_on_a_screen(main):
    code, out, err = main(*SHAPE, *MACHINE, *GIVEN)
    assert (code, err) == (0, "")
    for words in (
        "NVIDIA T4",
        "46.70 G parameters, 87 GiB",
        "prompt 512, completion 32",
        "2 GPU batches of 16 = 32 rows",
        "tokens/s generated",
        "of 200.00 GiB",
        "PCIe-bound",
    ):
        assert words in out
    assert len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 100


def test_without_hardware_the_machine_is_the_t4_preset_and_the_report_says_so(main, judged):
    out = main(*SHAPE, *GIVEN)[1]
    assert "preset t4" in out and "--hardware was not given" in out and "assumed, not measured" in out
    asked, default = judged(*SHAPE, *GIVEN, "--hardware", "T4"), judged(*SHAPE, *GIVEN)
    assert asked["policy_file"] == default["policy_file"]


def test_the_policy_file_holds_what_was_judged_and_can_be_judged_again(judged, tmp_path):
    path = tmp_path / "policy.json"
    first = judged(*SHAPE, *MACHINE, *GIVEN, "--schedule", "static", "--prefill-tokens", "4096", "-o", str(path))
    file = PolicyFile.load(path)
    assert file.to_json() == first["policy_file"]
    assert file.policy.schedule == "static" and file.policy.block_size == 32
    assert file.hardware["gpu_memory_bytes"] == 16 * GIB and file.planned_workload() == Workload(
        prompt_len=512, gen_len=32
    )
    again = judged(*SHAPE, *MACHINE, "--policy", str(path))
    assert again["policy_file"] == first["policy_file"], "placing achieved percents places the same"


def test_flags_change_what_they_say(judged):
    base = judged(*SHAPE, *MACHINE, *GIVEN)["policy_file"]["policy"]
    for flags, name, value in (
        (["--cpu-cache-compute"], "cpu_attention_percent", 100.0),
        (["--overlap", "false"], "overlap", False),
        (["--prefill-tokens", "77"], "prefill_tokens", 77),
        (["--schedule", "static", "--prefill-tokens", "512"], "schedule", "static"),
        (["--half-blocks", "2"], "half_blocks", 2),
    ):
        assert judged(*SHAPE, *MACHINE, *GIVEN, *flags)["policy_file"]["policy"] == base | {name: value}


def test_float32_numbers_take_twice_the_room(judged):
    half, full = (
        judged(*SHAPE, *MACHINE, *GIVEN, "--ignore-memory", "--dtype", dtype) for dtype in ("bfloat16", "float32")
    )
    assert full["memory_bytes"]["cpu"]["kv"] == 2 * half["memory_bytes"]["cpu"]["kv"]


def test_the_short_and_the_long_names_of_the_batch_flags_are_the_same(judged):
    short = ["--gbs", "16", "--num-gb", "2", *GIVEN[len(SIZES) :]]
    assert judged(*SHAPE, *short) == judged(*SHAPE, *GIVEN)


def test_budgets_replace_capacities_and_alpha_is_the_part_that_may_be_used(judged):
    alphas = ["--alpha-g", "0.5", "--alpha-c", "0.25", "--alpha-n", "0.1"]
    whole, parts = judged(*SHAPE, *MACHINE, *GIVEN), judged(*SHAPE, *MACHINE, *GIVEN, *alphas, "--ignore-memory")
    assert whole["budgets_bytes"]["cpu"] == 200 * GIB and whole["budgets_bytes"]["disk"] == 1500 * GIB
    assert parts["budgets_bytes"]["cpu"] == 50 * GIB and parts["budgets_bytes"]["disk"] == 150 * GIB
    assert whole["budgets_bytes"]["gpu"] - parts["budgets_bytes"]["gpu"] == 8 * GIB, "the context stays as large"


def test_a_zero_budget_is_a_budget(main):
    assert_one_sentence(main(*SHAPE, *GIVEN, "--nvme-mem", "0", "--cpu-mem", "0"), 4, "the cpu memory", "has 0.000 GiB")


def test_on_device_cpu_both_tiers_share_one_memory(main):
    code, out, _ = main(*SHAPE, "--hardware", "cpu", *SIZES, "--percent", *six("10 20 0 100 100 0"))
    assert code == 0 and "gpu+cpu" in out and "PCIe" not in out


def test_a_job_of_so_many_requests_has_an_end(main, judged):
    assert "1,000 requests in" in main(*SHAPE, *MACHINE, *GIVEN, "--num-requests", "1000")[1]
    assert judged(*SHAPE, *MACHINE, *GIVEN, "--num-requests", "1000")["policy_file"]["predicted"]["job_s"] > 0
    assert judged(*SHAPE, *MACHINE, *GIVEN)["policy_file"]["predicted"]["job_s"] is None


def test_prompts_give_the_lengths_of_the_job(judged, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": [1, 2, 3], "max_tokens": 5}\n{"prompt": "eight by"}\n')
    report = judged(*SHAPE, *MACHINE, *GIVEN, "--prompts", str(path), "--gen-len", "9")
    assert Workload(**report["policy_file"]["workload"]) == Workload.of_lengths([(3, 5), (2, 9)])
    assert report["notes"] == [
        "lengths of 2 completions of requests.jsonl, text estimated at 4 bytes a token and 4 tokens more per chat message"
    ]


def test_a_directory_with_a_config_is_a_model(judged, tmp_path):
    (tmp_path / "config.json").write_bytes(
        (ROOT / "cost_model" / "model" / "shapes" / "mixtral-8x7b.json").read_bytes()
    )
    named, read = judged(*SHAPE, *GIVEN), judged("--model", str(tmp_path), *GIVEN)
    assert named["policy_file"] == read["policy_file"]


def test_a_hardware_file_and_the_last_measurement_are_machines(judged, main, tmp_path, monkeypatch):
    path = tmp_path / "machine-0123.json"
    Hardware.preset("l4").save(path)
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path))
    from_file = judged(*SHAPE, *GIVEN, "--hardware", str(path))
    assert from_file["policy_file"]["hardware"]["name"] == "l4" and str(path) in from_file["rates"]
    measured = judged(*SHAPE, *GIVEN, "--hardware", "auto")
    assert measured["policy_file"] == from_file["policy_file"] and "as measured on" in measured["rates"]


def test_the_published_example_is_refused_with_its_bytes_and_predicted_on_demand(main, judged):
    assert_one_sentence(main(*SHAPE, *MACHINE, *PUBLISHED), 4, "the gpu memory needs 50.", "are missing", "weights")
    report = judged(*SHAPE, *MACHINE, *PUBLISHED, "--ignore-memory")
    assert report["memory_bytes"]["gpu"]["weights"] > 46 * GIB
    assert report["policy_file"]["predicted"]["tokens_per_s"] > 0
    assert "36.8" in main(*SHAPE, *MACHINE, *PUBLISHED, "--ignore-memory")[1]


def test_the_plot_is_a_picture(main, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    assert main(*SHAPE, *MACHINE, *GIVEN, "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


# A plan.


@pytest.fixture(scope="module")
def planned(tmp_path_factory, planned_soon):
    """(exit code, stdout, stderr, directory with all output files) of one plan with a fixed share and batch size."""
    directory = tmp_path_factory.mktemp("plan")
    out, err = io.StringIO(), io.StringIO()
    files = ["-o", str(directory / "policy.json"), "--trace", str(directory / "trace.json")]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command.main([*SHAPE, *MACHINE, *FIXED, "--num-requests", "1000", *files])
    return code, out.getvalue(), err.getvalue(), directory


def test_a_plan_is_shown_with_what_would_help_most(planned):
    code, out, err, _ = planned
    assert (code, err) == (0, "")
    for words in (
        "policy     rolling: ",
        "GPU batches of 64 = ",
        "1,000 requests in ",
        "to drain",
        "advice     ",
    ):
        assert words in out
    assert len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 100


def test_a_plan_keeps_what_was_fixed_and_fits(planned, judged):
    policy = PolicyFile.load(planned[3] / "policy.json").policy
    assert (policy.w_gpu_percent, policy.act_gpu_percent, policy.gpu_batch_size) == (0, 100, 64)
    assert policy.schedule == "rolling"
    again = judged(*SHAPE, *MACHINE, "--num-requests", "1000", "--policy", str(planned[3] / "policy.json"))
    assert again["policy_file"] == json.loads((planned[3] / "policy.json").read_text())
    for tier, size in again["policy_file"]["predicted"]["memory_bytes"].items():
        assert size <= again["budgets_bytes"][tier]


def test_a_plan_is_better_than_what_a_person_would_try(planned, judged):
    best = PolicyFile.load(planned[3] / "policy.json").predicted["tokens_per_s"]
    hand = ["--gbs", "64", "--num-gb", "4", "--percent", *six("0 100 0 100 100 0"), "--num-requests", "1000"]
    assert best > judged(*SHAPE, *MACHINE, *hand)["policy_file"]["predicted"]["tokens_per_s"]


def test_the_trace_has_the_lanes_of_a_run(planned):
    events = json.loads((planned[3] / "trace.json").read_text())["traceEvents"]
    lanes = {each["args"]["name"].split("/")[0] for each in events if each["ph"] == "M"}
    assert {"gpu", "h2d", "cpu"} <= lanes
    assert all(each["dur"] >= 0 for each in events if each["ph"] == "X")


def test_an_endless_job_has_a_trace_too(main, tmp_path):
    path = tmp_path / "trace.json"
    assert main(*SHAPE, *MACHINE, *GIVEN, "--trace", str(path))[0] == 0
    assert json.loads(path.read_text())["traceEvents"]


def test_no_plan_for_too_small_a_machine_names_the_limit_and_the_way_out(main):
    assert_one_sentence(main(*SHAPE, *MACHINE, "--gpu-mem", "2"), 4, "no policy", "GPU memory", "--gpu-mem of")


@pytest.mark.parametrize("gib", ["0", "2.5", *(pytest.param(gib, marks=pytest.mark.slow) for gib in ("1", "1.941"))])
def test_the_way_out_speaks_of_the_number_that_was_typed_and_is_one(main, gib):
    """Below what the context takes, too."""
    code, out, err = main(*SHAPE, *MACHINE, "--gpu-mem", gib)
    assert code == 4 and not out and f"instead of {gib} would do" in err
    [enough] = re.findall(r"--gpu-mem of (\S+) GiB", err)
    one_row = ["--gbs", "1", "--num-gb", "1", "--prefill-tokens", "1"]
    assert main(*SHAPE, *MACHINE, *one_row, "--gpu-mem", enough)[0] == 0


def test_the_way_out_says_where_only_a_part_may_be_used(main):
    assert_one_sentence(
        main(*SHAPE, *MACHINE, "--gpu-mem", "4", "--alpha-g", "0.5"), 4, "--alpha-g leaves 0.5 of --gpu-mem"
    )


def test_a_policy_that_is_too_large_is_told_what_the_context_takes(main):
    assert_one_sentence(main(*SHAPE, *MACHINE, *PUBLISHED), 4, "of its 16 GiB the context", "raise --gpu-mem")


# Bad input.


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model", "gpt-17", *GIVEN], 2, ["'gpt-17' is not known", "mixtral-8x7b", "qwen3-30b-a3b"]),
        ([*GIVEN], 2, ["--model"]),
        ([*SHAPE, *GIVEN, "--wg", "0"], 2, ["--percent", "--wg"]),
        ([*SHAPE, *GIVEN[len(SIZES) :]], 2, ["--percent needs", "--gpu-batch-size", "--num-gpu-batches"]),
        ([*SHAPE, *GIVEN[2:]], 2, ["--percent needs --gpu-batch-size"]),
        ([*SHAPE, *SIZES, "--percent", *six("60 60 0 100 0 100")], 2, ["60", "120"]),
        ([*SHAPE, *SIZES, "--percent", *six("60 40 0 100 0")], 2, ["--percent", "6"]),
        ([*SHAPE, *SIZES, "--percent", *six("-1 40 0 100 0 1")], 2, ["'-1'", "0 to 100"]),
        ([*SHAPE, *SIZES, "--percent", *six("nan 40 0 100 0 1")], 2, ["'nan'", "0 to 100"]),
        ([*SHAPE, "--wg", "60", "--wc", "50"], 2, ["60", "110"]),
        ([*SHAPE, *GIVEN, "--gbs", "0"], 2, ["'0'", "at least 1"]),
        ([*SHAPE, *GIVEN, "--prompt-len", "-4"], 2, ["'-4'"]),
        ([*SHAPE, *GIVEN, "--gpu-mem", "-1"], 2, ["--gpu-mem", "'-1'"]),
        ([*SHAPE, *GIVEN, "--cpu-mem", "nan"], 2, ["--cpu-mem", "'nan'"]),
        ([*SHAPE, *GIVEN, "--nvme-mem", "inf"], 2, ["--nvme-mem", "'inf'"]),
        ([*SHAPE, *GIVEN, "--alpha-g", "0"], 2, ["--alpha-g", "above 0"]),
        ([*SHAPE, *GIVEN, "--alpha-c", "1.5"], 2, ["--alpha-c", "at most 1"]),
        ([*SHAPE, *GIVEN, "--compress-weight", "int3"], 2, ["--compress-weight", "'int3'"]),
        ([*SHAPE, *GIVEN, "--allow-compression"], 2, ["--allow-compression", "--percent"]),
        ([*SHAPE, "--policy", "x.json", "--compress-weight", "int4"], 2, ["--policy", "--compress-weight"]),
        ([*SHAPE, *GIVEN, "--prompts", "x", "--prompt-len", "4"], 2, ["--prompts", "--prompt-len"]),
        (
            [*SHAPE, *GIVEN, "--prompt-len", "32768"],
            2,
            ["--prompt-len 32768", "context of mixtral-8x7b", "32768 tokens"],
        ),
        ([*SHAPE, *GIVEN, "--gen-len", "32257"], 2, ["rows of 32769 tokens"]),
        ([*SHAPE, *GIVEN, "--input-format", "text"], 2, ["--input-format", "give that, too"]),
        ([*SHAPE, *GIVEN, "--prompts", "x.txt", "--input-format", "csv"], 2, ["--input-format is 'csv'", "jsonl"]),
        ([*SHAPE, "--ignore-memory"], 2, ["--ignore-memory", "--percent"]),
        ([*SHAPE, "--policy", "x.json", "--gbs", "4"], 2, ["--policy", "--gpu-batch-size"]),
        ([*SHAPE, *GIVEN, "--hardware", "t5"], 2, ["'t5'", "rtx4090"]),
        ([*SHAPE, *GIVEN, "--hardware", "none.json"], 66, ["none.json"]),
        ([*SHAPE, *GIVEN, "--prompts", "none.jsonl"], 66, ["none.jsonl"]),
        ([*SHAPE, "--policy", "none.json"], 66, ["none.json"]),
        ([*SHAPE, *GIVEN, "-o", "no/where/policy.json"], 74, ["no/where/policy.json"]),
        ([*SHAPE, *GIVEN, "--plot", "plan.txt"], 2, ["plan.txt", ".png"]),
        ([*SHAPE, *GIVEN, "-o", "one.json", "--trace", "one.json"], 2, ["--output", "--trace", "one.json"]),
        ([*SHAPE, *GIVEN, "-o", "."], 2, ["--output", "no regular file"]),
        ([*SHAPE, *GIVEN, "--frobnicate"], 2, ["--frobnicate"]),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else str(value),
)
def test_bad_input_is_one_sentence_and_its_exit_code(flags, code, words, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(main(*flags), code, *words)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def changed(values):
    return json.dumps(Hardware.preset("t4").to_json() | values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not valid JSON"]),
        (changed({"schema_version": 99}), ["schema_version 99", "newer"]),
        (changed({"kind": "flexmoe.policy"}), ["flexmoe.hardware"]),
        (changed({"speed": 1}), ["'speed'"]),
        (changed({"cores": -1}), ["cores", "-1"]),
        (changed({"row_s": 0}).replace('"row_s": 0', '"row_s": NaN'), ["NaN"]),
    ],
    ids=("malformed", "newer", "another kind", "unknown key", "negative", "NaN"),
)
def test_a_hardware_file_that_cannot_be_used_is_named(text, words, main, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(text)
    assert_one_sentence(main(*SHAPE, *GIVEN, "--hardware", str(path)), 65, str(path), *words)


def test_auto_without_a_measurement_says_how_to_make_one(main, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path))
    assert_one_sentence(main(*SHAPE, *GIVEN, "--hardware", "auto"), 66, str(tmp_path), "python -m flexmoe.probe")


def test_a_policy_for_another_model_is_refused_with_what_differs(main, judged, tmp_path):
    path = tmp_path / "policy.json"
    judged(*SHAPE, *GIVEN, "-o", str(path))
    assert_one_sentence(main("--model", "mixtral-8x22b", "--policy", str(path)), 4, "another model", "num_layers is 32")


def test_a_plot_without_matplotlib_says_what_to_install(main, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = main(*SHAPE, *GIVEN, "--plot", str(tmp_path / "plan.png"))
    assert_one_sentence(result, 2, "matplotlib", "flexmoe[plot]")


# As a program.


def test_help_opens_with_an_example_and_loads_no_library():
    code = (
        "import runpy, sys\nsys.argv = ['cost_model', '--help']\n"
        "try: runpy.run_module('cost_model', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, *sorted({name.split('.')[0] for name in sys.modules if sys.modules[name]}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    exit_code, *loaded = done.stderr.split()
    assert exit_code == "0"
    assert not set(loaded) & {"torch", "transformers", "flexmoe", "numpy", "pulp", "matplotlib", "tokenizers"}
    assert done.stdout.index("python -m cost_model --model mistralai/") < done.stdout.index("options:")
    for words in ("weights on the GPU", "exit codes", "--hardware PRESET|FILE|auto", "preset t4"):
        assert words in done.stdout


def test_as_a_program_it_exits_with_the_code_and_a_sentence():
    arguments = [*SHAPE, *SIZES, "--percent", *six("90 20 0 100 100 0")]
    done = subprocess.run(
        [sys.executable, "-m", "cost_model", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "110" in done.stderr and "Traceback" not in done.stderr


# Usage of experts.


@pytest.fixture
def usage_file(tmp_path):
    skewed().save(tmp_path / "usage.json")
    return str(tmp_path / "usage.json")


@pytest.mark.slow
def test_usage_decides_which_experts_a_plan_has_on_the_gpu(main, usage_file, tmp_path):
    few = [*SHAPE, *MACHINE, "--num-requests", "2", *FIXED[2:4], "--expert-usage", usage_file]
    code, out, err = main(*few, "-o", str(tmp_path / "policy.json"))
    assert (code, err) == (0, "")
    screen = " ".join(out.split())
    assert "experts are chosen as 1,000 tokens of another run chose them" in screen
    assert "; most used experts first" in screen
    policy = PolicyFile.load(tmp_path / "policy.json").policy
    assert policy.expert_order == skewed().unit_order(MIXTRAL)
    again = main(
        *SHAPE, *MACHINE, "--num-requests", "2", "--policy", str(tmp_path / "policy.json"), "--expert-usage", usage_file
    )
    assert again[0] == 0 and re.search(r"predicted.*", again[1])[0] == re.search(r"predicted.*", out)[0]


def test_usage_orders_the_experts_of_given_percents_too(judged, usage_file):
    few = [*SHAPE, *GIVEN, "--num-requests", "2", "--hardware", "rtx4090", "--ignore-memory"]
    plain, known = judged(*few), judged(*few, "--expert-usage", usage_file)
    assert known["policy_file"]["policy"]["expert_order"] == [list(layer) for layer in skewed().unit_order(MIXTRAL)]
    assert plain["policy_file"]["policy"]["expert_order"] is None
    assert known["policy_file"]["predicted"]["tokens_per_s"] > plain["policy_file"]["predicted"]["tokens_per_s"]


def test_usage_that_cannot_be_used_is_refused(main, usage_file, tmp_path):
    assert_one_sentence(main("--model", "Qwen3-30B-A3B", "--expert-usage", usage_file), 4, "of another model")
    assert_one_sentence(main(*SHAPE, "--expert-usage", str(tmp_path / "none.json")), 66, "none.json")
    assert_one_sentence(main(*SHAPE, "--expert-usage", usage_file, "-o", usage_file), 2, "--expert-usage and --output")


# Compression.


def test_a_given_policy_is_judged_with_packed_weights(judged, main, tmp_path):
    path = tmp_path / "policy.json"
    plain = judged(*SHAPE, *MACHINE, *GIVEN)
    packed = judged(*SHAPE, *MACHINE, *GIVEN, "--compress-weight", "int4", "--compress-cache", "-o", str(path))
    file = packed["policy_file"]
    assert (file["policy"]["compress_weight"], file["policy"]["compress_cache"]) == ("int4", True)
    assert file["model"]["weight_format"] == "int4 in groups of 128 (attention, expert)"
    assert packed["memory_bytes"]["cpu"]["weights"] < 0.3 * plain["memory_bytes"]["cpu"]["weights"]
    assert packed["memory_bytes"]["cpu"]["kv"] < 0.6 * plain["memory_bytes"]["cpu"]["kv"]
    again = judged(*SHAPE, *MACHINE, "--policy", str(path))
    assert again["memory_bytes"] == packed["memory_bytes"]
    code, out, _ = main(*SHAPE, *MACHINE, "--policy", str(path))
    assert code == 0 and "GiB in int4 in groups of 128" in out


def test_a_packed_model_is_packed_no_further(main, tmp_path):
    config = json.loads((ROOT / "cost_model/model/shapes/mixtral-8x7b.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "gate"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ["--model", str(tmp_path)]
    assert_one_sentence(
        main(*model, *GIVEN, "--compress-weight", "int4"), 2, "--compress-weight int4", "packed already"
    )
    policy = tmp_path / "policy.json"
    assert main(*SHAPE, *MACHINE, *GIVEN, "--compress-weight", "int4", "-o", str(policy))[0] == 0
    assert_one_sentence(main(*model, "--policy", str(policy)), 4, "weights in int4", "packed in fp8")


def test_what_gains_is_compressed_where_that_is_allowed(judged, monkeypatch):
    """All weights are on the disk."""
    monkeypatch.setattr(plan, "solve", partial(plan.solve, effort=0.001))
    asked = [
        *SHAPE,
        "--hardware",
        "rtx4090",
        "--cpu-mem",
        "20",
        *FIXED,
        "--wc",
        "0",
        "--num-gb",
        "4",
        "--prompt-len",
        "64",
    ]
    plain = judged(*asked)
    allowed = judged(*asked, "--allow-compression")
    assert allowed["policy_file"]["policy"]["compress_weight"] in ("int4", "mxfp4")
    gained = [each for each in plain["advice"] if each.endswith("; ask by --compress-weight int4")]
    assert len(gained) == 1 and " tokens/s, " in gained[0]
    speeds = [each["policy_file"]["predicted"]["tokens_per_s"] for each in (plain, allowed)]
    assert speeds[1] > 2 * speeds[0]
