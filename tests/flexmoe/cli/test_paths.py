"""A whole job below a directory whose name is any bytes: model, input, output, reports and offload directory."""

import json
import os
import shutil

import pytest

from cost_model import Hardware
from flexmoe.cli.merge import main as merge
from flexmoe.cli.run import main
from tests.support.command_lines import THREE_TIERS
from tests.support.tokenizers import build_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [
    {"prompt": "hello world"},
    {"prompt": [5, 6, 7]},
    {"prompt": [9999]},
    {"messages": [{"role": "user", "content": "a"}]},
]


@pytest.mark.parametrize("name", [b"m\xe8", b"\xff \"'\n\xc3\xa9"])
def test_a_job_runs_and_is_found_finished_below_a_directory_of_any_name(name, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    root = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
    model = shutil.copytree(tiny().directory, tmp_path / "model")
    build_tokenizer(model, vocab_size=300)
    os.mkdir(root)
    os.rename(model, os.path.join(root, "model"))

    def path(file):
        return os.path.join(root, file)

    with open(path("in.jsonl"), "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    job = ["--model", path("model"), "-i", path("in.jsonl"), "--device", "cpu", "--gen-len", "3"]
    job += ["--offload-dir", path("offload"), "--generation-config", path("model"), *THREE_TIERS]
    Hardware.preset("cpu").save(path("machine.json"))
    reports = ["--metrics-json", path("m.json"), "--trace", path("t.json"), "--router-stats", path("r.json")]
    assert main([*job, "-o", path("dry.jsonl"), "--dry-run", "--hardware", path("machine.json")]) == 3
    for _ in range(2):  # the second one finds it finished
        assert main([*job, "-o", path("out.jsonl"), *reports, "-v"]) == 3
    assert main([*job, "-o", path("out.jsonl"), "--overwrite"]) == 3
    for shard in ("0/2", "1/2"):
        assert main([*job, "-o", path("parts.jsonl"), "--shard", shard]) in (0, 3)
    assert merge(["-o", path("parts.jsonl"), path("parts.shard-0-of-2.jsonl"), path("parts.shard-1-of-2.jsonl")]) in (
        0,
        3,
    )
    assert "Traceback" not in capsys.readouterr().err
    for file in ("out.jsonl", "parts.jsonl", "m.json", "t.json", "r.json"):
        with open(path(file), encoding="utf-8") as text:
            assert len(text.read()) > 100
    with open(path("out.jsonl"), encoding="utf-8") as one, open(path("parts.jsonl"), encoding="utf-8") as other:
        lines, parts = ([json.loads(line)["response"]["body"]["choices"] for line in each] for each in (one, other))
    assert len(lines) == 3 and lines == parts
