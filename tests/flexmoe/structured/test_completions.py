"""Completions of a random model, which writes nothing sensible of its own accord, hold to what is asked for."""

import json
import re
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.errors import UsageError
from flexmoe.params import EngineRequest, Resumed
from flexmoe.sampling.grammar_masks import permit_only
from flexmoe.sampling.penalties import waiting
from scripts.structured.schemas import SCHEMAS
from tests.support.engines import is_clean
from tests.support.serving import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
EOS = 2
LETTERS = {"regex": "[a-f]{2,}"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("model"))
    with LLM(model, policy=None, device="cpu", offload_dir=tmp_path_factory.mktemp("off"), longest_row=400) as made:
        yield made


def sampling(structure, **given):
    return SamplingParams(structured_outputs=structure, **({"temperature": 1.0, "max_tokens": 300} | given))


def completions(llm, params, prompts=None):
    several = params if isinstance(params, list) else [params]
    outputs = llm.generate(prompts or ["hello"] * len(several), several)
    return [each for output in outputs for each in output.outputs]


def test_rows_at_temperature_1_are_valid_against_their_schemas(llm):
    params = [sampling({"json": schema}, seed=row) for row in range(3) for schema in SCHEMAS]
    for each, param in zip(completions(llm, params), params, strict=True):
        assert each.finish_reason == "stop" and each.stop_reason is None
        jsonschema.validate(json.loads(each.text), json.loads(param.structure.schema))
    assert is_clean(llm)


def test_samples_of_one_prompt_are_valid_each(llm):
    found = completions(llm, sampling({"regex": "[a-f]{9}"}, n=4))
    assert len({each.text for each in found}) == 4
    assert all(re.fullmatch("[a-f]{9}", each.text) and each.finish_reason == "stop" for each in found)


def test_a_row_is_the_same_alone_and_among_others(llm):
    params = [sampling({"json": SCHEMAS[0]}), sampling(LETTERS), sampling(None, max_tokens=9)]
    ids = llm.tokenizer.encode("hello")
    requests = [EngineRequest(request_id=str(at), prompt_token_ids=ids, params=each) for at, each in enumerate(params)]
    together = {each.request_id: each.outputs for each in llm.stream(requests)}
    for request in requests:
        assert [each.outputs for each in llm.stream([request])] == [together[request.request_id]]


def test_the_most_probable_token_that_is_permitted_is_taken_at_temperature_0(llm):
    [found] = completions(llm, sampling(LETTERS, temperature=0.0, max_tokens=6))
    letters = {id for id in range(320) if re.fullmatch("[a-f]+", llm.tokenizer.decode((id,)))}
    ids, generated = list(llm.tokenizer.encode("hello")), []
    for token in found.token_ids:
        logits = llm.logits(ids + generated)[-1]
        permitted = letters | ({EOS} if len(llm.tokenizer.decode(generated)) >= 2 else set())
        assert token == max(permitted, key=lambda id: logits[id])
        generated.append(token)


def test_the_end_is_permitted_only_where_the_text_is_complete(llm):
    [found] = completions(llm, sampling({"regex": "[a-f]{5,}"}, logit_bias={EOS: 100.0}))
    assert len(found.text) >= 5 and found.token_ids[-1] == EOS and found.finish_reason == "stop"
    assert EOS not in found.token_ids[:-1] and len(found.token_ids) <= 6


def test_what_is_cut_by_its_limit_says_so(llm):
    [found] = completions(llm, sampling({"regex": "[a-f]{50}"}, max_tokens=4))
    assert found.finish_reason == "length" and len(found.token_ids) == 4


def test_an_ignored_end_is_not_written_and_a_grammar_that_is_over_ends_the_row(llm):
    [free] = completions(llm, sampling(LETTERS, ignore_eos=True, max_tokens=40))
    assert free.finish_reason == "length" and re.fullmatch("[a-f]+", free.text) and EOS not in free.token_ids
    [over] = completions(llm, sampling({"choice": ["hello", "world"]}, ignore_eos=True, min_tokens=30))
    assert over.finish_reason == "stop" and over.text in ("hello", "world")


def test_ends_wait_for_the_least_number_of_tokens(llm):
    [found] = completions(llm, sampling(LETTERS, min_tokens=12, logit_bias={EOS: 100.0}))
    assert len(found.token_ids) == 13 and found.token_ids[-1] == EOS


def test_stop_strings_and_stop_ids_end_a_row_before_its_grammar(llm):
    [found] = completions(llm, sampling({"regex": "(ab){20}"}, stop=["bab"]))
    assert (found.text, found.finish_reason, found.stop_reason) == ("a", "stop", "bab")
    dash = llm.tokenizer.token_id("-")
    [found] = completions(llm, sampling({"regex": "[a-f]{3}-[a-f]{9}"}, stop_token_ids=[dash]))
    assert (len(found.text), found.stop_reason) == (3, dash)


def test_log_probabilities_are_the_models_own(llm):
    [found] = completions(llm, sampling({"choice": ["hello"]}, logprobs=0))
    ids = list(llm.tokenizer.encode("hello"))
    for token, record in zip(found.token_ids, found.logprobs, strict=True):
        assert record.logprob == pytest.approx(float(llm.logits(ids)[-1].log_softmax(-1)[token]), abs=1e-4)
        ids.append(token)


def test_penalties_top_p_and_an_endless_temperature_choose_among_what_is_permitted(llm):
    for given in ({"top_p": 0.5, "top_k": 3}, {"temperature": 1e300}, {"repetition_penalty": 1.7}, {"min_p": 0.9}):
        [found] = completions(llm, sampling({"regex": "[a-f]{9}"}, **given))
        assert re.fullmatch("[a-f]{9}", found.text), given


@pytest.mark.parametrize("kept", [1, 5, -1], ids=["one", "five", "all"])
def test_a_row_resumes_after_what_it_has(llm, kept):
    params = sampling({"json": SCHEMAS[0]}, seed=3, n=2)
    ids = llm.tokenizer.encode("hello")
    request = EngineRequest(request_id="r", prompt_token_ids=ids, params=params, stream_key="k")
    [whole] = llm.stream([request])
    cut = [each.token_ids if kept < 0 else each.token_ids[:kept] for each in whole.outputs]
    resumed = replace(request, resumed=tuple(Resumed(token_ids=ids) for ids in cut))
    [again] = llm.stream([resumed])
    assert again.outputs == whole.outputs and is_clean(llm)


def test_a_row_that_resumes_after_what_its_grammar_does_not_have_fails_alone(llm):
    ids = llm.tokenizer.encode("hello")
    wrong = EngineRequest(
        request_id="wrong",
        prompt_token_ids=ids,
        params=sampling({"regex": "[a-f]{9}"}),
        resumed=(Resumed(token_ids=llm.tokenizer.encode_all(["zz"], add_special_tokens=False)[0]),),
    )
    right = EngineRequest(request_id="right", prompt_token_ids=ids, params=sampling({"regex": "[a-f]{9}"}))
    found = {each.request_id: each for each in llm.stream([wrong, right])}
    assert found["wrong"].error_code == "structured_output_failed" and "any further" in found["wrong"].error
    assert re.fullmatch("[a-f]{9}", found["right"].outputs[0].text) and is_clean(llm)


def test_what_cannot_be_compiled_is_refused_before_anything_runs(llm):
    before = llm.tokens
    with pytest.raises(UsageError, match=r"prompt 1: structured output cannot be made so: Unimplemented keys"):
        llm.generate(["hello"] * 2, [sampling({"json": {}}), sampling({"json": {"not": {}}})])
    assert llm.tokens == before
    with pytest.raises(UsageError, match="structured_outputs is 5"):
        SamplingParams(structured_outputs=5)


def test_a_mask_of_another_length_than_the_logits_is_cut_or_permits_no_more():
    x = torch.zeros(3, 21)
    permit_only(x, [None, np.array([1, 128], np.uint8), np.array([255, 255, 255, 255], np.uint8)], waiting(x.device))
    assert torch.isfinite(x[0]).all() and torch.isfinite(x[2]).all()
    assert torch.isfinite(x[1]).nonzero()[:, 0].tolist() == [0, 15]
