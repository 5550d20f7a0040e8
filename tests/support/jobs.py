"""Small jobs with a fake engine, for the tests of the runner."""

from __future__ import annotations

import json

import pytest

from flexmoe.job.job import Job, JobFiles
from flexmoe.job.runner import StreamOptions
from flexmoe.preflight.prepare_setup import PreparerSetup
from policies.common import file_io
from tests.support.fake_engine import FakeEngine
from tests.support.tokenizers import build_tokenizer

VOCAB, CONTEXT = 320, 200


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(directory)
    return str(directory)


@pytest.fixture
def setup(tokenizer_directory):
    return make_setup(tokenizer_directory)


def make_setup(directory, **values):
    values = {"vocab_size": VOCAB, "context": CONTEXT, "default_max_tokens": 50} | values
    return PreparerSetup(directory=directory, **values)


@pytest.fixture
def quick_disk(monkeypatch):
    """Nobody pulls the plug during a test, and waiting for the disk takes most of its time."""
    monkeypatch.setattr(file_io.os, "fsync", lambda _: None)


@pytest.fixture
def fixed_time(monkeypatch):
    """Outputs have one time, so that those of two jobs can be equal byte by byte."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


class Runner:
    """Jobs over `in.jsonl` of a directory.

    Args:
        directory: of all files.
        setup: how requests are made.
    """

    def __init__(self, directory, setup):
        self.directory, self.setup = directory, setup
        self.input, self.output = directory / "in.jsonl", directory / "out.jsonl"
        self.errors = directory / "out.errors.jsonl"
        self.work = directory / "out.jsonl.flexmoe"

    def write(self, rows):
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def files(self, **options):
        return JobFiles(**{"input": self.input, "output": self.output} | options)

    def run(self, llm=None, *, files=None, setup=None, bar=False, interval_s=300.0, clock=None, **options):
        clock = {} if clock is None else {"clock": clock}
        stream = StreamOptions(bar=bar, checkpoint_interval_s=interval_s, **clock)
        engine = FakeEngine() if llm is None else llm
        with Job(self.files(**files or {}), setup or self.setup, stream=stream, **options) as job:
            if job.report is not None:
                return job.report
            job.look()
            if job.rows_left:
                job.run(engine)
            return job.publish()

    def lines(self):
        return read(self.output)

    def failed(self):
        return read(self.errors) if self.errors.exists() else None

    def names(self):
        return sorted(path.name for path in self.directory.iterdir())


def read(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def body(line):
    return line["response"]["body"]


def fault(line):
    """The error of an error line, wherever OpenAI has it."""
    return line["error"] or body(line)["error"]


@pytest.fixture
def runner(tmp_path, setup):
    return Runner(tmp_path, setup)


@pytest.fixture
def bare(tmp_path):
    """Without a tokenizer, which would take longer to load than the jobs."""
    return Runner(tmp_path, make_setup(None))


class Clock:
    """A clock that a sweep moves on by a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def tick(self, _):
        self.now += 1
