"""Command lines over jobs of a tiny model, for the tests of the programs."""

from __future__ import annotations

import json

import pytest

from cost_model import Hardware
from flexmoe.cli import run as command

RESIDENT = ["--percent", "100", "0", "100", "0", "100", "0"]
THREE_TIERS = ["--percent", "20", "30", "30", "30", "50", "0", "--gpu-batch-size", "3", "--num-gpu-batches", "2"]
ROWS = (0, 1, 2, 3, 5, 6, 8)


@pytest.fixture
def job(tiny, tmp_path):
    """Arguments of a job over a few prompts of a tiny model, all its files below `tmp_path`."""
    variant = tiny()
    lines = [
        {"custom_id": f"r{row}", "prompt": variant.prompts[row], "return_token_ids": True, "max_tokens": 4 + row % 3}
        for row in ROWS
    ]
    return Job(variant.directory, tmp_path, lines)


@pytest.fixture
def machine(tmp_path_factory):
    """A file of a machine's rates, so that none is measured."""
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    Hardware.preset("cpu").save(path)
    return path


class Job:
    def __init__(self, model, directory, lines):
        self.model, self.directory = model, directory
        self.output, self.errors = directory / "out.jsonl", directory / "out.errors.jsonl"
        self.write(lines)

    def write(self, lines):
        (self.directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def args(self, *more, model=None, files=True):
        """Everything is resident where nothing else is asked for; planning needs the rates of the machine."""
        args = [
            "--model",
            str(model or self.model),
            "--device",
            "cpu",
            "--offload-dir",
            str(self.directory / "offload"),
        ]
        args += ["-i", str(self.directory / "in.jsonl"), "-o", str(self.output)] if files else []
        return [*args, *more, *([] if {"--percent", "--policy"} & set(more) else RESIDENT)]

    def lines(self):
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def main(capsys):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""

    def call(args):
        code = command.main(args)
        return (code, *capsys.readouterr())

    return call


def assert_one_sentence(stderr, *parts):
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1 and stderr.startswith("flexmoe: "), stderr
    for part in parts:
        assert part in stderr, stderr


def body(line):
    return line["response"]["body"]
