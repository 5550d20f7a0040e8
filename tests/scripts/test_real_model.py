"""The demo's real model: the runtime says what transformers says of it. The model is downloaded unless it is in the cache."""

import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmoe.errors import FlexMoEError
from scripts.checkpoints.smollm2 import smollm2_gguf
from scripts.demonstration.models import questions
from scripts.support.corpus import corpus_words
from scripts.upcycle import upcycle
from tests.support.command_lines import THREE_TIERS, Job, body
from tests.support.tiny import Variant, assert_greedy, transformers_greedy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_threads")]
GEN_LEN = 24
EOS = 2
#: Among them one that ends early.
ASKED = [
    row for row in questions() if row["custom_id"] in ("stem-1", "math-2", "humanities-2", "coding-1", "extraction-1")
]
TEXT = " ".join(corpus_words()[:220])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(experts)`: the checkpoint. It is large, so it is removed at the end."""
    try:
        file = smollm2_gguf()
    except FlexMoEError as error:
        pytest.skip(f"the real model is not here: {error}")
    home = tmp_path_factory.mktemp("real")
    yield lambda experts: upcycle(file, home / f"of-{experts}", experts=experts)
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def mixture(made):
    return made(experts=8)


@pytest.fixture(scope="module")
def tokenizer(mixture):
    return AutoTokenizer.from_pretrained(mixture)


def in_float32(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def known(mixture, tokenizer):
    """The model in transformers, and its greedy ids of what is asked."""
    model = in_float32(mixture)
    chats = [row["messages"] for row in ASKED]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    greedy = [transformers_greedy(model, p, eos_token_id=EOS, max_new_tokens=GEN_LEN) for p in prompts]
    return Variant(mixture, model, prompts, greedy, (EOS, EOS))


def test_float32_answers_are_those_of_transformers(known, tokenizer, tmp_path, main):
    lines = [row | {"max_tokens": GEN_LEN, "temperature": 0, "return_token_ids": True} for row in ASKED]
    job = Job(known.directory, tmp_path, lines)
    code, _, said = main(job.args("--dtype", "float32", *THREE_TIERS))
    assert code == 0, said
    ends = []
    for row, line in enumerate(job.lines()):
        (choice,) = body(line)["choices"]
        assert_greedy(known, row, choice["token_ids"], known.greedy[row])
        assert choice["message"]["content"] == tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
        assert not any(mark in choice["message"]["content"] for mark in ("Ġ", "Ċ", "<|"))
        ends.append((choice["finish_reason"], choice["token_ids"][-1] == EOS))
    assert set(ends) == {("stop", True), ("length", False)}


def perplexity(logprobs):
    return math.exp(-sum(logprobs) / len(logprobs))


@torch.no_grad()
def transformers_perplexity(model, ids):
    logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return perplexity(logprobs[range(len(ids) - 1), ids[1:]].tolist())


def test_perplexity_is_that_of_transformers_and_of_the_dense_model(known, made, tokenizer, tmp_path, main):
    job = Job(
        known.directory, tmp_path, [{"custom_id": "t", "prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 1}]
    )
    code, _, said = main(job.args("--dtype", "float32", *THREE_TIERS))
    assert code == 0, said
    first, *logprobs = body(job.lines()[0])["choices"][0]["logprobs"]["token_logprobs"]
    ids = tokenizer(TEXT)["input_ids"]
    assert first is None and len(logprobs) == len(ids) - 1 > 200
    measured = perplexity(logprobs)
    assert 2 < measured < 200, "a language model is no more surprised by English than that"
    assert measured == pytest.approx(transformers_perplexity(known.model, ids), rel=1e-4)
    assert measured == pytest.approx(transformers_perplexity(in_float32(made(experts=0)), ids), rel=1e-4)
