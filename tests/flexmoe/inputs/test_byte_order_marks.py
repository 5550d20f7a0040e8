"""A byte order mark before a text is no part of it, wherever text comes from."""

import json
import random
import shutil

import pytest

from flexmoe.checkpoint.files import read_json_object
from flexmoe.inputs.options import InputOptions, open_requests
from flexmoe.text.chat_template import ChatTemplate, read_template
from flexmoe.text.tokenizer import Tokenizer
from policies.common.json_files import read_json
from tests.support.tokenizers import build_tokenizer

BOM = "\ufeff"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}]


def rows(path, **options):
    with open_requests(path, InputOptions(**options), path.parent) as requests:
        return list(requests)


LINES = {
    "text": ("in.txt", ["one", "  two ", "", "ä"], rows),
    "text in a template": ("in.txt", ["one", "two"], lambda path: rows(path, prompt_template=BOM + "Say {text}")),
    "JSONL": ("in.jsonl", [json.dumps({"prompt": [i, 2]}) for i in range(4)], rows),
    "columns": ("in.jsonl", [json.dumps({"q": f"p{i}"}) for i in range(4)], lambda p: rows(p, prompt_column="q")),
}


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("seed", range(8))
def test_mark_at_the_head_of_any_line_is_no_part_of_it(tmp_path, kind, end, seed):
    name, lines, read = LINES[kind]
    rng, path = random.Random(seed), tmp_path / name
    path.write_bytes("".join(line + end for line in lines).encode())
    plain = read(path)
    marked = [BOM * (rng.random() < 0.6 or not at) + line + end for at, line in enumerate(lines)]
    path.write_bytes("".join(marked).encode())
    assert read(path) == plain


def test_mark_within_a_text_stays(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": BOM + "a"}) + "\n")
    (tmp_path / "in.txt").write_text(f"a{BOM}b\n", encoding="utf-8")
    assert rows(tmp_path / "in.jsonl")[0].prompts == (BOM + "a",) and rows(tmp_path / "in.txt")[0].prompts == (
        f"a{BOM}b",
    )


def test_mark_before_a_chat_template_is_no_part_of_it(tmp_path):
    build_tokenizer(tmp_path / "clean", chat_template=TEMPLATE)
    shutil.copytree(tmp_path / "clean", tmp_path / "marked")
    file = tmp_path / "marked" / "chat_template.jinja"
    file.write_text(BOM + file.read_text(encoding="utf-8"), encoding="utf-8")
    assert (
        Tokenizer.load(tmp_path / "marked").render(CHAT) == Tokenizer.load(tmp_path / "clean").render(CHAT) == "<s>hi"
    )
    for argument in (str(file), BOM + TEMPLATE):
        assert ChatTemplate(read_template(argument), {"bos_token": "<s>"}).render(CHAT) == "<s>hi"


@pytest.mark.parametrize("read", [lambda path: read_json(path, "the file"), read_json_object])
def test_mark_before_a_json_file_is_no_part_of_it(tmp_path, read):
    (tmp_path / "f.json").write_text(BOM + '{"a": 1}', encoding="utf-8")
    assert read(tmp_path / "f.json") == {"a": 1}
