"""Jobs by the command line: what they keep, refuse and say, and hostile inputs from the first byte to the exit code."""

import io
import json
import os
import signal
from shutil import copytree

import pytest
import torch

from flexmoe.cli import run as command
from flexmoe.cli.merge import main as merge
from flexmoe.text.tokenizer import Tokenizer
from tests.support.command_lines import ROWS, THREE_TIERS, assert_one_sentence, body
from tests.support.tokenizers import build_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "fixed_time", "loads_cost_their_bytes")
SMALL = ["--gpu-batch-size", "2", "--num-gpu-batches", "1", "--prefill-tokens", "400"]


@pytest.fixture
def interrupt(monkeypatch):
    """Has the engine raise, or this process get a signal, in its n-th sweep."""
    from flexmoe.engine.engine import Engine

    real = Engine.step

    def at(sweep, what):
        counter = iter(range(10**9))

        def step(engine):
            if next(counter) == sweep:
                if isinstance(what, BaseException):
                    raise what
                os.kill(os.getpid(), what)
            return real(engine)

        monkeypatch.setattr(Engine, "step", step)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield at
    signal.signal(signal.SIGHUP, before)


def failures(job):
    return [json.loads(line) for line in job.errors.read_text().splitlines()] if job.errors.exists() else []


def sampled_by_default(job, **values):
    """Gives the job a model of its own that has a generation config."""
    model = job.directory / "model"
    if job.model != model:
        job.model = copytree(job.model, model)
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7, **values}))


def sampled(job, tiny):
    """Rows of all kinds: greedy ones, and such as draw."""
    kinds = [{}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9, "seed": 5}, {"n": 2, "temperature": 1.0}]
    job.write(
        [
            {"prompt": tiny().prompts[row], "max_tokens": 5, "return_token_ids": True, **kinds[i % 4]}
            for i, row in enumerate(ROWS)
        ]
    )


@pytest.mark.parametrize(
    "end, code",
    [
        (signal.SIGTERM, 75),
        (signal.SIGINT, 130),
        (signal.SIGHUP, 75),
        (torch.OutOfMemoryError("CUDA out of memory"), 4),
        (OSError(28, "No space left on device"), 74),
        (RuntimeError("a fault"), 1),
    ],
    ids=str,
)
def test_a_job_that_was_stopped_goes_on_under_another_policy_and_ends_as_if_nothing_had_been(
    job, main, tiny, interrupt, monkeypatch, end, code
):
    sampled(job, tiny)
    assert main(job.args("-o", str(job.directory / "whole.jsonl")))[0] == 0
    interrupt(12, end)
    got, _, err = main(job.args(*SMALL))
    assert got == code and not job.output.exists()
    if code != 1:
        assert "Traceback" not in err and err.splitlines()[-1].startswith("flexmoe: ")
    monkeypatch.undo()
    metrics = job.directory / "m.json"
    got, out, err = main(job.args(*THREE_TIERS, "--metrics-json", str(metrics)))
    assert (got, err) == (0, "")
    assert job.output.read_bytes() == (job.directory / "whole.jsonl").read_bytes()
    record = json.loads(metrics.read_text())
    assert record["rows_resumed"] + record["num_requests"] == len(ROWS) and record["rows_resumed"] > 0
    total = sum(body(line)["usage"]["completion_tokens"] for line in job.lines())
    assert record["generated_tokens"] < total, "what had been generated is not generated again"


def test_router_statistics_are_of_the_start_that_writes_them_and_one_that_is_stopped_writes_none(
    job, main, tiny, interrupt, monkeypatch
):
    stats, metrics = job.directory / "stats.json", job.directory / "m.json"
    flags = ["--router-stats", str(stats), "--metrics-json", str(metrics)]
    interrupt(12, signal.SIGTERM)
    assert main(job.args(*SMALL, *flags))[0] == 75 and not stats.exists()
    monkeypatch.undo()
    assert main(job.args(*SMALL, *flags))[0] == 0
    record = json.loads(metrics.read_text())
    assert record["rows_resumed"] > 0
    assert json.loads(stats.read_text())["tokens"] == record["run_tokens"]


def test_a_finished_job_says_so_and_needs_no_weights(job, main, monkeypatch):
    first = job.directory / "first.json"
    assert main(job.args("--metrics-json", str(first)))[0] == 0
    monkeypatch.setattr("flexmoe.engine.build.WeightStore", lambda *_: pytest.fail("weights were loaded"))
    metrics, trace = job.directory / "m.json", job.directory / "t.json"
    code, out, err = main(job.args("--metrics-json", str(metrics), "--trace", str(trace)))
    assert (code, err) == (0, "") and "finished already" in out and f"rows: {len(ROWS)} ok" in out
    record = json.loads(metrics.read_text())
    assert (record["rows_ok"], record["rows_resumed"], record["num_requests"]) == (len(ROWS), len(ROWS), 0)
    assert record.keys() == json.loads(first.read_text()).keys(), "a reader finds what it looks for"
    assert "no trace" in out and not trace.exists()


@pytest.mark.parametrize("strict", [False, True])
def test_rows_for_another_model_run_and_are_noted_at_the_end_or_fail(job, main, caplog, strict):
    rows = [
        {"prompt": [5, 6], "max_tokens": 2, "model": name} for name in (job.model.name, "gpt-4o", "gpt-4o", "llama")
    ]
    job.write(rows)
    code, out, _ = main(job.args(*(["--strict-model"] if strict else [])))
    if strict:
        assert code == 3 and len(job.lines()) == 1 and len(failures(job)) == 3
        assert {body(line)["error"]["code"] for line in failures(job)} == {"model_not_found"}
        return
    assert code == 0 and [body(line)["model"] for line in job.lines()] == [row["model"] for row in rows]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    note = out.splitlines()[-1]
    assert note.startswith('note: line 2 names the model "gpt-4o"') and "llama" not in note


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--gen-len", "7"], "--gen-len was not given and is 7"),
        (["--seed", "3"], "--seed was 0 and is 3"),
        (["--dtype", "bfloat16"], "--dtype was float32 and is bfloat16"),
        (["--strict-model"], "--strict-model was False and is"),
        (["--compress-cache"], "--compress-cache was False and is True"),
        (["--keep-reasoning-in-content"], "--keep-reasoning-in-content was False and is True"),
        (["--prompt-column", "prompt"], "--prompt-column was not given"),
        (["--generation-config", "none"], "--generation-config was auto and is none"),
        (["--chat-template", "{{ messages }}"], "--chat-template was not given"),
    ],
)
def test_other_flags_are_refused_with_what_differs(job, main, flags, told):
    sampled_by_default(job)
    assert main(job.args())[0] == 0
    before = job.output.read_bytes()
    code, _, err = main(job.args(*flags))
    assert code == 2
    assert_one_sentence(err, "holds another job", told, "--overwrite")
    assert job.output.read_bytes() == before


def test_a_flag_that_names_what_is_meant_anyway_changes_no_job(job, main):
    assert main(job.args())[0] == 0
    code, out, err = main(job.args("--input-format", "jsonl", "--generation-config", "auto"))
    assert (code, err) == (0, "") and "finished already" in out


def test_a_model_with_another_generation_config_is_no_flag(job, main):
    sampled_by_default(job)
    assert main(job.args())[0] == 0
    sampled_by_default(job, top_p=0.8)
    code, _, err = main(job.args())
    assert code == 65
    assert_one_sentence(err, "the model's generation_config.json has changed")


@pytest.mark.parametrize(
    "flags, code", [(["--gpu-mem", "0.0001"], 4), ([], 4), (["--chat-template", "{% for %}"], 65)], ids=str
)
def test_overwrite_costs_nothing_where_the_new_job_cannot_run(job, main, interrupt, monkeypatch, flags, code):
    interrupt(12, signal.SIGTERM)
    assert main(job.args(*SMALL))[0] == 75
    monkeypatch.undo()
    work = job.directory / "out.jsonl.flexmoe"
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    interrupt(0, torch.OutOfMemoryError("CUDA out of memory"))
    assert main(job.args("--overwrite", *flags))[0] == code
    assert before == {path.name: path.read_bytes() for path in work.iterdir()} and before.keys() >= {"journal"}


def test_the_same_command_with_overwrite_goes_on_with_what_it_began(job, main, interrupt, monkeypatch, caplog):
    job.output.write_text("mine")
    metrics = job.directory / "m.json"
    command = job.args("--overwrite", *SMALL, "--metrics-json", str(metrics))
    interrupt(12, signal.SIGTERM)
    code, _, err = main(command)
    assert code == 75 and "the same command resumes it" in err and job.output.read_text() == "mine"
    monkeypatch.undo()
    assert main(command)[0] == 0 and json.loads(metrics.read_text())["rows_resumed"] > 0
    assert "--overwrite began" in caplog.text and len(job.lines()) == len(ROWS)
    assert main(command)[0] == 0 and json.loads(metrics.read_text())["rows_resumed"] == 0, (
        "a finished job is done again"
    )


def test_another_input_and_another_model_are_refused_and_overwrite_starts_anew(job, main, tiny):
    other = tiny("tied").directory
    assert main(job.args())[0] == 0
    code, _, err = main(job.args(model=other))
    assert code == 65
    assert_one_sentence(err, "the model is another one", "weights are others")
    job.write([{"prompt": [5, 6], "max_tokens": 2}])
    code, _, err = main(job.args())
    assert code == 65
    assert_one_sentence(err, "the input file has changed")
    assert main(job.args("--overwrite"))[0] == 0 and len(job.lines()) == 1


def test_shards_merge_into_what_one_run_writes(job, main, tiny, capsys, monkeypatch):
    sampled(job, tiny)
    with open(job.directory / "in.jsonl", "a") as file:
        file.write('{"prompt": [9], "tools": [{}]}\n')
    assert main(job.args("-o", str(job.directory / "whole.jsonl")))[0] == 3
    codes = [main(job.args("--shard", f"{i}/3", *(THREE_TIERS if i else [])))[0] for i in range(2)]
    slurm(monkeypatch, 3, 1, 3)
    codes.append(main(job.args("--shard"))[0])
    assert sorted(codes) == [0, 0, 3]
    parts = [str(job.directory / f"out.shard-{i}-of-3.jsonl") for i in range(3)]
    assert merge(["-o", str(job.output), *parts]) == 3
    assert job.output.read_bytes() == (job.directory / "whole.jsonl").read_bytes()
    assert job.errors.read_bytes() == (job.directory / "whole.errors.jsonl").read_bytes()
    capsys.readouterr()


def test_an_array_of_which_only_some_tasks_are_submitted_again_is_no_other_division(job, main, monkeypatch):
    slurm(monkeypatch, 3, 0, 3)
    assert main(job.args("--shard"))[0] == 0
    slurm(monkeypatch, 2, 1, 2)
    for flags in ([], ["--dry-run"], ["--overwrite"]):
        code, _, err = main(job.args("--shard", *flags))
        assert code == 2
        assert_one_sentence(
            err, "stands for shard 1/2", "out.shard-3-of-4.jsonl.flexmoe", "divided by 4", "--shard i/4"
        )
    assert main(job.args("--shard", "2/4"))[0] == 0
    assert main(job.args("--shard", "-o", str(job.directory / "other.jsonl")))[0] == 0


def slurm(monkeypatch, task, first, last):
    """The environment of a task of ``sbatch --array=first-last``."""
    for name, value in {"ID": task, "MIN": first, "MAX": last, "COUNT": last - first + 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


@pytest.mark.parametrize(
    "flags",
    [
        ["--overwrite"],
        ["--shard", "0/2"],
        ["--on-invalid", "record"],
        ["--reserve", "max"],
        ["--checkpoint-interval", "5"],
        ["--chat-template", "x{"],
        ["--strict-model"],
        ["--keep-reasoning-in-content"],
    ],
    ids=lambda f: f[0],
)
def test_flags_of_a_job_are_refused_where_there_is_none(job, main, flags):
    code, _, err = main(job.args(*flags, files=False))
    assert code == 2
    assert_one_sentence(err, flags[0], "only with -i")


@pytest.mark.parametrize(
    "flags, code, parts",
    [
        (["--shard", "2/2"], 2, ["--shard", "2/2"]),
        (["--shard"], 2, ["SLURM_ARRAY_TASK_"]),
        (["--checkpoint-interval", "-1"], 2, ["--checkpoint-interval"]),
        (["--checkpoint-interval", "nan"], 2, ["nan"]),
        (["--reserve", "p50"], 2, ["p50"]),
        (["--generation-config", "/no/such"], 66, ["/no/such"]),
        (["--chat-template", "/no/such"], 2, ["/no/such"]),
        (["--chat-template", "{% for %}"], 65, ["chat template"]),
        (["--prompt-template", "no column"], 2, ["names no column"]),
        (["--input-format", "xml"], 2, ["xml"]),
        (["--seed", str(2**64)], 2, ["seed"]),
    ],
)
def test_a_fault_of_a_jobs_flags_is_one_sentence(job, main, flags, code, parts):
    got, out, err = main(job.args(*flags))
    assert (got, out) == (code, "")
    assert_one_sentence(err, *parts)
    assert sorted(path.name for path in job.directory.iterdir()) == ["in.jsonl"]


def test_the_interval_and_the_reserve_reach_the_engine(job, main, monkeypatch):
    kept, engines = [], []
    from flexmoe.job.runner import RowStream

    checkpoint, begin = RowStream.checkpoint, RowStream.begin
    monkeypatch.setattr(RowStream, "checkpoint", lambda self, states: (kept.append(1), checkpoint(self, states)))
    monkeypatch.setattr(RowStream, "begin", lambda self, llm, *rest: (engines.append(llm), begin(self, llm, *rest))[1])
    assert main(job.args("--checkpoint-interval", "0", "--reserve", "max"))[0] == 0
    assert len(kept) >= 4 and engines[0].engine.config.reserve == "max"


def test_where_there_is_no_terminal_a_line_now_and_then_tells_how_far_the_job_is(job, main, monkeypatch, caplog):
    monkeypatch.setattr("flexmoe.progress.LOG_INTERVAL_S", 0.0)
    assert main(job.args("--gpu-batch-size", "2"))[0] == 0
    lines = [record.getMessage() for record in caplog.records if record.name == "flexmoe.progress"]
    told = [line for line in lines if f"of {len(ROWS)} rows, " in line]
    assert len(told) >= 5 and told[0].startswith("0 of ") and all(" left, in " in line for line in told)


def test_lines_of_text_with_a_template_are_completed(job, main, tmp_path):
    model = copytree(job.model, tmp_path / "model")
    build_tokenizer(model)
    text = job.directory / "in.txt"
    text.write_text("zq\n\nqz\n")
    code, _, err = main(job.args("-i", str(text), "--prompt-template", "zz{text}", "--gen-len", "2", model=model))
    assert (code, err) == (0, "")
    assert [line["custom_id"] for line in job.lines()] == ["row-1", "row-3"]


def test_a_dry_run_tells_rows_and_tokens_and_why_rows_cannot_run(job, main, machine):
    job.write([{"prompt": [5, 6], "max_tokens": 3}, {"prompt": [999]}, {"prompt": [7, 8, 9], "n": 2}])
    code, out, err = main(job.args("--dry-run", "--gen-len", "4", "--hardware", str(machine)))
    assert (code, err) == (3, "")
    assert (
        "rows: 3, of which 1 cannot run; 5 prompt tokens, at most 11 new tokens" in out and "line 2: token 999" in out
    )
    assert sorted(path.name for path in job.directory.iterdir()) == ["in.jsonl"]


# Hostile inputs.

GOOD = '{"prompt": [5, 6], "max_tokens": 2}\n'
STRUCTURAL = {
    "not json": "{broken\n",
    "invalid utf-8": b'{"prompt": "\xff"}\n',
    "nul": b'{"prompt": "a\x00b"}\n',
    "nested": '{"prompt": ' + "[" * 10_000 + "]" * 10_000 + "}\n",
    "nan": '{"prompt": [5], "temperature": NaN}\n',
    "key twice": '{"prompt": [5], "prompt": [6]}\n',
    "wrong method": '{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {"prompt": [5]}}\n',
    "wrong url": '{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"prompt": [5]}}\n',
    "id twice": '{"prompt": [5], "custom_id": "x"}\n{"prompt": [5], "custom_id": "x"}\n',
    "no object": "[1, 2]\n",
    "surrogate": '{"prompt": "\\ud800"}\n',
    "huge line": '{"prompt": "' + "a" * (17 * 2**20) + '"}\n',
}
PER_ROW = {
    "stream": {"stream": True},
    "huge n": {"n": 10**9},
    "huge max_tokens": {"max_tokens": 10**9},
    "huge logprobs": {"logprobs": 10**9},
    "negative temperature": {"temperature": -1},
    "bias outside the vocabulary": {"logit_bias": {"100000": 5}},
    "tools": {"tools": [{"type": "function"}]},
    "too long": {"prompt": [5] * 600},
    "token outside the vocabulary": {"prompt": [10**6]},
}


def write(job, *parts):
    data = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    (job.directory / "in.jsonl").write_bytes(data)


@pytest.mark.parametrize("name", STRUCTURAL)
def test_a_structural_fault_stops_the_job_or_becomes_an_error_row(job, main, name):
    write(job, GOOD, STRUCTURAL[name], GOOD)
    code, out, err = main(job.args())
    assert (code, out) == (65, "") and "Traceback" not in err
    assert f"line {3 if name == 'id twice' else 2}" in err.splitlines()[0]
    assert sorted(path.name for path in job.directory.iterdir()) == ["in.jsonl"]
    code, out, err = main(job.args("--on-invalid", "record"))
    assert code == 3 and "Traceback" not in err
    ids = [line["custom_id"] for line in (*job.lines(), *failures(job))]
    assert len(failures(job)) == 1 and len(set(ids)) == len(ids) == (4 if name == "id twice" else 3)


def test_rows_that_ask_for_what_cannot_be_are_error_rows(job, main):
    write(
        job,
        GOOD,
        *(json.dumps({"prompt": [5], "custom_id": name, **row}) + "\n" for name, row in PER_ROW.items()),
        GOOD,
    )
    code, out, err = main(job.args())
    assert code == 3 and "Traceback" not in err
    assert len(job.lines()) == 2
    assert [line["custom_id"] for line in failures(job)] == list(PER_ROW)


@pytest.mark.parametrize(
    "data, code",
    [
        ("", 65),
        ("\n\n \n", 65),
        (b"\xef\xbb\xbf" + GOOD.encode(), 0),
        (GOOD.replace("\n", "\r\n") * 2, 0),
        (GOOD.strip(), 0),
    ],
    ids=["empty", "blank lines", "BOM", "CRLF", "no final newline"],
)
def test_odd_files(job, main, data, code):
    write(job, data)
    got, _, err = main(job.args())
    assert got == code and "Traceback" not in err
    if code == 0:
        assert {len(body(line)["choices"]) for line in job.lines()} == {1}


TEMPLATES = {
    "raises": "{{ raise_exception('no chats today') }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "grows": "{{ 'x' * 10**12 }}",
    "is absent": None,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_does_not_work_costs_its_rows_alone(job, main, tmp_path, monkeypatch, name):
    from shutil import copytree

    real = Tokenizer.load
    monkeypatch.setattr(
        Tokenizer, "load", lambda directory, **options: real(directory, render_timeout_s=0.2, **options)
    )
    model = copytree(job.model, tmp_path / "model")
    build_tokenizer(model, chat_template=TEMPLATES[name])
    write(job, GOOD, '{"messages": [{"role": "user", "content": "hi"}]}\n', GOOD)
    code, _, err = main(job.args(model=model))
    assert code == 3 and "Traceback" not in err
    assert len(job.lines()) == 2 and len(failures(job)) == 1


def test_what_the_terminal_cannot_show_stops_nothing(job, machine, monkeypatch):
    write(job, json.dumps({"prompt": [5], "lumière 日本": 1}, ensure_ascii=False) + "\n", GOOD)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", screen)
    assert command.main(job.args("--dry-run", "--hardware", str(machine))) == 3
    assert b"line 1: the field" in screen.buffer.getvalue() and b"lumi" in screen.buffer.getvalue()


def test_a_second_run_of_the_same_job_is_refused(job, main, interrupt, monkeypatch):
    codes = []

    from flexmoe.engine.engine import Engine

    real = Engine.step

    def step(engine):
        if not codes:
            codes.append(command.main(job.args()))
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    code, _, err = main(job.args())
    assert (code, codes) == (0, [2])
    assert f"process {os.getpid()} on" in err


def test_input_and_output_may_not_be_the_same(job, main):
    before = (job.directory / "in.jsonl").read_bytes()
    code, _, err = main(job.args("-o", str(job.directory / "in.jsonl")))
    assert code == 2
    assert_one_sentence(err, "choose another output file")
    assert (job.directory / "in.jsonl").read_bytes() == before


def test_an_input_that_changes_while_it_is_run_exits_65(job, main, monkeypatch):
    from flexmoe.engine.engine import Engine

    real = Engine.step

    def step(engine):
        with open(job.directory / "in.jsonl", "a") as file:
            file.write(GOOD)
        return real(engine)

    write(job, GOOD * 60)
    monkeypatch.setattr(Engine, "step", step)
    code, _, err = main(job.args("--gpu-batch-size", "1"))
    assert code == 65
    assert "changed while the job was running" in err and "Traceback" not in err
