import errno
import json
import os

import pytest

from flexmoe import output_files, spool
from flexmoe.errors import DataError, InputMissingError, StorageError, UsageError
from flexmoe.job import check_job, run_job
from flexmoe.output_files import default_error_path
from flexmoe.params import CompletionOutput, RequestOutput
from flexmoe.tokenizer import Tokenizer
from tests.test_tokenizer import build_tokenizer

EOS = 2


class FakeEngine:
    """Answers each prompt with its ids reversed and EOS, newest request first, `window` in flight."""

    def __init__(self, window=3, longest=1000, fail=(), crash_after=None):
        self.window, self.longest, self.fail, self.crash_after = window, longest, set(fail), crash_after
        self.pulled, self.most_ahead = [], 0

    def check(self, request):
        if len(request.prompt_token_ids) > self.longest:
            return f"the prompt has {len(request.prompt_token_ids)} tokens and the context {self.longest}; shorten it"
        return None

    def stream(self, requests):
        waiting, answered = [], 0
        for request in requests:
            self.pulled.append(request)
            waiting.append(request)
            self.most_ahead = max(self.most_ahead, len(self.pulled) - answered)
            if len(waiting) == self.window:
                answered += 1
                yield self.answer(waiting.pop())
            if self.crash_after is not None and answered >= self.crash_after:
                raise RuntimeError("engine crashed")
        while waiting:
            yield self.answer(waiting.pop())

    def answer(self, request):
        ids = request.prompt_token_ids
        tokens = (*[i for i in reversed(ids) if i > EOS], EOS)
        reason = "stop"
        if request.params.ignore_eos or len(tokens) > request.params.max_tokens:
            tokens, reason = tokens[: request.params.max_tokens], "length"
        error = "the device was lost" if ids[-1] in self.fail else None
        outputs = [CompletionOutput(index=0, text=None, token_ids=tokens, finish_reason=reason)]
        return RequestOutput(
            request_id=request.request_id, prompt=None, prompt_token_ids=ids, outputs=[] if error else outputs,
            finished=True, error=error,
        )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(directory)
    return Tokenizer.load(directory)


@pytest.fixture
def run(tmp_path, tokenizer):
    """Runs a job over `rows` and returns (report, output lines, error lines or None)."""

    def call(rows, llm=None, **options):
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"tokenizer": tokenizer, "default_max_tokens": 50} | options
        report = run_job(path, tmp_path / "out.jsonl", llm or FakeEngine(), **options)
        errors = tmp_path / "out.errors.jsonl"
        return report, read(tmp_path / "out.jsonl"), read(errors) if errors.exists() else None

    return call


def read(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def body(line):
    return line["response"]["body"]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_outputs_are_in_input_order_though_rows_finish_out_of_order(run):
    report, lines, errors = run([{"prompt": [10 + i], "custom_id": f"c{i}"} for i in range(20)], FakeEngine(window=6))
    assert [line["custom_id"] for line in lines] == [f"c{i}" for i in range(20)]
    assert (report.rows_ok, report.rows_failed, errors) == (20, 0, None)


def test_completion_line_is_an_openai_batch_output(run, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    _, [line], _ = run([{"prompt": "hello", "model": "m"}])
    assert set(line) == {"id", "custom_id", "response", "error"} and line["error"] is None
    assert line["id"].startswith("batch_req_") and line["response"]["status_code"] == 200
    assert line["response"]["request_id"].startswith("req_")
    answer = body(line)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert (answer["model"], answer["created"]) == ("m", 1700000000)
    [choice] = answer["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"} and choice["finish_reason"] == "stop"


def test_chat_line_holds_the_assistants_message(run, tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages}}
    _, [line], _ = run([row], model_name="the-model")
    answer = body(line)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "the-model"
    message = answer["choices"][0]["message"]
    expected = tokenizer.decode([i for i in reversed(tokenizer.encode_chat(messages)) if i > EOS])
    assert message == {"role": "assistant", "content": expected}


def test_usage_counts_every_token_of_every_choice(run):
    report, [one, two], _ = run([{"prompt": [[5, 6], [7]]}, {"prompt": [8, 9, 10], "max_tokens": 2}])
    assert body(one)["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert body(two)["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (report.prompt_tokens, report.generated_tokens) == (6, 7)


def test_list_of_prompts_gives_a_choice_each_in_order(run):
    _, [line], _ = run([{"prompt": [[10], [11], [12], [13]], "return_token_ids": True}])
    choices = body(line)["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert [c["prompt_token_ids"] for c in choices] == [[10], [11], [12], [13]]


def test_token_ids_include_the_eos_and_the_text_does_not(run, tokenizer):
    ids = tokenizer.encode("hello")[1:]
    _, [line, plain], _ = run([{"prompt": list(ids), "return_token_ids": True}, {"prompt": [9]}])
    [choice] = body(line)["choices"]
    assert choice["token_ids"] == [*reversed(ids), EOS] and choice["prompt_token_ids"] == list(ids)
    assert choice["text"] == tokenizer.decode(tuple(reversed(ids)))
    assert "token_ids" not in body(plain)["choices"][0]


def test_stop_token_that_is_not_special_is_left_out_of_the_text(run, tokenizer):
    class StopsOnTen(FakeEngine):
        def answer(self, request):
            output = CompletionOutput(index=0, text=None, token_ids=(20, 10), finish_reason="stop")
            return RequestOutput(
                request_id=request.request_id, prompt=None, prompt_token_ids=request.prompt_token_ids,
                outputs=[output], finished=True,
            )  # fmt: skip

    engine = StopsOnTen()
    _, [line], _ = run([{"prompt": [9], "stop_token_ids": [10]}], engine)
    assert body(line)["choices"][0]["text"] == tokenizer.decode((20,))
    assert engine.pulled[0].params.stop_token_ids == (10,)


def test_row_at_its_limit_keeps_all_its_text(run, tokenizer):
    _, [line], _ = run([{"prompt": [20, 21, 22], "max_tokens": 2}])
    [choice] = body(line)["choices"]
    assert choice["finish_reason"] == "length" and choice["text"] == tokenizer.decode((22, 21))


def test_rows_without_a_limit_get_the_default(run):
    engine = FakeEngine()
    run([{"prompt": [9]}, {"prompt": [9], "max_tokens": 3}], engine, default_max_tokens=17)
    assert [request.params.max_tokens for request in engine.pulled] == [17, 3]


def test_text_prompts_reach_the_engine_as_the_tokenizers_ids(run, tokenizer):
    engine = FakeEngine()
    run([{"prompt": "hello world"}], engine)
    assert engine.pulled[0].prompt_token_ids == tokenizer.encode("hello world")


def test_requests_are_pulled_only_as_the_engine_asks(run):
    engine = FakeEngine(window=2)
    run([{"prompt": [10 + i]} for i in range(50)], engine)
    assert engine.most_ahead == 2 and len(engine.pulled) == 50


def test_unsupported_row_goes_to_the_error_file_only(run):
    report, lines, errors = run([{"prompt": [9]}, {"prompt": [9], "temperature": 0.7}, {"prompt": [9]}])
    assert [line["custom_id"] for line in lines] == ["row-1", "row-3"]
    [error] = errors
    assert set(error) == {"id", "custom_id", "response", "error"} and error["custom_id"] == "row-2"
    assert error["error"]["code"] == "unsupported_request" and "temperature" in error["error"]["message"]
    assert error["response"]["status_code"] == 400
    assert (report.rows_ok, report.rows_failed) == (2, 1) and report.error_path.name == "out.errors.jsonl"


def test_row_that_can_never_run_is_an_error_row_before_the_job_starts(run):
    class Strict(FakeEngine):
        checks_done = False

        def stream(self, requests):
            self.checked_at_start = len(self.checked)
            return super().stream(requests)

        def check(self, request):
            self.checked = [*getattr(self, "checked", []), request]
            return super().check(request)

    engine = Strict(longest=4)
    report, lines, errors = run([{"prompt": [9]}, {"prompt": [9] * 5}, {"prompt": [[9], [9] * 6, [8]]}], engine)
    assert engine.checked_at_start == 4 and len(engine.pulled) == 1 and len(lines) == 1
    assert [e["error"]["code"] for e in errors] == ["cannot_run"] * 2 and "5 tokens" in errors[0]["error"]["message"]
    assert report.rows_failed == 2


def test_row_that_the_engine_fails_has_no_response(run):
    report, lines, errors = run([{"prompt": [30]}, {"prompt": [[31], [32]]}], FakeEngine(fail=[32]))
    assert [line["custom_id"] for line in lines] == ["row-1"]
    assert errors[0]["response"] is None
    assert errors[0]["error"] == {"code": "engine_error", "message": "the device was lost"}
    assert report.generated_tokens == 2


def test_chat_without_a_template_fails_only_its_row(run, tmp_path):
    build_tokenizer(tmp_path / "bare", chat_template=None)
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"prompt": "hello"}]
    _, lines, errors = run(rows, tokenizer=Tokenizer.load(tmp_path / "bare"))
    assert len(lines) == 1 and "chat template" in errors[0]["error"]["message"]


def test_without_tokenizer_files_token_ids_still_work(run, tmp_path):
    rows = [{"prompt": "hello"}, {"prompt": [9, 10], "return_token_ids": True}]
    _, [line], [error] = run(rows, tokenizer=Tokenizer.load(tmp_path))
    [choice] = body(line)["choices"]
    assert choice["text"] is None and choice["token_ids"] == [10, 9, EOS]
    assert error["custom_id"] == "row-1" and "no tokenizer files" in error["error"]["message"]


def test_prompt_without_tokens_is_an_error_row(run, tokenizer, tmp_path):
    class Silent(Tokenizer):
        def encode(self, text):
            return ()

    _, lines, errors = run([{"prompt": ""}], tokenizer=Silent(None, "here"))
    assert lines == [] and "no tokens" in errors[0]["error"]["message"]


def test_job_of_failed_rows_only_leaves_an_empty_output(run, tmp_path):
    report, lines, errors = run([{"prompt": [9], "n": 2}])
    assert lines == [] and len(errors) == 1 and report.rows_ok == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_repeated_job_writes_the_same_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    rows = [{"prompt": [9 + i]} for i in range(5)] + [{"prompt": [9], "n": 2}]
    run(rows, FakeEngine(window=1))
    first = (tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.errors.jsonl").read_bytes()
    run(rows, FakeEngine(window=4))
    assert first == ((tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.errors.jsonl").read_bytes())
    ids = [line["id"] for line in read(tmp_path / "out.jsonl")]
    assert len(set(ids)) == 5


def test_ids_follow_the_input(run):
    _, [one], _ = run([{"prompt": [9]}])
    _, [two], _ = run([{"prompt": [8]}])
    assert one["id"] != two["id"]


def test_bad_source_date_epoch_is_a_usage_error(run, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        run([{"prompt": [9]}])


def test_stale_error_file_is_removed(run, tmp_path):
    (tmp_path / "out.errors.jsonl").write_text("old")
    _, _, errors = run([{"prompt": [9]}])
    assert errors is None


def test_error_file_may_be_named(run, tmp_path):
    report, _, errors = run([{"prompt": [9], "n": 2}], error_path=tmp_path / "bad.jsonl")
    assert errors is None and len(read(tmp_path / "bad.jsonl")) == 1
    assert report.error_path.name == "bad.jsonl"


def test_error_file_is_named_after_the_output():
    assert default_error_path("a/out.jsonl").as_posix() == "a/out.errors.jsonl"
    assert default_error_path("results.v1").name == "results.v1.errors.jsonl"


def test_finished_job_leaves_only_its_files(run, tmp_path):
    run([{"prompt": [9]}, {"prompt": [9], "n": 2}])
    assert names(tmp_path) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]


def test_crash_keeps_the_old_output_and_leaves_nothing_else(run, tmp_path):
    (tmp_path / "out.jsonl").write_text("old")
    (tmp_path / "out.errors.jsonl").write_text("old errors")
    with pytest.raises(RuntimeError, match="engine crashed"):
        run([{"prompt": [9 + i]} for i in range(9)], FakeEngine(crash_after=3))
    assert names(tmp_path) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert (tmp_path / "out.errors.jsonl").read_text() == "old errors"


def test_interrupt_leaves_nothing_half_written(run, tmp_path):
    class Interrupted(FakeEngine):
        def answer(self, request):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([{"prompt": [9]}], Interrupted())
    assert names(tmp_path) == ["in.jsonl"]


def test_full_disk_at_the_end_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output_files.os, "fsync", fsync)
    with pytest.raises(StorageError, match="No space left"):
        run([{"prompt": [9]}])
    assert names(tmp_path) == ["in.jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_under_the_spool_is_a_storage_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b", buffering=0))
    with pytest.raises(StorageError, match="No space left"):
        run([{"prompt": [9]}])
    assert names(tmp_path) == ["in.jsonl"]


def test_engine_that_forgets_a_row_is_noticed(run, tmp_path):
    class Forgetful(FakeEngine):
        def stream(self, requests):
            return iter(list(super().stream(requests))[1:])

    with pytest.raises(RuntimeError, match="1 rows unanswered"):
        run([{"prompt": [9]}, {"prompt": [10]}], Forgetful())
    assert names(tmp_path) == ["in.jsonl"]


def test_malformed_line_fails_the_job_before_any_work(tmp_path, tokenizer):
    path, engine = tmp_path / "in.jsonl", FakeEngine()
    path.write_text('{"prompt": [9]}\n{"prompt": [9], "max_tokens": 0}\n')
    for call in (
        lambda: check_job(path, tmp_path / "out.jsonl"),
        lambda: run_job(path, tmp_path / "out.jsonl", engine, tokenizer=tokenizer, default_max_tokens=5),
    ):
        with pytest.raises(DataError, match="line 2: max_tokens is 0"):
            call()
    assert engine.pulled == [] and names(tmp_path) == ["in.jsonl"]


def test_check_counts_the_requests_and_writes_nothing(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": [9]}\n\n{"prompt": "a"}\n')
    assert check_job(path, tmp_path / "out.jsonl") == 2
    assert names(tmp_path) == ["in.jsonl"]


@pytest.fixture
def input_path(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": [9]}\n')
    return path


def test_missing_input_is_reported_as_such(tmp_path):
    with pytest.raises(InputMissingError, match="does not exist"):
        check_job(tmp_path / "none.jsonl", tmp_path / "out.jsonl")


def test_output_may_not_replace_the_input(input_path, tmp_path):
    (tmp_path / "soft.jsonl").symlink_to(input_path)
    (tmp_path / "hard.jsonl").hardlink_to(input_path)
    for output in (input_path, tmp_path / "." / "in.jsonl", tmp_path / "soft.jsonl", tmp_path / "hard.jsonl"):
        with pytest.raises(UsageError, match="input file and the output file"):
            check_job(input_path, output)


def test_error_file_may_replace_neither_input_nor_output(input_path, tmp_path):
    with pytest.raises(UsageError, match="input file and the error file"):
        check_job(input_path, tmp_path / "out.jsonl", input_path)
    with pytest.raises(UsageError, match="output file and the error file"):
        check_job(input_path, tmp_path / "out.jsonl", tmp_path / "out.jsonl")


def test_output_in_no_directory_is_refused(input_path, tmp_path):
    with pytest.raises(StorageError, match="there is no directory"):
        check_job(input_path, tmp_path / "none" / "out.jsonl")


@pytest.mark.parametrize("target", [".", os.devnull])
def test_output_that_is_no_regular_file_is_refused(input_path, tmp_path, target):
    with pytest.raises(UsageError, match="no regular file"):
        check_job(input_path, tmp_path / target)


@pytest.mark.parametrize("which", ["output", "error"])
def test_read_only_directory_is_refused_before_any_work(input_path, tmp_path, monkeypatch, which):
    locked = tmp_path / "locked"
    locked.mkdir()
    real_open = open

    def read_only(path, mode="r", *rest, **options):
        if "x" in mode and str(path).startswith(str(locked)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real_open(path, mode, *rest, **options)

    # The tests may run as root, whom no permission bit stops.
    monkeypatch.setattr(output_files, "open", read_only, raising=False)
    paths = {"output": tmp_path / "out.jsonl", "error": tmp_path / "err.jsonl"} | {which: locked / "o.jsonl"}
    with pytest.raises(StorageError, match="Read-only file system"):
        check_job(input_path, paths["output"], paths["error"])


def test_output_link_keeps_pointing_at_what_it_pointed_at(run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "real" / "out.jsonl")
    run([{"prompt": [9]}])
    assert (tmp_path / "out.jsonl").is_symlink() and len(read(tmp_path / "real" / "out.jsonl")) == 1


def test_input_changed_while_the_job_runs_stops_it(run, tmp_path):
    class Meddler(FakeEngine):
        def stream(self, requests):
            with (tmp_path / "in.jsonl").open("a") as file:
                file.write('{"prompt": [1]}\n')
            return super().stream(requests)

    with pytest.raises(DataError, match="changed while the job was running"):
        run([{"prompt": [9]}], Meddler())


def test_no_bar_is_drawn_when_stderr_is_no_terminal(run, capsys):
    run([{"prompt": [9]}])
    assert capsys.readouterr() == ("", "")
    run([{"prompt": [9]}], progress=True)
    assert "1/1" in capsys.readouterr().err


def test_text_that_is_not_ascii_is_written_readably(run, tmp_path, tokenizer):
    ids = tokenizer.encode("日本")[1:]
    run([{"prompt": list(reversed(ids)), "custom_id": "größe"}])
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert "日本" in text and "größe" in text
