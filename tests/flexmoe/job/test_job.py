"""A job from its input to its output: order, error rows, what is left on the disk, and what is refused before any work."""

import errno
import os

import pytest

from flexmoe.errors import DataError, InputMissingError, StorageError, UsageError
from flexmoe.inputs.options import InputOptions
from flexmoe.job.job import Job
from flexmoe.job.output_files import default_error_path
from flexmoe.job.shards import Shard
from flexmoe.preflight.prepare import Preparer
from policies.common import file_io
from tests.support.fake_engine import EOS, FakeEngine
from tests.support.jobs import body, fault, make_setup
from tests.support.tokenizers import build_tokenizer

pytestmark = pytest.mark.usefixtures("quick_disk")
FINISHED = ["in.jsonl", "out.jsonl", "out.jsonl.flexmoe"]


def test_outputs_are_in_input_order_though_rows_finish_out_of_order(runner):
    runner.write([{"prompt": [10] * (1 + 7 * i % 20), "custom_id": f"c{i}"} for i in range(20)])
    report = runner.run(FakeEngine(window=6))
    assert [line["custom_id"] for line in runner.lines()] == [f"c{i}" for i in range(20)]
    assert (report.rows_ok, report.rows_failed, runner.failed()) == (20, 0, None)


def test_a_completion_has_the_engines_ids_and_the_time_of_the_job(runner, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    runner.write([{"prompt": [20, 21], "return_token_ids": True}, {"prompt": [20, 21, 22], "max_tokens": 2}])
    report = runner.run()
    one, two = map(body, runner.lines())
    assert one["choices"][0]["token_ids"] == [21, 20, EOS] and one["created"] == 1700000000
    assert one["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5} | {
        "prompt_tokens_details": {"cached_tokens": 0}
    }
    assert [c["choices"][0]["finish_reason"] for c in (one, two)] == ["stop", "length"]
    assert (report.prompt_tokens, report.generated_tokens) == (5, 5)


def test_prompts_and_samples_of_a_row_are_choices_in_order(runner):
    runner.write([{"prompt": [[10], [11, 12]], "n": 2, "return_token_ids": True, "logprobs": 1}])
    runner.run(FakeEngine(window=1))
    choices = body(runner.lines()[0])["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert [c["token_ids"][:-1] for c in choices] == [[10], [11], [12, 11], [13, 12]]


def test_rows_without_a_limit_get_the_default(runner):
    runner.write([{"prompt": [9]}, {"prompt": [9], "max_tokens": 3}])
    engine = FakeEngine()
    runner.run(engine)
    assert sorted(request.params.max_tokens for request in engine.pulled) == [3, 50]


def test_text_prompts_reach_the_engine_as_the_tokenizers_ids_named_by_their_row(runner):
    runner.write([{"prompt": "hello world", "custom_id": "x"}])
    engine = FakeEngine()
    runner.run(engine)
    [request] = engine.pulled
    assert request.prompt_token_ids == runner.setup.preparer().tokenizer.encode("hello world")
    assert (request.request_id, request.stream_key) == ("0/0", "x/0")


def test_requests_are_pulled_only_as_the_engine_asks_and_the_longest_of_a_window_first(runner):
    runner.write([{"prompt": [10 + i] * (1 + i % 5)} for i in range(50)])
    engine = FakeEngine(window=2)
    runner.run(engine)
    assert engine.most_in_flight == 2 and len(engine.pulled) == 50
    lengths = [len(request.prompt_token_ids) for request in engine.pulled]
    assert lengths == sorted(lengths, reverse=True)


def test_a_row_that_cannot_run_goes_to_the_error_file_only(runner):
    runner.write([{"prompt": [9]}, {"prompt": [9], "tools": [{}]}, {"prompt": [9] * CONTEXT_AND_MORE}, {"prompt": [9]}])
    report = runner.run()
    assert [line["custom_id"] for line in runner.lines()] == ["row-1", "row-4"]
    unsupported, too_long = runner.failed()
    assert set(unsupported) == {"id", "custom_id", "response", "error"} and unsupported["custom_id"] == "row-2"
    assert fault(unsupported)["code"] == "unsupported_field" and "tools" in fault(unsupported)["message"]
    assert unsupported["response"]["status_code"] == 400
    assert fault(too_long)["code"] == "context_length_exceeded"
    assert (report.rows_ok, report.rows_failed) == (2, 2) and report.error_path.name == "out.errors.jsonl"


CONTEXT_AND_MORE = 201


def test_a_row_that_there_is_no_room_for_is_an_error_row_before_the_first_one_runs(runner, caplog):
    runner.write([{"prompt": [9]}, {"prompt": [9] * 6}, {"prompt": [[9], [9] * 7]}])
    found = []

    def on_sweep_start(_):
        found.append(caplog.text)

    engine = FakeEngine(longest=5, room=54, on_sweep_start=on_sweep_start)
    report = runner.run(engine)
    assert len(engine.pulled) == 1 and "2 of 3 rows cannot run" in found[0]
    assert [fault(e)["code"] for e in runner.failed()] == ["cannot_run"] * 2 and report.rows_failed == 2
    assert "6 tokens" in fault(runner.failed()[0])["message"]


def test_a_row_that_the_engine_fails_has_no_response(runner):
    runner.write([{"prompt": [30]}, {"prompt": [[31], [32]]}])
    report = runner.run(FakeEngine(fail=[32]))
    assert [line["custom_id"] for line in runner.lines()] == ["row-1"]
    [failed] = runner.failed()
    assert failed["response"] is None and failed["error"] == {"code": "engine_error", "message": "the device was lost"}
    assert report.generated_tokens == 2


def test_a_chat_without_a_template_fails_only_its_row(runner, tmp_path):
    build_tokenizer(tmp_path / "bare", chat_template=None)
    runner.write([{"messages": [{"role": "user", "content": "a"}]}, {"prompt": "hello"}])
    runner.run(setup=make_setup(str(tmp_path / "bare")))
    assert len(runner.lines()) == 1 and "chat template" in fault(runner.failed()[0])["message"]


def test_without_tokenizer_files_token_ids_still_work(runner, tmp_path):
    runner.write([{"prompt": "hello"}, {"prompt": [9, 10]}])
    runner.run(setup=make_setup(None))
    [choice] = body(runner.lines()[0])["choices"]
    assert choice["token_ids"] == [10, 9, EOS]
    [failed] = runner.failed()
    assert failed["custom_id"] == "row-1" and "no tokenizer files" in fault(failed)["message"]


def test_a_row_that_is_refused_only_the_second_time_is_an_error_row(runner, monkeypatch):
    """A chat template may call the clock, or whatever else it likes."""
    runner.write([{"prompt": "hello"}, {"prompt": [9]}])
    calls, real = [], Preparer.prepare_each

    def prepare_each(preparer, rows):
        calls.extend(row for row, _ in rows)
        again = calls.count(0) == 2
        return real(preparer, [(row, with_error(r) if again and row == 0 else r) for row, r in rows])

    monkeypatch.setattr(Preparer, "prepare_each", prepare_each)
    report = runner.run()
    assert (report.rows_ok, report.rows_failed) == (1, 1) and sorted(calls) == [0, 0, 1, 1]
    assert fault(runner.failed()[0])["message"] == "not today"


def with_error(request):
    from dataclasses import replace

    from flexmoe.openai.fields import RowError

    return replace(request, error=RowError(code="invalid_prompt", message="not today"))


def test_a_job_of_failed_rows_only_needs_no_engine_and_leaves_an_empty_output(runner):
    runner.write([{"prompt": [9], "n": 0}])
    engine = FakeEngine()
    report = runner.run(engine)
    assert engine.pulled == [] and report.rows_ok == 0 and len(runner.failed()) == 1
    assert runner.output.read_bytes() == b""


def test_a_structural_fault_fails_the_job_before_any_work_or_becomes_an_error_row(runner):
    runner.input.write_text('{"prompt": [9], "custom_id": "a"}\n{"prompt": }\n{"prompt": [9], "custom_id": "a"}\n')
    engine = FakeEngine()
    with pytest.raises(DataError, match="line 2"):
        runner.run(engine)
    assert engine.pulled == [] and runner.names() == ["in.jsonl"]
    report = runner.run(engine, files={"options": InputOptions(on_invalid="record")})
    assert (report.rows_ok, report.rows_failed) == (1, 2)
    assert len({line["custom_id"] for line in (*runner.lines(), *runner.failed())}) == 3


def test_a_job_done_twice_writes_the_same_bytes(runner, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    runner.write([{"prompt": [9 + i]} for i in range(5)] + [{"prompt": [9], "n": 0}])
    runner.run(FakeEngine(window=1))
    first = runner.output.read_bytes(), runner.errors.read_bytes()
    runner.run(FakeEngine(window=4), files={"overwrite": True})
    assert first == (runner.output.read_bytes(), runner.errors.read_bytes())
    assert len({line["id"] for line in runner.lines()}) == 5


def test_ids_follow_the_input_and_the_identity(runner):
    ids = set()
    for prompt, identity in ((9, {}), (8, {}), (8, {"seed": 1})):
        runner.write([{"prompt": [prompt]}])
        runner.run(files={"overwrite": True}, identity=identity)
        ids.add(runner.lines()[0]["id"])
    assert len(ids) == 3


def test_a_bad_source_date_epoch_is_a_usage_error(runner, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    runner.write([{"prompt": [9]}])
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        runner.run()


def test_the_error_file_may_be_named(runner, tmp_path):
    runner.write([{"prompt": [9], "n": 0}])
    report = runner.run(files={"errors": tmp_path / "bad.jsonl"})
    assert runner.failed() is None and report.error_path == tmp_path / "bad.jsonl"


def test_the_error_file_is_named_after_the_output():
    assert default_error_path("a/out.jsonl").as_posix() == "a/out.errors.jsonl"
    assert default_error_path("results.v1").name == "results.v1.errors.jsonl"


def test_a_finished_job_leaves_its_files_and_a_manifest(runner):
    runner.write([{"prompt": [9]}, {"prompt": [9], "n": 0}])
    runner.run()
    assert runner.names() == ["in.jsonl", "out.errors.jsonl", "out.jsonl", "out.jsonl.flexmoe"]
    assert [path.name for path in runner.work.iterdir()] == ["manifest.json"]


def test_a_finished_job_is_not_done_again(runner):
    runner.write([{"prompt": [9]}, {"prompt": [9], "n": 0}])
    first, before = runner.run(), runner.output.stat().st_ino
    engine = FakeEngine()
    again = runner.run(engine)
    assert again.was_finished and engine.pulled == [] and runner.output.stat().st_ino == before
    assert (again.rows_ok, again.rows_failed, again.generated_tokens, again.error_path) == (
        first.rows_ok,
        first.rows_failed,
        first.generated_tokens,
        first.error_path,
    )


def test_an_output_that_is_not_the_jobs_is_kept_until_overwrite_is_given(runner):
    runner.write([{"prompt": [9]}])
    runner.output.write_text("old")
    runner.errors.write_text("old errors")
    with pytest.raises(UsageError, match="overwrite=True"):
        runner.run()
    with pytest.raises(RuntimeError, match="engine crashed"):
        runner.run(FakeEngine(crash_at=[1]), files={"overwrite": True})
    assert (runner.output.read_text(), runner.errors.read_text()) == ("old", "old errors")
    runner.run()  # goes on, and need not be told again
    assert len(runner.lines()) == 1 and runner.failed() is None


def test_the_shards_of_a_job_have_all_its_rows(runner, tmp_path):
    runner.write([{"prompt": [9 + i], "custom_id": f"c{i}"} for i in range(7)])
    found = []
    for index in range(3):
        runner.run(files={"shard": Shard(index=index, count=3)})
        runner.output = tmp_path / f"out.shard-{index}-of-3.jsonl"
        found.append([line["custom_id"] for line in runner.lines()])
        runner.output = tmp_path / "out.jsonl"
    assert found == [["c0", "c3", "c6"], ["c1", "c4"], ["c2", "c5"]]


def test_a_shard_without_rows_has_an_empty_output(runner, tmp_path):
    runner.write([{"prompt": [9]}])
    report = runner.run(files={"shard": Shard(index=1, count=2)})
    assert (report.rows_ok, report.rows_failed) == (0, 0)
    assert (tmp_path / "out.shard-1-of-2.jsonl").read_bytes() == b""


def test_an_engine_that_forgets_a_row_is_noticed(runner):
    class Forgetful(FakeEngine):
        def stream(self, requests, on_sweep=None):
            return iter(list(super().stream(requests, on_sweep))[1:])

    runner.write([{"prompt": [9]}, {"prompt": [10]}])
    with pytest.raises(RuntimeError, match="1 rows unanswered"):
        runner.run(Forgetful())
    assert not runner.output.exists()


def test_run_before_look_and_publish_before_run_are_refused(runner):
    runner.write([{"prompt": [9]}])
    with Job(runner.files(), runner.setup) as job:
        with pytest.raises(UsageError, match="look"):
            job.run(FakeEngine())
        with pytest.raises(UsageError, match="1 rows have no line"):
            job.publish()


# What is refused before any work.


@pytest.fixture
def refused(runner):
    """Shows that a job over one row is refused, before anything is made."""
    runner.write([{"prompt": [9]}])

    def call(kind, match, **files):
        with pytest.raises(kind, match=match):
            runner.run(files=files)
        assert runner.work.exists() is False

    return call


def test_a_missing_input_is_reported_as_such(refused, tmp_path):
    refused(InputMissingError, "does not exist", input=tmp_path / "none.jsonl")


def test_the_output_may_not_replace_the_input(refused, runner, tmp_path):
    (tmp_path / "soft.jsonl").symlink_to(runner.input)
    (tmp_path / "hard.jsonl").hardlink_to(runner.input)
    for output in (runner.input, tmp_path / "." / "in.jsonl", tmp_path / "soft.jsonl", tmp_path / "hard.jsonl"):
        refused(UsageError, "input file and the output file", output=output)


def test_the_error_file_may_replace_neither_input_nor_output(refused, runner):
    refused(UsageError, "input file and the error file", errors=runner.input)
    refused(UsageError, "output file and the error file", errors=runner.output)


def test_an_output_in_no_directory_is_refused(refused, tmp_path):
    refused(StorageError, "there is no directory", output=tmp_path / "none" / "out.jsonl")


@pytest.mark.parametrize("target", [".", os.devnull])
def test_an_output_that_is_no_regular_file_is_refused(refused, tmp_path, target):
    refused(UsageError, "no regular file", output=tmp_path / target)


@pytest.mark.parametrize("which", ["output", "errors"])
def test_a_read_only_directory_is_refused(refused, tmp_path, monkeypatch, which):
    locked = tmp_path / "locked"
    locked.mkdir()
    real = os.open

    def read_only(path, flags, *mode, **options):
        if flags & os.O_CREAT and str(path).startswith(str(locked)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *mode, **options)

    # The tests may run as root, whom no permission bit stops.
    monkeypatch.setattr(file_io.os, "open", read_only)
    refused(StorageError, "Read-only file system", **{which: locked / "o.jsonl"})


def test_an_output_link_keeps_pointing_at_what_it_pointed_at(runner, tmp_path):
    (tmp_path / "real").mkdir()
    runner.output.symlink_to(tmp_path / "real" / "out.jsonl")
    runner.write([{"prompt": [9]}])
    runner.run()
    assert runner.output.is_symlink() and len(runner.lines()) == 1
    assert (tmp_path / "real" / "out.jsonl.flexmoe").is_dir()


@pytest.mark.parametrize("change", ["append", "same size"])
def test_an_input_that_changes_while_the_job_runs_stops_it(runner, change):
    runner.write([{"prompt": [9]}] * 60)

    def meddle(_):
        text = runner.input.read_text()
        runner.input.write_text(text + '{"prompt": [1]}\n' if change == "append" else text.replace("9", "7"))

    with pytest.raises(DataError, match="changed while the job was running"):
        runner.run(FakeEngine(window=1, on_sweep_start=meddle))
    assert not runner.output.exists()


def test_no_bar_is_drawn_when_there_is_none(runner, capsys):
    runner.write([{"prompt": [9]}])
    runner.run()
    assert capsys.readouterr() == ("", "")
    runner.run(bar=True, files={"overwrite": True})
    assert "1/1 rows" in capsys.readouterr().err


def test_text_that_is_not_ascii_is_written_readably(runner):
    ids = runner.setup.preparer().tokenizer.encode("日本")[1:]
    runner.write([{"prompt": list(reversed(ids)), "custom_id": "größe"}])
    runner.run()
    text = runner.output.read_text(encoding="utf-8")
    assert "日本" in text and "größe" in text
