"""Every row is looked at before the weights are loaded: in this process or in others, with the same result."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from flexmoe.errors import DataError, FlexMoEError
from flexmoe.inputs.options import InputOptions, open_requests
from flexmoe.inputs.request_file import Rows
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.preflight import worker
from flexmoe.preflight.lengths import OPEN_ROOM_TOKENS, Lengths, RowLength
from flexmoe.preflight.preflight import preflight
from flexmoe.preflight.prepare_setup import PreparerSetup
from flexmoe.text.tokenizer import Tokenizer
from tests.support.jobs import CONTEXT, make_setup
from tests.support.tokenizers import build_tokenizer


@pytest.fixture
def rows(tmp_path):
    """Opens rows of a file."""
    opened = []

    def call(lines, numbers=None, on_invalid="fail"):
        path = tmp_path / "in.jsonl"
        path.write_bytes(
            b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
        )
        requests = open_requests(path, InputOptions(on_invalid=on_invalid))
        opened.append(requests)
        return Rows(requests=requests, numbers=range(len(requests)) if numbers is None else numbers)

    yield call
    for requests in opened:
        requests.close()


def found(rows, setup, **options):
    result = preflight(rows, setup, **options)
    lengths = result.lengths
    sizes = [
        (lengths.prompt_tokens[r], lengths.new_tokens[r], lengths.longest[r]) if r in lengths else None
        for r in range(len(rows))
    ]
    refused = sorted((row, error.code, error.message, error.param) for row, error in result.refused())
    result.close()
    return sizes, refused


def mixed(count):
    kinds = [
        {"prompt": "hello world"},
        {"prompt": [5, 6, 7], "n": 3, "max_tokens": 9},
        {"prompt": ["a", "bc"]},
        {"messages": [{"role": "user", "content": "größe 日本"}]},
        {"prompt": "x", "tools": [{}]},
        {"prompt": [9] * (CONTEXT + 1)},
        {"prompt": "x", "max_tokens": 10**9},
        {"prompt": [10**6]},
        b"{broken",
        b'{"prompt": "\xff"}',
    ]
    return [kinds[i % len(kinds)] for i in range(count)]


def test_sizes_are_those_of_what_the_engine_gets(rows, setup):
    sizes, refused = found(rows([{"prompt": [5] * 4}, {"prompt": [[5], [6] * 3], "n": 2, "max_tokens": 10}]), setup)
    assert sizes == [(4, 50, 54), (4, 40, 13)] and refused == []
    assert found(rows([{"prompt": [5] * (CONTEXT - 1), "n": 2}]), setup)[0] == [(CONTEXT - 1, 2, CONTEXT)]


def test_processes_find_what_this_one_finds(rows, setup):
    given = rows(mixed(700), on_invalid="record")
    here, there = found(given, setup, workers=0), found(given, setup, workers=2)
    assert here == there
    sizes, refused = here
    assert sizes.count(None) == len(refused) == 420
    assert {code for _, code, *_ in refused} >= {"unsupported_field", "context_length_exceeded", "invalid_line"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_structure_that_cannot_be_followed_is_an_error_row(rows, setup, workers):
    kinds = [{"regex": "a+"}, {"json": {"not": {}}}, {"regex": "[a-"}]
    given = rows([{"prompt": "hello", "structured_outputs": kind} for kind in kinds] * 20)
    sizes, refused = found(given, setup, workers=workers)
    assert [size is None for size in sizes] == [False, True, True] * 20
    assert {(code, param) for _, code, _, param in refused} == {("invalid_structure", "structured_outputs")}
    assert "Unimplemented keys" in refused[0][2] and "unclosed character class" in refused[1][2]


def test_a_structure_needs_a_tokenizer(rows, tmp_path):
    _, [(_, code, message, _)] = found(
        rows([{"prompt": [5], "structured_outputs": {"regex": "a"}}]), make_setup(str(tmp_path))
    )
    assert code == "invalid_structure" and "no tokenizer files" in message


def test_only_the_rows_that_are_asked_for_are_looked_at(rows, setup):
    given = rows([{"prompt": [5] * (1 + i)} for i in range(10)], numbers=range(1, 10, 3))
    sizes, _ = found(given, setup, done=lambda row: row == 1)
    assert sizes == [(2, 50, 52), None, (8, 50, 58)]


def deadly(monkeypatch, limit_s=120.0):
    """Has workers crash or hang on rows that ask for it, and chunks be small, because each of their rows is tried again."""
    monkeypatch.setattr("flexmoe.preflight.preflight._CHUNK_ROWS", 4)
    monkeypatch.setattr(worker, "_MOST_LOST", 2)
    monkeypatch.setattr(worker, "_LIMIT_S", limit_s)
    monkeypatch.setattr(worker, "WORKER", "tests.support.deadly_worker")


def test_a_row_on_which_a_process_dies_is_an_error_row_and_the_others_are_not(rows, tmp_path, monkeypatch):
    deadly(monkeypatch)
    given = rows([{"prompt": "die" if i in (3, 17) else "live"} for i in range(20)])
    sizes, refused = found(given, make_setup(str(tmp_path)), workers=2)
    assert [row for row, *_ in refused] == [3, 17] and sizes.count(None) == 2
    assert "died" in refused[0][2]


def test_a_row_on_which_a_process_hangs_is_an_error_row(rows, tmp_path, monkeypatch):
    deadly(monkeypatch, limit_s=1.0)
    _, refused = found(
        rows([{"prompt": "hang" if i == 1 else "live"} for i in range(4)]), make_setup(str(tmp_path)), workers=1
    )
    assert [row for row, *_ in refused] == [1] and "longer than 1 s" in refused[0][2]


def test_row_after_row_that_crashes_fails_the_job(rows, tmp_path, monkeypatch):
    deadly(monkeypatch)
    with pytest.raises(DataError, match=r"row after row cannot be tokenized \(lines 1, 2"):
        found(rows([{"prompt": "die"}] * 30), make_setup(str(tmp_path)), workers=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_template_that_never_ends_fails_the_job_instead_of_taking_days(rows, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("flexmoe.preflight.preflight._MOST_ENDLESS", 2)
    build_tokenizer(tmp_path / "t", chat_template="{{ 'x' * 10**12 }}")
    given = rows([{"messages": [{"role": "user", "content": "a"}]}] * 50)
    with pytest.raises(DataError, match="does not come to an end.*on 3 rows.*chat_template"):
        found(given, make_setup(str(tmp_path / "t")), workers=workers)


def test_no_more_rows_than_it_takes_are_tried_with_a_template_that_never_ends(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("flexmoe.preflight.preflight._MOST_ENDLESS", 2)
    build_tokenizer(tmp_path / "t", chat_template="{{ 'x' * 10**12 }}")
    preparer = make_setup(str(tmp_path / "t")).preparer()
    rendered, real = [], Tokenizer.render
    monkeypatch.setattr(Tokenizer, "render", lambda *args, **options: rendered.append(1) or real(*args, **options))
    given = rows([{"prompt": "a"}, *[{"messages": [{"role": "user", "content": "a"}]}] * 50])
    with pytest.raises(DataError, match="on 3 rows"):
        found(given, None, preparer=preparer, workers=0)
    assert len(rendered) == 3


def test_no_process_is_left(rows, setup):
    found(rows(mixed(300), on_invalid="record"), setup, workers=2)
    assert children_of(os.getpid()) == []


def children_of(parent):
    """Command lines of the processes that it started and that are still there."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (directory / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent:
                found.append((directory / "cmdline").read_text())
    return [command for command in found if worker.WORKER in command]


def test_a_setup_comes_back_from_json(setup):
    other = make_setup("x", chat_template="{{ 1 }}", defaults={"top_p": 0.5}, model_names=("a", "b"), strict_model=True)
    for one in (setup, other.at(5)):
        assert PreparerSetup.of_json(json.loads(json.dumps(one.to_json()))) == one


# Lengths.


def request(prompt, max_tokens, n=1):
    return EngineRequest(
        request_id="", prompt_token_ids=(5,) * prompt, params=SamplingParams(max_tokens=max_tokens, n=n)
    )


def test_a_job_is_measured_by_its_samples():
    lengths = Lengths(4)
    lengths[0] = RowLength.of([request(10, 4)], 100)
    lengths[2] = RowLength.of([request(20, 8, n=3)], 100)
    measured = lengths.measured(100)
    assert (measured.rows, measured.longest_row) == (4, 28)
    workload = measured.workload
    assert (workload.prompt_len, workload.gen_len, workload.num_requests) == (18, 7, 4)
    assert workload.lengths == ((10, 4, 1), (20, 8, 3))


def test_a_job_without_rows_is_measured_too():
    assert Lengths(3).measured(100).rows == 0


def test_rows_of_many_different_lengths_are_counted_together_and_keep_number_means_and_the_longest():
    lengths, rows = Lengths(20_000), range(20_000)
    for row in rows:
        lengths[row] = RowLength.of([request(1 + row % 199, 1 + row % 101)], 10**6)
    workload = lengths.measured(10**6).workload
    assert 100 < len(workload.lengths) <= 576 and sum(count for *_, count in workload.lengths) == 20_000
    means = [sum(entry[axis] * entry[2] for entry in workload.lengths) / 20_000 for axis in (0, 1)]
    assert means == pytest.approx([sum(1 + row % n for row in rows) / 20_000 for n in (199, 101)], rel=0.01)
    assert (workload.prompt_len, workload.gen_len, workload.longest_row) == (100, 51, 299)


def test_scoring_rows_generate_nothing():
    lengths = Lengths(1)
    params = SamplingParams(max_tokens=0, echo=True, logprobs=1)
    lengths[0] = RowLength.of([EngineRequest(request_id="", prompt_token_ids=(5,) * 7, params=params)], 100)
    assert lengths.new_tokens[0] == 0 and lengths.measured(100).workload.gen_len == 1
    assert lengths.measured(100).workload.scored_tokens == 6, "the first token has nothing before it"


def test_a_plan_knows_how_much_of_the_prompts_is_scored():
    lengths = Lengths(3)
    scored = SamplingParams(max_tokens=4, prompt_logprobs=0, n=2)
    lengths[0] = RowLength.of([EngineRequest(request_id="", prompt_token_ids=(5,) * 31, params=scored)], 100)
    lengths[1] = RowLength.of([request(10, 4)], 100)
    workload = lengths.measured(100).workload
    assert workload.num_requests == 3 and workload.scored_tokens == 10  # 30 of three samples
    assert workload.rows_per_prompt == 1.5
    assert Lengths(1).measured(100).workload.scored_tokens == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tokenizer_that_cannot_be_built_is_the_users_error_where_there_is_text(workers, rows, tmp_path):
    (tmp_path / "tokenizer.json").write_text("")
    with contextlib.closing(preflight(rows([{"prompt": [5, 6]}]), make_setup(str(tmp_path)), workers=workers)) as found:
        assert not list(found.refused())
    with pytest.raises(FlexMoEError, match="tokenizer.json' is empty") as refusal:
        preflight(rows([{"prompt": [5, 6]}, {"prompt": "hello"}]), make_setup(str(tmp_path)), workers=workers)
    assert refusal.value.exit_code == 65


# Rows that name no limit.

CHAT = {"messages": [{"role": "user", "content": "hello world"}]}


def test_chats_without_a_limit_may_take_the_rest_of_the_context_and_prompts_32_tokens(rows, tokenizer_directory):
    given = [CHAT, CHAT | {"max_tokens": 9}, {"prompt": [5] * 4}, CHAT | {"n": 3}]
    [chat, limited, prompt, several], _ = found(rows(given), make_setup(tokenizer_directory, default_max_tokens=None))
    length = chat[0]
    assert chat == (length, CONTEXT - length, CONTEXT) and limited == (length, 9, length + 9)
    assert prompt == (4, 32, 36) and several == (length, 3 * (CONTEXT - length), CONTEXT)
    sizes, _ = found(rows(given), make_setup(tokenizer_directory, default_max_tokens=7))
    assert [new for _, new, _ in sizes] == [7, 9, 7, 21], "a default that is given is for all"


def test_processes_say_which_rows_are_open(rows, tokenizer_directory):
    given, setup = rows([CHAT, {"prompt": "x"}] * 30), make_setup(tokenizer_directory, default_max_tokens=None)
    measured = []
    for workers in (0, 2):
        with contextlib.closing(preflight(given, setup, workers=workers)) as looked:
            measured.append(looked.lengths.measured(CONTEXT))
    assert measured[0] == measured[1] and measured[0].open_rows == 30


def open_lengths(**options):
    lengths = Lengths(4, **options)
    lengths[0] = RowLength.of([request(100, None)], 131_072)
    lengths[1] = RowLength.of([request(50, None, n=2)], 131_072)
    lengths[3] = RowLength.of([request(40, 60)], 131_072)
    return lengths


@pytest.mark.parametrize("tokens", [256, 77, 5000])
def test_a_plan_counts_an_open_row_with_what_is_expected_of_it(tokens):
    lengths = open_lengths(open_tokens=tokens)
    measured = lengths.measured(131_072)
    assert (measured.rows, measured.open_rows, measured.open_tokens, measured.longest_open) == (4, 3, tokens, 131_072)
    assert measured.workload.lengths == ((40, 60, 1), (50, tokens, 2), (100, tokens, 1))
    assert measured.longest_row == measured.workload.longest_row == 100 + max(OPEN_ROOM_TOKENS, tokens)
    assert f"expects {tokens} tokens" in measured.open_lines()[0] and "3 of 4 completions" in measured.open_lines()[0]
    assert sum(lengths.new_tokens) == 131_072 - 100 + 2 * (131_072 - 50) + 60, "what they may have at most"


def test_an_open_row_is_left_out_only_where_its_prompt_has_no_room():
    lengths = open_lengths()
    assert lengths.sizes() == [51, 100, 101, 306, 356, 2098, 2148]
    for longest, left in ((2148, 4), (101, 4), (100, 3), (99, 2), (50, 0)):
        measured = lengths.measured(131_072, longest)
        assert (measured.rows, measured.longest_row) == (left, longest if left else 2)
    assert lengths.measured(131_072, 101).workload.lengths == ((40, 60, 1), (50, 51, 2), (100, 1, 1))


def test_an_open_row_is_expected_within_the_context():
    lengths = Lengths(1)
    lengths[0] = RowLength.of([request(100, None)], 150)
    measured = lengths.measured(150)
    assert measured.workload.lengths == ((100, 50, 1),) and measured.longest_row == measured.longest_open == 150


def test_rows_with_limits_say_nothing_of_open_ones():
    lengths = Lengths(1)
    lengths[0] = RowLength.of([request(100, 4)], 150)
    assert lengths.measured(150).open_lines() == []
