"""Rows whose logits are not finite fail, whatever they ask for, and the rows beside them are as without them."""

import json
import logging
import random

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.batch.run_batch import run_batch
from policies import Policy, Workload
from tests.support.edited import edited, large
from tests.support.engines import RESIDENT, STREAMED, is_clean
from tests.support.references import request, run
from tests.support.tiny import offload

pytestmark = pytest.mark.usefixtures("small_halves", "one_thread")
#: Its embedding is broken in the checkpoint `broken`; no row generates it.
BAD = 7
ASKED = (
    {},
    {"logprobs": 2},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_k": 5, "n": 3, "logprobs": 0},
    {"max_tokens": 0, "prompt_logprobs": 1},
    {"prompt_logprobs": 0, "n": 2},
    {"logit_bias": {11: 2.5}, "repetition_penalty": 1.3},
)


@pytest.fixture
def make(tmp_path):
    made = []

    def call(directory, percent=RESIDENT, half_blocks=1, **options):
        policy = Policy.from_percent(
            percent, gpu_batch_size=3, num_gpu_batches=2, prompt_len=30, gen_len=6, half_blocks=half_blocks
        )
        made.append(
            LLM(directory, policy=policy, workload=Workload(prompt_len=30, gen_len=6), **offload(tmp_path), **options)
        )
        return made[-1]

    yield call
    for llm in made:
        llm.close()


@pytest.mark.parametrize(
    "value, percent, half_blocks",
    [
        pytest.param(torch.nan, RESIDENT, 1, id="nan-resident"),
        pytest.param(torch.inf, STREAMED, 2, id="inf-streamed-halves"),
        pytest.param(torch.inf, STREAMED, 1, id="inf-streamed", marks=pytest.mark.slow),
        pytest.param(torch.inf, RESIDENT, 1, id="inf-resident", marks=pytest.mark.slow),
        pytest.param(torch.nan, STREAMED, 1, id="nan-streamed", marks=pytest.mark.slow),
    ],
)
def test_a_broken_embedding_fails_the_prompts_with_it_and_no_others(
    value, percent, half_blocks, tiny, make, tmp_path, caplog
):
    rng = random.Random(5)

    def draw(number):
        prompt = rng.choices(range(20, 290), k=rng.randrange(2, 40))
        if number % 3 == 0:
            prompt[rng.randrange(len(prompt))] = BAD
        params = {"max_tokens": 6, "ignore_eos": True} | ASKED[number % len(ASKED)]
        params["logit_bias"] = {**params.get("logit_bias", {}), BAD: -100}
        return request(prompt, key=str(number), request_id=str(number), **params)

    def break_it(tensors):
        tensors["model.embed_tokens.weight"][BAD] = value

    requests = [draw(number) for number in range(3 * len(ASKED))]
    want = run(make(edited(tiny, tmp_path / "sound", lambda tensors: None), percent), *requests)
    llm = make(edited(tiny, tmp_path / "broken", break_it), percent, half_blocks)
    with caplog.at_level(logging.WARNING):
        got = run(llm, *requests)
    for asked in requests:
        found = got[asked.request_id]
        # The last token of a scored prompt that generates nothing is never computed.
        computed = asked.prompt_token_ids[: -1 if asked.params.max_tokens == 0 else None]
        if BAD in computed:
            assert (found.error_code, found.outputs) == ("non_finite_logits", [])
            assert "weights of the checkpoint are probably damaged" in found.error
        else:
            sound = want[asked.request_id]
            assert found.error is None and found.outputs[0].token_ids == sound.outputs[0].token_ids
            assert [o.token_ids for o in found.outputs] == [o.token_ids for o in sound.outputs]
    assert is_clean(llm) and sum(record.levelno == logging.WARNING for record in caplog.records) == 1


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_overflow_in_float16_fails_every_row_and_names_bfloat16(asked, tiny, make, tmp_path):
    directory = edited(tiny, tmp_path / "large", large)
    params = SamplingParams(**{"max_tokens": 4, "ignore_eos": True} | asked)
    for dtype in ("bfloat16", "float32"):
        assert make(directory, dtype=dtype).generate([[5, 6, 7]], params)[0].error is None
    (output,) = make(directory, dtype="float16").generate([[5, 6, 7]], params)
    assert output.error_code == "non_finite_logits" and "run with dtype='bfloat16'" in output.error


def test_a_job_of_such_rows_has_an_error_file_and_the_same_one_when_it_is_run_again(tiny, tmp_path):
    directory, file = edited(tiny, tmp_path / "large", large), tmp_path / "in.jsonl"
    file.write_text('{"prompt": [5, 6]}\n{"prompt": [8], "n": 2, "logprobs": 1}\n')
    options = {
        "model": directory,
        "policy": None,
        "percent": RESIDENT,
        "dtype": "float16",
        "device": "cpu",
        "gen_len": 4,
    }
    errors = []
    for overwrite in (False, False, True):
        result = run_batch(file, tmp_path / "out.jsonl", overwrite=overwrite, offload_dir=tmp_path / "o", **options)
        assert (result.rows_ok, result.rows_failed) == (0, 2)
        errors.append(result.error_path.read_bytes())
        codes = [json.loads(line)["error"]["code"] for line in errors[-1].splitlines()]
        assert codes == ["non_finite_logits"] * 2
    assert errors[0] == errors[1] == errors[2]
