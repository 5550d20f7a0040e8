import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from flexmoe.errors import DataError
from flexmoe.text.backend import TokenizerError
from flexmoe.text.tokenizer import Tokenizer, eos_ids
from tests.support.tokenizers import SENTENCES, build_sentencepiece, build_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece")
    build_sentencepiece(path)
    return Tokenizer.load(path)


def encode_chat(tokenizer, messages, variables=None):
    """Token ids of a chat up to where the assistant's answer begins, as the runner makes them."""
    return tokenizer.encode_all([tokenizer.render(messages, variables)], add_special_tokens=False)[0]


@pytest.mark.parametrize("text", ["hello world", "  two  spaces , and . dots n't", "größe 日本 🙂", "", "x" * 300])
def test_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_gets_the_special_tokens_of_the_tokenizer(tokenizer):
    ids = tokenizer.encode("hello world")
    assert ids[0] == 1 and ids.count(1) == 1 and isinstance(ids, tuple)


def test_chat_has_one_bos_and_ends_where_the_answer_begins(tokenizer):
    ids = encode_chat(tokenizer, ({"role": "user", "content": "hello"},))
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 1
    assert tokenizer.decode(ids) == "[user]hello[assistant]"


def test_chat_equals_what_transformers_makes_of_it(tokenizer, directory):
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world"}]
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert encode_chat(tokenizer, messages) == tuple(theirs["input_ids"])


def test_long_prompt_is_neither_cut_nor_warned_about(tokenizer, caplog):
    assert len(tokenizer.encode("fox " * 100)) > 100 and not caplog.records


def test_special_tokens_are_left_out_of_the_text(tokenizer):
    assert tokenizer.decode((1, *tokenizer.encode("hello"), 2)) == "hello"


def test_completion_keeps_the_space_before_its_first_word(sentencepiece):
    ids = sentencepiece.encode("hello world")[1:]
    assert sentencepiece.decode_prompt(ids) == "hello world" and sentencepiece.decode(ids) == " hello world"
    assert sentencepiece.decode(()) == "" and sentencepiece.decode(ids[1:]) == " world"


@pytest.mark.parametrize("text", ["hello world", " hello", "größe 日本 🙂", "", "\n\t x"])
@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece"])
def test_completion_in_two_pieces_reads_as_one(request, name, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    beginnings = [n for n in range(len(ids)) if "\ufffd" not in tokenizer.decode_prompt(ids[:n])]
    for n in beginnings:
        assert tokenizer.decode_prompt(ids[:n]) + tokenizer.decode(ids[n:]) in (text, " " + text)


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece"])
def test_bytes_of_tokens_make_the_text(request, name):
    tokenizer = request.getfixturevalue(name)
    told = [tokenizer.token_text(id) for id in tokenizer.encode("hello größe 日本🙂\ufffd")[1:]]
    assert b"".join(t.bytes for t in told).decode().lstrip() == "hello größe 日本🙂\ufffd"
    assert {t.text for t in told if t.bytes == b"\xe6"} == {"bytes:\\xe6"} and all(t.visible for t in told)


def test_special_and_unknown_tokens_have_texts_too(tokenizer, tmp_path):
    eos = tokenizer.token_text(2)
    assert (eos.text, eos.bytes, eos.visible) == ("</s>", b"</s>", False)
    for unknown in (tokenizer.token_text(31_999), Tokenizer.load(tmp_path).token_text(31_999)):
        assert (unknown.text, unknown.bytes, unknown.visible) == ("token_id:31999", None, False)


def test_text_that_spells_a_special_token_becomes_it(tokenizer):
    assert tokenizer.encode("a</s>b").count(2) == 1
    ids = encode_chat(tokenizer, [{"role": "user", "content": "a</s>b"}])
    assert ids.count(2) == 2 and tokenizer.decode(ids) == "[user]ab[assistant]"


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece"])
def test_many_texts_are_encoded_as_one_by_one(request, name):
    tokenizer = request.getfixturevalue(name)
    texts = ["hello world", "", "größe </s> 日本", "x" * 500, "\0", *SENTENCES] * 5
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_all([]) == []
    plain = tokenizer.encode_all(texts, add_special_tokens=False)
    assert [ids[1:] for ids in tokenizer.encode_all(texts)] == plain


def test_chat_template_may_be_given_and_gets_variables(directory):
    template = "{{ bos_token }}{{ messages[0].content }}{{ mood }}"
    tokenizer = Tokenizer.load(directory, chat_template=template)
    ids = encode_chat(tokenizer, [{"role": "user", "content": "hello"}], {"mood": "!"})
    assert ids[0] == 1 and tokenizer.decode(ids) == "hello!"
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(directory, chat_template="{% if %}")


def test_template_that_loops_or_is_broken_refuses_every_chat_and_nothing_else(tmp_path):
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for template, words in ((loops, "CPU time"), ("{% if %}", "cannot be read.*chat_template")):
        build_tokenizer(tmp_path, chat_template=template)
        tokenizer = Tokenizer.load(tmp_path, render_timeout_s=0.1)
        with pytest.raises(DataError, match=words):
            encode_chat(tokenizer, [{"role": "user", "content": "a"}])
        assert tokenizer.encode("hello")


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode((*tokenizer.encode("hello"), 31_999)) == "hello"


def test_template_that_refuses_the_messages_says_why(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(DataError, match="system must come first"):
        encode_chat(tokenizer, messages)


def test_missing_template_is_named(tmp_path):
    build_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(DataError, match="no chat template"):
        encode_chat(Tokenizer.load(tmp_path), [{"role": "user", "content": "a"}])


def test_directory_without_tokenizer_serves_token_ids_only(tmp_path):
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.is_available and tokenizer.decode((1, 2)) is None and tokenizer.eos_token_id is None
    for call in (lambda: tokenizer.encode("a"), lambda: encode_chat(tokenizer, [{"role": "user", "content": "a"}])):
        with pytest.raises(DataError, match=r"no tokenizer files .*tokenizer\.json.*token ids"):
            call()


SENTENCEPIECE = {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}', "tokenizer.model": "x"}
GPT2 = '{"tokenizer_class": "GPT2Tokenizer"}'


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": '{"version": "1.0", "model"'}, "tokenizer.json' is not valid JSON.*fetch it again"),
        ({"tokenizer.json": ""}, "tokenizer.json' is empty.*fetch it again"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}, "tokenizer.json' is a Git-LFS pointer"),
        (
            SENTENCEPIECE,
            "needs the Python packages sentencepiece and protobuf, not installed.*pip install sentencepiece",
        ),
        (SENTENCEPIECE | {"tokenizer.model": "IQ== 0\nIg== 1\n"}, "needs the Python package tiktoken, not installed"),
        (SENTENCEPIECE | {"tokenizer.model": ""}, "tokenizer.model' is empty.*fetch it again"),
        ({"tekken.json": "{}"}, "needs the Python package mistral-common, not installed"),
        ({"tokenizer_config.json": GPT2, "vocab.json": '{"a": 0}'}, "merges.txt is missing beside vocab.json"),
        ({"tokenizer.json": '{"model": {"type": "?"}}'}, "compare its files with the original's"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_says_what_is_missing_when_text_needs_it(files, words, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.is_available and tokenizer.decode((1, 2)) is None and tokenizer.eos_token_id is None
    assert tokenizer.token_text(5).text == "token_id:5"
    for call in (lambda: tokenizer.encode("a"), lambda: encode_chat(tokenizer, [{"role": "user", "content": "a"}])):
        with pytest.raises(TokenizerError, match=words) as refusal:
            call()
        assert refusal.value.exit_code == 65
        assert ("fetch it again" in words) == ("again" in str(refusal.value) and "merges" not in words)


@pytest.mark.parametrize("name", [b"m\xe8", b"\xff\xfe", "größe 日本".encode(), b"a b'c\"d\n"])
def test_a_directory_may_have_any_name(name, directory, tmp_path, tokenizer):
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
    shutil.copytree(directory, path)
    found = Tokenizer.load(path)
    assert found.encode("hello world") == tokenizer.encode("hello world")
    assert encode_chat(found, [{"role": "user", "content": "a"}])


def test_code_in_a_checkpoint_is_not_run(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with contextlib.suppress(DataError):
        Tokenizer.load(copy)
    assert not marker.exists()


def test_transformers_is_imported_only_when_needed():
    code = "import sys, flexmoe.text.tokenizer, flexmoe.job.job; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9, 7]}, {"eos_token_id": 3}, (7, 9, 2)),
        ({"eos_token_id": [7, 2]}, {"eos_token_id": 3}, (7, 2)),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, (0, 2)),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, (3, 4, 2)),
        ({}, {"eos_token_id": 3}, (3, 2)),
        ({}, {}, (2,)),
        ({"eos_token_id": []}, {}, (2,)),
    ],
)
def test_eos_is_every_id_of_the_first_file_that_names_one_and_the_tokenizers_own(
    tokenizer, generation, config, expected
):
    assert eos_ids(generation, config, tokenizer) == expected


def test_without_any_eos_nothing_ends_a_sequence(tmp_path):
    assert eos_ids({}, {}, None) == () and eos_ids({}, {}, Tokenizer.load(tmp_path)) == ()


@pytest.mark.parametrize("value", ["2", True, [2, None], -1, 2.0])
def test_eos_of_the_wrong_type_is_bad_data(value):
    with pytest.raises(DataError, match=r"eos_token_id in generation_config\.json"):
        eos_ids({"eos_token_id": value}, {}, None)
