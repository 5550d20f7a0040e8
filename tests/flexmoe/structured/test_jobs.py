"""Jobs whose rows have schemas: the same bytes whatever stopped them, and rows that cannot be followed are error rows."""

import json

import jsonschema
import pytest

from flexmoe.batch.run_batch import run_batch
from flexmoe.engine.engine import Engine
from flexmoe.structured import grammars
from scripts.structured.bench import rows as measured_rows
from scripts.structured.schemas import SCHEMAS
from tests.support.serving import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 4, "num_gpu_batches": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def batch(model, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")

    def call(rows, name="out", **options):
        source = tmp_path / f"{name}.in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"offload_dir": tmp_path / "offload"} | SMALL | options
        return run_batch(source, tmp_path / f"{name}.jsonl", model=model, **options)

    return call


def row(schema, **given):
    described = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"prompt": "hello", "response_format": described, "temperature": 1.0, "max_tokens": 300} | given


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_job_that_was_stopped_writes_the_bytes_of_one_that_was_not(batch, monkeypatch):
    rows = [row(schema, n=1 + at % 2) for at, schema in enumerate(SCHEMAS)]
    whole = batch(rows, "whole")
    real, counter = Engine.step, iter(range(10**9))

    def step(engine):
        if next(counter) == 9:
            raise RuntimeError("stopped")
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(RuntimeError, match="stopped"):
        batch(rows)
    resumed = batch(rows)
    assert resumed.output_path.read_bytes() == whole.output_path.read_bytes() and resumed.rows_ok == len(rows)
    for line, schema in zip(lines(whole.output_path), SCHEMAS, strict=True):
        for choice in line["response"]["body"]["choices"]:
            jsonschema.validate(json.loads(choice["text"]), schema)
            assert choice["finish_reason"] == "stop"


def test_a_row_that_cannot_be_followed_is_an_error_row_and_the_others_run(batch):
    result = batch([row(SCHEMAS[0]), row({"not": {}}), row(SCHEMAS[2])])
    assert (result.rows_ok, result.rows_failed) == (2, 1)
    [line] = lines(result.error_path)
    error = line["response"]["body"]["error"]
    assert (error["code"], error["param"]) == ("invalid_structure", "response_format")
    assert 'Unimplemented keys: ["not"]' in error["message"]


def test_without_the_library_a_row_that_needs_it_is_an_error_row_that_says_what_to_install(batch, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(grammars.importlib, "import_module", missing)
    result = batch([row(SCHEMAS[0]), {"prompt": "hello", "max_tokens": 3}])
    monkeypatch.undo()
    assert (result.rows_ok, result.rows_failed) == (1, 1)
    [line] = lines(result.error_path)
    assert "pip install 'flexmoe[structured]'" in line["response"]["body"]["error"]["message"]


@pytest.mark.slow
def test_a_thousand_rows_at_temperature_1_are_valid_each(model):
    [figure], outcomes = measured_rows(model, 1000)
    assert outcomes == {"valid": 1000} and figure.met
