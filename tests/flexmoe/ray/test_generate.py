"""`flexmoe.ray.Generate` without Ray: what an actor makes of its batches."""

import asyncio

import numpy as np
import pandas
import pyarrow
import pytest

import flexmoe.ray
from flexmoe import SamplingParams
from flexmoe.errors import UsageError
from tests.support.forked import Forked

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"max_tokens": 6, "ignore_eos": True}
TEXTS = ["The river", "A river and a lake", "Name", "The river"]
ADDED = ("generated_text", "generated_tokens", "num_input_tokens", "num_generated_tokens", "finish_reason")
ERROR = "__inference_error__"
CHAT = [{"role": "user", "content": "Name"}]


@pytest.fixture(scope="module")
def generate(checkpoint, options):
    made = flexmoe.ray.Generate(str(checkpoint), sampling_params=SHORT, id_column="id", **options)
    yield made
    made.close()


def run(actor, *batches):
    """The batches that an actor makes of those that it is given at once."""

    async def all_of_them():
        return await asyncio.gather(*map(actor, batches))

    return asyncio.run(all_of_them())


def columns(batch):
    """A batch in any form as lists."""
    if isinstance(batch, pyarrow.Table):
        return batch.to_pydict()
    return {name: [v.tolist() if isinstance(v, np.ndarray) else v for v in list(batch[name])] for name in batch}


def table(*rows):
    given = [{"id": f"row-{place}", **row} for place, row in enumerate(rows)]
    names = dict.fromkeys(name for row in given for name in row)
    return pyarrow.table({name: [row.get(name) for row in given] for name in names})


def errors(actor, *rows):
    [made] = run(actor, table(*rows))
    return made.column(ERROR).to_pylist()


def test_rows_are_those_of_one_run(checkpoint, options, generate):
    [made] = run(generate, table(*({"prompt": text} for text in TEXTS)))
    with flexmoe.LLM(str(checkpoint), **options) as llm:
        expected = llm.generate(TEXTS, SamplingParams(**SHORT))
    found = made.to_pydict()
    assert found["generated_tokens"] == [list(output.outputs[0].token_ids) for output in expected]
    assert found["generated_text"] == [output.outputs[0].text for output in expected]
    assert found["num_input_tokens"] == [len(output.prompt_token_ids) for output in expected]
    assert found["num_generated_tokens"] == [6] * 4 and found["finish_reason"] == ["length"] * 4
    assert found[ERROR] == [""] * 4 and found["prompt"] == TEXTS


def test_batches_of_every_form_get_the_same_columns(generate):
    texts, ids = TEXTS[:2], [1, 2]
    arrays = {"prompt": np.array(texts, dtype=object), "id": np.array(ids)}
    batches = run(generate, arrays, pandas.DataFrame({"prompt": texts, "id": ids}), pyarrow.table(arrays))
    first, *others = map(columns, batches)
    assert list(first) == ["prompt", "id", *ADDED, ERROR] and first["id"] == ids
    assert all(other == first for other in others)
    assert isinstance(batches[0], dict) and isinstance(batches[1], pandas.DataFrame)


def test_chats_as_numpy_has_them_and_parameters_of_each_row(checkpoint, options, generate):
    chats = [[{"role": "user", "content": text}] for text in ("Name three rivers.", "And lakes?")]
    batch = {
        "messages": np.array([np.array(chat, dtype=object) for chat in chats], dtype=object),
        "sampling_params": np.array([{"max_tokens": 3, "top_k": None}, {"max_tokens": np.int64(5)}], dtype=object),
        "id": np.array(["a", "b"], dtype=object),
        "prompt": np.array([None, "not read"], dtype=object),
    }
    [made] = run(generate, batch)
    with flexmoe.LLM(str(checkpoint), **options) as llm:
        expected = llm.chat(chats, [SamplingParams(max_tokens=3), SamplingParams(max_tokens=5)])
    assert list(map(list, made["generated_tokens"])) == [list(output.outputs[0].token_ids) for output in expected]


def test_a_row_that_cannot_run_says_why_and_the_others_run(generate):
    rows = [
        ({"prompt": "x " * 3000}, "the prompt has 6001 tokens"),
        ({"prompt": "Name"}, ""),
        ({"prompt": "Name", "sampling_params": {"max_token": 3}}, "did you mean"),
        ({"prompt": "Name", "sampling_params": {"max_tokens": 3000}}, "prompt and completion may reach"),
        ({"prompt": "Name", "sampling_params": {"n": 2}}, "a row has one completion here"),
        ({"prompt": "Name", "sampling_params": {"logprobs": 0}}, "logprobs has no column here"),
        ({"prompt": "Name", "sampling_params": {"echo": True}}, "echo has no column here"),
        ({"messages": CHAT, "sampling_params": {"echo": True, "add_generation_prompt": False}}, "echo has no column"),
        ({"sampling_params": {"top_k": 3}}, "neither messages nor a prompt"),
        ({"prompt": "Name", "id": None}, "id is null"),
        ({"messages": [{"role": "pilot", "content": "x"}]}, "messages[0].role"),
        ({"prompt": "Name", ERROR: "no such file"}, "no such file"),
    ]
    found = errors(generate, *(row for row, _ in rows))
    for error, (row, said) in zip(found, rows, strict=True):
        assert (said in error) if said else error == "", row
    [made] = run(generate, table(*(row for row, _ in rows)))
    assert (
        made.column("generated_text").to_pylist()[0] == "" and made.column("num_generated_tokens").to_pylist()[1] == 6
    )


def test_draws_depend_on_the_id_or_else_on_the_row(checkpoint, options, generate):
    sampled = {"prompt": "The river", "sampling_params": {"max_tokens": 12, "temperature": 2.0, "ignore_eos": True}}
    [made] = run(generate, table(*[sampled] * 4))
    [again] = run(generate, made.select(["prompt", "sampling_params", "id"]).slice(1, 1))
    tokens = made.column("generated_tokens").to_pylist()
    assert len(set(map(tuple, tokens))) == 4
    assert again.column("generated_tokens").to_pylist() == tokens[1:2]


def test_rows_of_all_open_calls_run_together(generate):
    before = generate.llm.metrics()["sweeps"]
    long = {"sampling_params": {"max_tokens": 40, "ignore_eos": True}}
    batches = [table({"prompt": text, **long}, {"prompt": "Name", **long}) for text in TEXTS * 2]
    made = run(generate, *batches)
    assert [columns(batch)["prompt"][0] for batch in made] == TEXTS * 2
    assert generate.llm.metrics()["sweeps"] - before < 3 * 40, "not one call after another"
    assert generate.llm.metrics()["most_rows_in_flight"] >= 12


def test_what_is_no_batch_is_refused(generate):
    with pytest.raises(UsageError, match="a batch is of type list"):
        run(generate, ["The river"])


def test_arguments_are_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(UsageError, match="sampling_params is 3"):
        flexmoe.ray.Generate("no-model", sampling_params=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="which is a file"):
        flexmoe.ray.Generate("no-model", journal=tmp_path / "file")


def test_a_dead_engine_ends_its_process(checkpoint, tmp_path):
    def fail():
        raise RuntimeError("the device is lost")

    def lost():
        actor = flexmoe.ray.Generate(
            str(checkpoint), policy=None, device="cpu", longest_row=64, offload_dir=str(tmp_path)
        )
        actor.llm.engine.step = fail
        run(actor, pyarrow.table({"prompt": ["The river"]}))
        raise SystemExit(99)

    code, _, err = Forked(lost, tmp_path).wait()
    assert code == 1 and "the engine failed, and its actor ends: the device is lost" in err
