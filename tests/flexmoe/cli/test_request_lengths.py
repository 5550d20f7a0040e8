"""The planner finds of a requests file what the run finds of it before it starts."""

import functools
import json
import random
import subprocess
import sys
from contextlib import closing

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from cost_model.cli.arguments import check, parser
from cost_model.model.arch import ModelArch
from flexmoe.batch.job_parts import preparer_setup
from flexmoe.batch.options import RunOptions
from flexmoe.cli.request_lengths import read_lengths
from flexmoe.errors import DataError, FlexMoEError, InputMissingError, UsageError
from flexmoe.inputs.options import open_requests
from flexmoe.inputs.request_file import Rows
from flexmoe.models.loader import load_model
from flexmoe.params import EXPECTED_NEW_TOKENS
from flexmoe.preflight.preflight import preflight
from flexmoe.text.estimated_tokens import BYTES_PER_TOKEN, CHAT_TOKENS
from flexmoe.text.tokenizer import Tokenizer
from tests.support.paths import ROOT
from tests.support.tiny import BASE
from tests.support.tokenizers import build_tokenizer

CONTEXT = 400
LOUD = "{% for m in messages %}{{ m.content }} SAYS {{ m.role }} {% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny checkpoint with a short context and a tokenizer that says how it would cut texts."""
    directory = tmp_path_factory.mktemp("short") / "model"
    config = BASE | {"max_position_embeddings": CONTEXT, "vocab_size": 320, "num_hidden_layers": 1}
    MixtralForCausalLM(MixtralConfig(**config)).save_pretrained(directory)
    build_tokenizer(directory)
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    for name, change in (
        ("tokenizer.json", {"truncation": truncation}),
        ("generation_config.json", {"do_sample": True, "temperature": 0.5}),
    ):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return directory


@pytest.fixture
def one_tokenizer(monkeypatch):
    """Loads each tokenizer once, which takes longer than all the rest."""
    monkeypatch.setattr(Tokenizer, "load", functools.cache(Tokenizer.load))


def planned(path, model, *flags):
    """What the planner reads: the workload and its notes, or the error."""
    args = parser().parse_args(["--model", str(model), "--prompts", str(path), *flags])
    check(args)
    arch = ModelArch.from_dir(model) if model != "mixtral-8x7b" else ModelArch.from_name(model)
    return read_lengths(args, arch)


def found_by_the_run(path, directory, **options):
    """The workload of the run's own preflight, and how many rows it refuses."""
    options = RunOptions(model=str(directory), input_file=path, output_file=path.with_suffix(".out"), **options)
    setup = preparer_setup(options, load_model(str(directory)))
    with open_requests(path, options.input_options()) as requests:
        rows = Rows(requests=requests, numbers=range(len(requests)))
        with closing(preflight(rows, setup, prefixes=True)) as found:
            return found.lengths.measured(CONTEXT), found.rows_refused


# What is drawn.

TEXTS = ("", "hello world", "größe 日本", "the quick brown fox " * 12, "</s>", "x" * 900, " a\tb ")


def draw_prompt(rng):
    ids = [rng.randrange(3, 320) for _ in range(rng.choice([1, 4, 30, CONTEXT - 3, CONTEXT, CONTEXT + 1]))]
    return rng.choice(
        [rng.choice(TEXTS), rng.choice(TEXTS), ids, [rng.choice(TEXTS[1:]), "b"], [[5, 6], [7] * 20], [10**6]]
    )


def draw_body(rng):
    if rng.random() < 0.5:
        roles = rng.choice(
            [("user",), ("system", "user"), ("user", "system"), ("user", "assistant", "user"), ("tool",)]
        )
        body = {"messages": [{"role": role, "content": rng.choice(TEXTS)} for role in roles]}
    else:
        body = {"prompt": draw_prompt(rng)}
    several = {
        "max_tokens": [None, 1, 9, 8.0, 10**4, -5],
        "max_completion_tokens": [None, None, 9],
        "n": [None, 1, 8, 0, 129],
        "temperature": [None, 1, -1],
        "stop": [None, "x", ["a", "b"]],
        "min_tokens": [None, 0, 40],
        "model": [None, "another"],
        "tools": [None, [{}]],
        "user": [None, "me"],
    }
    body |= {name: rng.choice(values) for name, values in several.items() if rng.random() < 0.2}
    if "prompt" in body and rng.random() < 0.1:
        body |= {"max_tokens": 0, "echo": True, "logprobs": 1}
    return body


def draw_line(rng, number):
    kind = rng.random()
    if kind < 0.04:
        return rng.choice(
            ['{"prompt": "a"', "[1]", '{"prompt": 5}', '{"prompt": "\\ud83d"}', '{"a": NaN}', "{}", "\ufeff"]
        )
    body = draw_body(rng)
    if kind < 0.4:
        url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": url, "body": body})
    return json.dumps(body, ensure_ascii=rng.random() < 0.5)


def draw_file(rng, path):
    """Writes a file; the run's options for it."""
    shape = rng.choice(["jsonl", "jsonl", "jsonl", "text", "column", "template"])
    options = {"on_invalid": rng.choice(["fail", "record", "record"]), "gen_len": rng.choice([None, None, 7, 500])}
    options |= {"strict_model": True} if rng.random() < 0.2 else {}
    options |= {"chat_template": LOUD} if rng.random() < 0.2 else {}
    options |= {"generation_config": "none"} if rng.random() < 0.2 else {}
    lines = range(rng.randrange(1, 9))
    if shape == "jsonl":
        written = [draw_line(rng, number) for number in lines]
    elif shape == "text":
        written = [rng.choice((*TEXTS, "{name} asks", "{", "\ufeffhello", '{"prompt": "x"}')) for _ in lines]
        options["input_format"] = "text"
    else:
        written = [json.dumps({"question": rng.choice([*TEXTS, None, 5]), "prompt": "no", "id": n}) for n in lines]
        options |= {"prompt_column": "question"} if shape == "column" else {"prompt_template": "Q: {question}{id}"}
    path.write_text("".join(line + "\n" for line in written), encoding="utf-8")
    return options


def flags_of(options):
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        yield from () if value is None else (flag,) if value is True else (flag, str(value))


def compare(seed, path, directory):
    """Whether rows of the drawn file can run; else how both fail."""
    options = draw_file(random.Random(seed), path)
    try:
        measured, refused = found_by_the_run(path, directory, **options)
    except FlexMoEError as error:
        with pytest.raises(type(error)) as caught:
            planned(path, directory, *flags_of(options))
        assert str(caught.value) == str(error)
        return "malformed"
    if not measured.rows:
        with pytest.raises(DataError, match="no row that could run: line "):
            planned(path, directory, *flags_of(options))
        return "none runs"
    workload, notes = planned(path, directory, *flags_of(options))
    assert workload == measured.workload
    assert notes[0] == f"lengths of {measured.rows} completions of {path.name}"
    assert list(notes[1 : 1 + bool(measured.open_rows)]) == measured.open_lines()
    left_out = [note for note in notes if note.startswith("rows that cannot run and are left out: ")]
    assert [int(note.split(": ")[1].split(";")[0]) for note in left_out] == [refused] * bool(refused)
    return "open" if measured.open_rows else "runs"


@pytest.mark.usefixtures("one_tokenizer")
@pytest.mark.parametrize("seeds", [range(300), pytest.param(range(300, 6000), marks=pytest.mark.slow)], ids=len)
def test_the_planner_reads_what_the_run_reads(seeds, directory, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.load_model", functools.cache(load_model))
    kinds = [compare(seed, tmp_path / "in.jsonl", directory) for seed in seeds]
    for kind in ("malformed", "none runs", "open", "runs"):
        assert kinds.count(kind) > len(kinds) / 30, kind


# One by one.


@pytest.fixture
def requests(tmp_path):
    def write(*lines, name="in.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def test_truncation_of_the_tokenizers_file_is_not_obeyed(requests, directory):
    workload, _ = planned(requests({"prompt": "word " * 40, "max_tokens": 2}), directory)
    assert workload.prompt_len > 40


def test_n_completions_are_n_rows(requests, directory):
    workload, notes = planned(requests({"prompt": [5, 6], "n": 8, "max_tokens": 3}), directory)
    assert (workload.num_requests, workload.lengths) == (8, ((2, 3, 8),))
    assert notes == ("lengths of 8 completions of in.jsonl",)


def test_rows_that_cannot_run_are_left_out_and_counted(requests, directory):
    path = requests({"prompt": [5] * CONTEXT}, {"prompt": [5], "max_tokens": 4}, {"prompt": [5], "max_tokens": -5})
    workload, notes = planned(path, directory)
    assert workload.lengths == ((1, 4, 1),)
    assert notes[1].startswith("rows that cannot run and are left out: 2; line 1: the prompt has 400 tokens")


def test_a_chat_without_a_limit_counts_with_what_is_expected(requests, directory):
    workload, notes = planned(requests({"messages": [{"role": "user", "content": "hello"}]}), directory)
    assert workload.gen_len == EXPECTED_NEW_TOKENS and workload.longest_row == CONTEXT
    assert f"1 of 1 completions name no limit: the plan expects {EXPECTED_NEW_TOKENS} tokens" in notes[1]
    assert planned(requests({"prompt": [5]}), directory)[0].gen_len == 32


def test_a_file_may_be_a_sample_of_the_job(requests, directory):
    workload, _ = planned(requests({"prompt": [5]}), directory, "--num-requests", "1000")
    assert workload.num_requests == 1000 and workload.lengths == ((1, 32, 1),)


def test_text_without_a_tokenizer_is_estimated_and_the_note_says_so(requests):
    chat = {"messages": [{"role": "user", "content": "four" * 3}], "max_tokens": 5}
    workload, notes = planned(requests({"prompt": "four" * 10}, chat), "mixtral-8x7b")
    assert workload.lengths == ((3 + CHAT_TOKENS, 5, 1), (10, 32, 1))
    assert f"text estimated at {BYTES_PER_TOKEN} bytes a token" in notes[0]
    assert planned(requests({"prompt": [5]}), "mixtral-8x7b")[1] == ("lengths of 1 completions of in.jsonl",)


def test_a_chat_template_is_rendered_where_text_is_estimated(requests):
    path = requests({"messages": [{"role": "user", "content": "four"}]})
    workload, _ = planned(
        path, "mixtral-8x7b", "--chat-template", "{% for m in messages %}{{ 'four' * 9 }}{% endfor %}"
    )
    assert workload.prompt_len == 9


def test_a_long_text_is_judged_by_its_beginning(requests, directory, monkeypatch):
    counted = []
    encode_all = Tokenizer.encode_all
    monkeypatch.setattr(
        Tokenizer,
        "encode_all",
        lambda self, texts, **kw: counted.extend(map(len, texts)) or encode_all(self, texts, **kw),
    )
    with pytest.raises(DataError, match=f"more than {CONTEXT} tokens"):
        planned(requests({"prompt": "word " * 1_000_000}), directory)
    assert sum(counted) < 20_000


def test_errors_are_sentences(requests, directory, tmp_path):
    with pytest.raises(InputMissingError, match="none.jsonl does not exist"):
        planned(tmp_path / "none.jsonl", directory)
    with pytest.raises(DataError, match="line 2"):
        planned(requests({"prompt": "a"}, '{"prompt": "\\ud83d"}'), directory)
    with pytest.raises(UsageError, match="on_invalid is 'drop'"):
        planned(requests({"prompt": "a"}), directory, "--on-invalid", "drop")
    with pytest.raises(UsageError, match="--strict-model says how the file of --prompts is read"):
        check(parser().parse_args(["--model", "mixtral-8x7b", "--strict-model"]))


def test_reading_needs_no_torch(requests, directory):
    path = requests({"messages": [{"role": "user", "content": "hello"}]})
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from cost_model.cli.arguments import parser\nfrom cost_model.model.arch import ModelArch\n"
        "from flexmoe.cli.request_lengths import read_lengths\n"
        f"args = parser().parse_args(['--model', {str(directory)!r}, '--prompts', {str(path)!r}])\n"
        f"print(read_lengths(args, ModelArch.from_dir({str(directory)!r}))[0].num_requests)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
