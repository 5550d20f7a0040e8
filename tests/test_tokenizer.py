import json
import shutil
import subprocess
import sys

import pytest

from flexmoe.errors import DataError
from flexmoe.tokenizer import Tokenizer, eos_ids

SENTENCES = ["the quick brown fox jumps over the lazy dog", "weights travel from disk to host to device", "hello world"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def build_tokenizer(directory, chat_template=TEMPLATE):
    """A byte-level BPE with BOS added to plain prompts, saved as a checkpoint would hold it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.load(directory)


@pytest.mark.parametrize("text", ["hello world", "  two  spaces , and . dots n't", "größe 日本 🙂", "", "x" * 300])
def test_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_gets_the_special_tokens_of_the_tokenizer(tokenizer):
    ids = tokenizer.encode("hello world")
    assert ids[0] == 1 and ids.count(1) == 1 and isinstance(ids, tuple)


def test_chat_has_one_bos_and_ends_where_the_answer_begins(tokenizer):
    ids = tokenizer.encode_chat(({"role": "user", "content": "hello"},))
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 1
    assert tokenizer.decode(ids) == "[user]hello[assistant]"


def test_chat_equals_what_transformers_makes_of_it(tokenizer, directory):
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world"}]
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert tokenizer.encode_chat(messages) == tuple(theirs["input_ids"])


def test_long_prompt_is_neither_cut_nor_warned_about(tokenizer, caplog):
    assert len(tokenizer.encode("fox " * 100)) > 100 and not caplog.records


def test_special_tokens_are_left_out_of_the_text(tokenizer):
    assert tokenizer.decode((1, *tokenizer.encode("hello"), 2)) == "hello"


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode((*tokenizer.encode("hello"), 31_999)) == "hello"


def test_template_that_refuses_the_messages_says_why(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(DataError, match="system must come first"):
        tokenizer.encode_chat(messages)


def test_missing_template_is_named(tmp_path):
    build_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(DataError, match="no chat template"):
        Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "a"}])


def test_directory_without_tokenizer_serves_token_ids_only(tmp_path):
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.is_available and tokenizer.decode((1, 2)) is None and tokenizer.eos_token_id is None
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.encode_chat([{"role": "user", "content": "a"}])):
        with pytest.raises(DataError, match=r"no tokenizer files .*tokenizer\.json.*token ids"):
            call()


def test_damaged_tokenizer_is_bad_data(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(DataError, match="cannot be used"):
        Tokenizer.load(copy)


def test_code_in_a_checkpoint_is_not_run(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    try:
        Tokenizer.load(copy)
    except DataError:
        pass
    assert not marker.exists()


def test_transformers_is_imported_only_when_needed():
    code = "import sys, flexmoe.tokenizer, flexmoe.job; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9, 7]}, {"eos_token_id": 3}, (7, 9)),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({}, {}, (2,)),
        ({"eos_token_id": []}, {}, (2,)),
    ],
)
def test_eos_is_every_id_of_the_first_file_that_names_one(tokenizer, generation, config, expected):
    assert eos_ids(generation, config, tokenizer) == expected


def test_without_any_eos_nothing_ends_a_sequence(tmp_path):
    assert eos_ids({}, {}, None) == () and eos_ids({}, {}, Tokenizer.load(tmp_path)) == ()


@pytest.mark.parametrize("value", ["2", True, [2, None], -1, 2.0])
def test_eos_of_the_wrong_type_is_bad_data(value):
    with pytest.raises(DataError, match=r"eos_token_id in generation_config\.json"):
        eos_ids({"eos_token_id": value}, {}, None)
