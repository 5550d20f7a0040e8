"""The length histogram of a prompts file."""

import json

import pytest

from cost_model.cli.prompts import BYTES_PER_TOKEN, CHAT_TOKENS, read_prompts
from policies.common.errors import DataError, InputMissingError
from tests.support.tokenizers import build_tokenizer


@pytest.fixture
def read(tmp_path):
    """Reads a file of these lines (values are written as JSON, texts as they are)."""

    def call(*lines, gen_len=32, context=1000, **more):
        path = tmp_path / "prompts"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return read_prompts(path, gen_len=gen_len, context=context, **more)

    return call


def test_token_ids_and_token_counts_are_exact(read):
    found = read(
        {"prompt": [1, 2, 3], "max_tokens": 7},
        {"prompt": [[4], [5, 6]]},
        {"prompt_tokens": 9, "max_completion_tokens": 2},
        "",
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 2, 3], "max_tokens": 7}},
    )
    assert found.workload.lengths == ((1, 32, 1), (2, 32, 1), (3, 7, 2), (9, 2, 1))
    assert found.workload.num_requests == 5
    assert (found.workload.prompt_len, found.workload.gen_len) == (4, 16), "means, rounded up"
    assert found.notes == ("lengths of 5 rows of prompts",)


def test_text_without_a_tokenizer_is_estimated_and_the_note_says_so(read):
    found = read({"prompt": "four" * 10}, {"messages": [{"role": "user", "content": "four" * 3}]})
    assert found.workload.lengths == ((3 + CHAT_TOKENS, 32, 1), (10, 32, 1))
    assert f"estimated: {BYTES_PER_TOKEN} bytes a token" in found.notes[0] and "chat message" in found.notes[0]


def test_lines_that_are_no_json_are_prompts(read):
    assert read("a prompt", "é").workload.lengths == ((1, 32, 1), (2, 32, 1))


def test_text_is_counted_by_the_models_tokenizer(read, tmp_path):
    build_tokenizer(tmp_path)
    found = read({"prompt": "zqzq"}, tokenizer_dir=tmp_path)
    from transformers import AutoTokenizer

    want = len(AutoTokenizer.from_pretrained(tmp_path)("zqzq")["input_ids"])
    assert found.workload.prompt_len == want
    assert "counted by the model's tokenizer" in found.notes[0]


def test_rows_beyond_the_context_are_cut_or_left_out_as_the_runtime_does(read):
    found = read({"prompt_tokens": 990}, {"prompt_tokens": 1000}, {"prompt_tokens": 2000})
    assert found.workload.lengths == ((990, 10, 1),)
    assert found.notes[1] == "2 rows do not fit the context of 1000 tokens and are left out"


def test_a_file_may_be_a_sample_of_the_job(read):
    assert read({"prompt_tokens": 5}, num_requests=1000).workload.num_requests == 1000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "line 2"),
        ("[1]", "must be a JSON object"),
        ('{"prompt": 5}', "needs a prompt"),
        ('{"prompt": []}', "needs a prompt"),
        ('{"prompt": ["a", 1]}', "neither text nor token ids"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"prompt_tokens": -1}', "prompt_tokens is -1"),
        ('{"body": 3}', "body must be"),
    ],
)
def test_a_malformed_line_is_named(line, words, read):
    with pytest.raises(DataError, match=words) as caught:
        read('{"prompt": "a"}', line)
    assert "line 2" in str(caught.value)


def test_a_missing_an_empty_and_a_binary_file_are_refused(read, tmp_path):
    with pytest.raises(InputMissingError, match="cannot be read"):
        read_prompts(tmp_path / "none", gen_len=1, context=10)
    with pytest.raises(DataError, match="holds no row"):
        read()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "binary", gen_len=1, context=10)


def test_null_is_absent_and_8_0_is_8_as_in_a_run(read):
    plain = read({"prompt": [1, 2, 3], "max_tokens": 8}, {"messages": [{"role": "user", "content": "four"}]})
    nulls = {"messages": None, "method": None, "url": None, "body": None, "max_completion_tokens": None}
    assert (
        plain.workload
        == read(
            {"prompt": [1.0, 2, 3.0], "max_tokens": 8.0} | nulls,
            {"prompt": None, "max_tokens": None, "messages": [{"role": "user", "content": "four", "name": None}]},
        ).workload
    )
    with pytest.raises(DataError, match="max_tokens is 8.5; it must be a whole number"):
        read({"prompt": [1], "max_tokens": 8.5})
