"""From a row to engine requests, or to the reason why it cannot run."""

import json

import pytest

from flexmoe.checkpoint.generation_config import SamplingDefaults
from flexmoe.errors import DataError
from flexmoe.openai.batch_line import parse_line
from flexmoe.openai.fields import RowError
from flexmoe.params import SamplingParams
from flexmoe.preflight.lengths import Measured
from flexmoe.preflight.prepare import MAX_CHOICES, Limits, Preparer
from flexmoe.preflight.served_model import ServedModel
from flexmoe.text.tokenizer import Tokenizer
from tests.support.tokenizers import build_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    return Tokenizer.load(tokenizer_directory)


@pytest.fixture
def preparer(tokenizer):
    def make(**changes):
        values = {"tokenizer": tokenizer, "limits": Limits(vocab_size=320, context=64), "default_max_tokens": 9}
        return Preparer(**values | changes)

    return make


def request(**row):
    return parse_line(json.dumps(row).encode(), 1)


def test_each_prompt_of_a_row_is_an_engine_request(preparer, tokenizer):
    parts = preparer().prepare(request(prompt=["a", "b c"], n=2, custom_id="x", seed=3), 7)
    assert [part.request_id for part in parts] == ["7/0", "7/1"]
    assert [part.stream_key for part in parts] == ["x/0", "x/1"]
    assert [part.prompt_token_ids for part in parts] == [tokenizer.encode("a"), tokenizer.encode("b c")]
    assert {part.params for part in parts} == {SamplingParams(n=2, seed=3, max_tokens=9)}


def test_draws_depend_on_the_row_and_not_on_its_place(preparer):
    row = request(prompt="a", custom_id="x")
    assert preparer().prepare(row, 0)[0].stream_key == preparer().prepare(row, 99)[0].stream_key


def test_chat_is_rendered_with_its_variables(tokenizer, preparer, tokenizer_directory):
    chat = request(**CHAT)
    assert (
        preparer().prepare(chat, 0)[0].prompt_token_ids
        == tokenizer.encode_all([tokenizer.render(chat.messages)], add_special_tokens=False)[0]
    )
    template = "{{ messages[0].content }}{{ mood }}"
    loud = Tokenizer.load(tokenizer_directory, chat_template=template)
    [part] = preparer(tokenizer=loud).prepare(request(**CHAT, chat_template_kwargs={"mood": "!"}), 0)
    assert tokenizer.decode(part.prompt_token_ids) == "hello!"


def test_prompt_is_written_as_its_row_says(tokenizer, preparer):
    bos = tokenizer.encode("")

    def ids(**row):
        return preparer().prepare(request(**row), 0)[0].prompt_token_ids

    plain = tokenizer.encode("a")[len(bos) :]
    assert (
        ids(prompt="a", add_special_tokens=False) == plain and ids(prompt="a", add_special_tokens=True) == bos + plain
    )
    assert ids(**CHAT, add_special_tokens=True) == bos + ids(**CHAT, add_special_tokens=False) == bos + ids(**CHAT)
    assert tokenizer.decode(ids(**CHAT)).endswith("hello[assistant]")
    closed = ids(**CHAT, add_generation_prompt=False)
    assert tokenizer.decode(closed).endswith("hello") and closed[-1] == 2
    assert ids(**CHAT, add_generation_prompt=False, continue_final_message=True) == closed[:-1]


def test_row_is_sampled_as_it_says_else_as_the_model_likes_else_greedily(preparer):
    defaults = SamplingDefaults.of({"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    [part] = preparer(defaults=defaults).prepare(request(prompt="a", temperature=0.2), 0)
    assert part.params == SamplingParams(temperature=0.2, top_p=0.9, max_tokens=9)
    [part] = preparer().prepare(request(prompt="a"), 0)
    assert part.params == SamplingParams(max_tokens=9)


def test_row_that_wants_more_tokens_than_it_may_have_is_refused(preparer):
    error = preparer().prepare(request(prompt="a", min_tokens=10), 0)
    assert (error.code, error.param) == ("invalid_value", "min_tokens")
    assert "at most max_tokens, which is 9" in error.message


def test_rows_prepared_together_are_as_one_by_one(preparer):
    rows = [
        request(prompt=["a", "b"]),
        request(prompt=[5, 6]),
        request(**CHAT),
        request(prompt="x", n=10**9),
        request(prompt=[[7], [8]]),
        request(prompt="a" * 500),
        request(messages=[{"role": "system", "content": "a"}] * 2),
        request(**CHAT, max_tokens=3),
        request(prompt=["c"]),
    ]
    together = preparer().prepare_all(list(enumerate(rows)))
    assert together == [preparer().prepare(row, number) for number, row in enumerate(rows)]
    assert [isinstance(parts, RowError) for parts in together] == [
        False,
        False,
        False,
        True,
        False,
        True,
        True,
        False,
        False,
    ]


class Recorder(Tokenizer):
    """Counts the characters that it is given together, and makes a token of so many of them."""

    characters = 1

    def encode_all(self, texts, *, add_special_tokens=True):
        self.given = [*getattr(self, "given", []), sum(map(len, texts))]
        return [(5,) * (len(text) // self.characters) for text in texts]


def test_of_a_text_that_is_far_too_long_only_a_beginning_is_tokenized(preparer, tokenizer_directory):
    recorder = Recorder.load(tokenizer_directory)
    for row in ({"prompt": "a " * 10**6}, {"prompt": ["b", "a " * 10**6]}):
        error = preparer(tokenizer=recorder).prepare(request(**row), 0)
        assert (error.code, error.param) == ("context_length_exceeded", "prompt")
        assert "more than 64 tokens, and the model's context is 64" in error.message
    assert max(recorder.given) < 2000


def test_a_long_text_of_few_tokens_is_tokenized_as_a_whole(preparer, tokenizer_directory):
    recorder = Recorder.load(tokenizer_directory)
    recorder.characters = 5000
    [part] = preparer(tokenizer=recorder).prepare(request(prompt="a" * 200_000), 0)
    assert len(part.prompt_token_ids) == 40 and max(recorder.given) == 200_000


def test_texts_are_tokenized_a_few_at_a_time(preparer, tokenizer_directory):
    recorder = Recorder.load(tokenizer_directory)
    recorder.characters = 100_000
    large = preparer(tokenizer=recorder, limits=Limits(vocab_size=320, context=100_000))
    parts = large.prepare(request(prompt=[str(1 + i) * 300_000 for i in range(9)]), 0)
    assert [len(part.prompt_token_ids) for part in parts] == [3] * 9 and 600_000 <= max(recorder.given) <= 2**20


def test_text_that_the_tokenizer_refuses_fails_only_its_row(preparer, tokenizer, tokenizer_directory):
    class Picky(Tokenizer):
        def encode_all(self, texts, *, add_special_tokens=True):
            if "bad" in texts:
                raise DataError("the tokenizer cannot encode this text")
            return super().encode_all(texts, add_special_tokens=add_special_tokens)

    picky = Picky.load(tokenizer_directory)
    rows = [request(prompt="good"), request(prompt=["good", "bad"]), request(prompt="fine")]
    results = preparer(tokenizer=picky).prepare_all(list(enumerate(rows)))
    assert [isinstance(parts, RowError) for parts in results] == [False, True, False]
    assert (results[1].code, results[1].param) == ("invalid_prompt", "prompt")


@pytest.mark.parametrize(
    ("row", "code", "param", "words"),
    [
        ({"prompt": [1] * 64}, "context_length_exceeded", "prompt", "64 tokens, and the model's context is 64"),
        ({"prompt": [[1], [1] * 99]}, "context_length_exceeded", "prompt", "99 tokens"),
        ({"prompt": [1] * 65, "echo": True, "max_tokens": 0}, "context_length_exceeded", "prompt", "65 tokens"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, "context_length_exceeded", "messages", "tokens"),
        ({"prompt": [5, 320]}, "invalid_prompt", "prompt", "token 320 of the prompt is outside the vocabulary of 320"),
        ({"prompt": "a", "max_tokens": 10**9}, "invalid_value", "max_tokens", "more than the model's context of 64"),
        ({"prompt": "a", "logit_bias": {"320": 1}}, "invalid_value", "logit_bias", "token 320, outside the vocabulary"),
        ({"prompt": "a", "stop_token_ids": [999]}, "invalid_value", "stop_token_ids", "outside the vocabulary"),
        ({"prompt": [[5]] * (MAX_CHOICES // 2 + 1), "n": 2}, "invalid_value", "n", f"at most {MAX_CHOICES}"),
        ({"prompt": "a", "temperature": -1}, "invalid_value", "temperature", "temperature is -1"),
        ({"prompt": "a", "stream": True}, "unsupported_field", "stream", "stream = true"),
    ],
)
def test_row_that_cannot_run_says_why(preparer, row, code, param, words):
    error = preparer().prepare(request(**row), 0)
    assert (error.code, error.param) == (code, param) and words in error.message


def test_prompt_may_fill_the_context_where_nothing_is_generated(preparer):
    [part] = preparer().prepare(request(prompt=[5] * 64, echo=True, max_tokens=0, logprobs=0), 0)
    assert part.params.max_tokens == 0 and part.params.scores_prompt == 0
    [part] = preparer().prepare(request(prompt=[5] * 63, max_tokens=64), 0)
    assert part.params.max_tokens == 64


def test_prompt_without_tokens_is_refused(preparer, tokenizer_directory):
    class Silent(Tokenizer):
        def encode_all(self, texts, *, add_special_tokens=True):
            return [()] * len(texts)

    error = preparer(tokenizer=Silent.load(tokenizer_directory)).prepare(request(prompt=""), 0)
    assert "no tokens" in error.message


def test_without_tokenizer_files_token_ids_still_run(preparer, tmp_path):
    bare = preparer(tokenizer=Tokenizer.load(tmp_path))
    assert bare.prepare(request(prompt=[5]), 0)[0].prompt_token_ids == (5,)
    for row, words in (
        ({"prompt": "a"}, "no tokenizer files"),
        (CHAT, "no tokenizer files"),
        ({"prompt": [5], "stop": "x"}, "use stop_token_ids"),
    ):
        assert words in bare.prepare(request(**row), 0).message


def test_chat_template_that_is_absent_raises_or_loops_fails_only_its_rows(preparer, tmp_path):
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for template, words in ((None, "no chat template"), ("{{ raise_exception('no') }}", "no"), (loops, "CPU time")):
        build_tokenizer(tmp_path, chat_template=template)
        tokenizer = Tokenizer.load(tmp_path, render_timeout_s=0.1)
        error, parts = preparer(tokenizer=tokenizer).prepare_all([(0, request(**CHAT)), (1, request(prompt="a"))])
        assert (error.code, error.param) == ("invalid_prompt", "messages") and words in error.message
        assert len(parts) == 1


def test_spelled_special_tokens_neither_lose_nor_double_a_row(preparer):
    parts = preparer().prepare_all(
        [(i, request(prompt=t)) for i, t in enumerate(["</s>", "<s>a<unk>", "<|im_start|>"])]
    )
    assert [p.prompt_token_ids[:2] for [p] in parts] == [(1, 2), (1, 1), parts[2][0].prompt_token_ids[:2]]


def test_row_for_another_model_is_told_and_fails_where_that_is_wanted(preparer):
    served = ServedModel.of("/models/mixtral/", "my-model")
    for name in ("/models/mixtral/", "mixtral", "my-model", "mistralai/mixtral", None):
        assert served.mismatch(name) is None
    other = request(prompt="a", model="gpt-4o")
    assert 'asks for the model "gpt-4o"' in served.mismatch(other.model)
    assert len(preparer(served=served).prepare(other, 0)) == 1
    error = preparer(served=ServedModel.of("mixtral", strict=True)).prepare(other, 0)
    assert (error.code, error.param) == ("model_not_found", "model")
    assert ServedModel.of().mismatch(other.model) is None


def test_a_job_notes_once_that_rows_name_another_model_unless_they_fail():
    models = {"mixtral": 1, "gpt-4o": 7, "llama": 9}
    told = ServedModel.of("/models/mixtral").note(models)
    assert told.startswith('line 7 names the model "gpt-4o"') and "strict_model=True" in told and "llama" not in told
    assert ServedModel.of("/models/mixtral", strict=True).note(models) is None
    assert ServedModel.of("/models/mixtral").note({"mixtral": 1}) is None


def test_lengths_are_measured_per_sample_up_to_the_context():
    measured = Measured.of([(10, 5, 1), (20, 10, 3), (60, 9, 1)], context=64)
    assert (measured.rows, measured.longest_row) == (5, 64)
    assert (measured.workload.prompt_len, measured.workload.gen_len) == (26, 8)
    nothing = Measured.of([], context=64)
    assert (nothing.rows, nothing.longest_row, nothing.workload.prompt_len) == (0, 2, 1)
