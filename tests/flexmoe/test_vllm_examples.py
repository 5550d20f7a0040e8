"""vLLM's offline examples, with another import: what they call exists, and what they print is there.

The scripts are its `basic`, `chat`, sampling and log-probability examples, cut down to their calls.
"""

import logging
import re
from functools import partial

import pytest
import torch

from flexmoe import LLM, SamplingParams, TextPrompt, TokensPrompt
from flexmoe.errors import DataError, UsageError
from scripts.checkpoints.shapes import SIZES
from scripts.make_checkpoint import make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is"]
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "Write an essay about the importance of higher education."},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", SIZES["tiny"], dtype=torch.float32)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """`LLM`, without a plan for this machine, which would have to be measured."""
    return partial(LLM, policy=None, offload_dir=tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def llm(vllm, checkpoint):
    made = vllm(
        model=str(checkpoint),
        tokenizer=str(checkpoint),
        tensor_parallel_size=1,
        gpu_memory_utilization=0.9,
        max_model_len=256,
        max_num_seqs=64,
        dtype="float",
        seed=0,
        trust_remote_code=True,
        enforce_eager=True,
        enable_prefix_caching=True,
        quantization=None,
        kv_cache_dtype="auto",
        swap_space=4,
    )
    yield made
    made.close()


def test_basic(llm):
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8)
    outputs = llm.generate(PROMPTS, sampling_params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt == prompt and isinstance(output.outputs[0].text, str)


def test_chat_with_a_conversation_and_a_list_of_them(llm):
    sampling_params = llm.get_default_sampling_params()
    assert isinstance(sampling_params, SamplingParams)
    sampling_params = SamplingParams(temperature=0.5, max_tokens=4, ignore_eos=True)
    [output] = llm.chat(CONVERSATION, sampling_params, use_tqdm=False)
    assert "higher education" in output.prompt and len(output.outputs[0].token_ids) == 4
    conversations = [CONVERSATION for _ in range(10)]
    outputs = llm.chat(conversations, sampling_params, use_tqdm=True, chat_template_content_format="auto")
    assert len(outputs) == 10
    outputs = llm.chat(
        messages=conversations[:1], sampling_params=sampling_params, add_generation_prompt=True, tools=None
    )
    assert len(outputs) == 1


def test_a_final_message_is_continued(llm):
    started = [*CONVERSATION, {"role": "assistant", "content": "Once upon"}]
    params = SamplingParams(max_tokens=2)
    [output] = llm.chat(started, params, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt.endswith("Once upon")
    with pytest.raises(UsageError, match="give add_generation_prompt=False"):
        llm.chat(started, params, continue_final_message=True)


def test_prompts_in_all_their_forms(llm):
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    ids = llm.get_tokenizer().encode("Hello, my name is")
    forms = ["Hello, my name is", {"prompt": "Hello, my name is"}, {"prompt_token_ids": ids}, ids]
    alone = [llm.generate(form, sampling_params=params, use_tqdm=False)[0] for form in forms]
    together = llm.generate(prompts=forms, sampling_params=[params] * 4)
    assert len({output.outputs[0].token_ids for output in alone + together}) == 1
    assert [output.prompt for output in together] == ["Hello, my name is"] * 2 + [None] * 2
    typed = [TextPrompt(prompt="Hello, my name is"), TokensPrompt(prompt_token_ids=ids)]
    assert [output.prompt_token_ids for output in llm.generate(typed, params)] == [tuple(ids)] * 2
    [both] = llm.generate({"prompt": "shown", "prompt_token_ids": ids}, params)
    assert both.prompt == "shown" and both.prompt_token_ids == tuple(ids)
    assert llm.generate([], params) == []


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1, max_tokens=4),
        SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2, max_tokens=4),
        SamplingParams(n=2, best_of=2, temperature=0.8, top_p=0.95, frequency_penalty=0.1, max_tokens=4),
        SamplingParams(temperature=1.0, seed=42, min_tokens=2, stop=["\n"], stop_token_ids=None, max_tokens=4),
        SamplingParams(temperature=0.7, repetition_penalty=1.1, skip_special_tokens=False, max_tokens=4),
    ],
    ids=["logprobs", "top_k", "n", "seed", "repetition"],
)
def test_classes_of_sampling_parameters_give_every_field_of_an_output(llm, params):
    [output] = llm.generate("To be or not to be,", params)
    assert output.finished and isinstance(output.request_id, str) and output.metrics is None
    assert list(output.prompt_token_ids) == llm.get_tokenizer().encode(output.prompt)
    assert [completion.index for completion in output.outputs] == list(range(params.n))
    for completion in output.outputs:
        assert completion.finish_reason in ("stop", "length") and completion.stop_reason in (None, "\n")
        assert completion.text is not None and 0 < len(completion.token_ids) <= 4
        assert (completion.cumulative_logprob is None) == (completion.logprobs is None) == (params.logprobs is None)


def test_logprobs_are_read_as_dicts_of_the_token_and_the_most_probable(llm):
    params = SamplingParams(temperature=1.0, seed=3, logprobs=2, prompt_logprobs=0, max_tokens=6, ignore_eos=True)
    [output] = llm.generate("Hello", params)
    [completion] = output.outputs
    total = 0.0
    for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        assert token in logprobs and 2 <= len(logprobs) <= 3 and next(iter(logprobs)) == token
        for token_id, logprob in logprobs.items():
            assert logprob.logprob <= 0 and logprob.decoded_token == llm.tokenizer.token_text(token_id).text
        assert sorted(each.rank for each in logprobs.values() if each.rank) == [1, 2]
        total += logprobs[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) and output.prompt_logprobs[0] is None
    for token, logprobs in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert list(logprobs) == [token]


def test_a_seed_repeats_a_completion(llm):
    params = SamplingParams(temperature=1.0, seed=1234, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate(PROMPTS[0], params)[0].outputs[0].token_ids for _ in range(2))
    assert first == second


def test_no_row_is_longer_than_the_longest_that_is_asked_for(llm):
    ids = [5] * 250
    [output] = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 6
    with pytest.raises(UsageError, match="context of 256"):
        llm.generate([[5] * 256], SamplingParams(max_tokens=1))


def test_defaults_are_those_of_the_models_generation_config(vllm, checkpoint):
    with vllm(checkpoint, max_model_len=64) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        llm.model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
        default = llm.get_default_sampling_params()
        assert (default.temperature, default.top_p) == (0.6, 0.9)
        assert not llm.generate("Hello")[0].error
        llm.model.generation_config.update(top_p=7)
        with pytest.raises(DataError, match="top_p is 7; .* ignore it with generation_config='none'"):
            llm.generate("Hello")
    for choice in ("none", "vllm"):
        with vllm(checkpoint, max_model_len=64, generation_config=choice) as llm:
            llm.model.generation_config.update(do_sample=True)
            assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"prompt_token_ids": [[1, 2]]}, "generate does not take prompt_token_ids"),
        ({"prompts": None}, "prompts is None; give a text"),
        ({"prompts": {"text": "x"}}, "prompt 0 has the keys ['text']; give a text"),
        ({"prompts": [{"prompt": "x", "multi_modal_data": {"image": 1}}]}, "multi_modal_data"),
        ({"prompts": ["x", {"prompt": 3}]}, "prompt 1 is {'prompt': 3}; give"),
        (
            {"prompts": "x", "sampling_params": {"max_tokens": 3}},
            "sampling_params is {'max_tokens': 3}; give SamplingParams",
        ),
        ({"prompts": "x", "lora_request": "adapter"}, "there are no adapters"),
        ({"prompts": "x", "sampling": None}, "has no argument 'sampling'"),
    ],
    ids=str,
)
def test_what_generate_cannot_take_is_refused_in_a_sentence(llm, wrong, said):
    with pytest.raises(UsageError) as caught:
        llm.generate(**wrong)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: one GPU is used"),
        ({"quantization": "awq"}, "quantization='awq'"),
        ({"cpu_offload_gb": 10}, "gpu_mem and cpu_mem are the budgets"),
        ({"max_model_length": 10}, "did you mean 'max_model_len'?"),
        ({"gpu_memory": 10}, "did you mean 'gpu_mem'?"),
        ({"max_model_len": 10**9}, "max_model_len is 1000000000; the model's context is"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"gpu_memory_utilization": 0.5, "gpu_mem": 1}, "give one"),
        ({"tokenizer": "no/such"}, "tokenizer is 'no/such'"),
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"revision": "abc"}, "revision='abc'"),
    ],
    ids=str,
)
def test_what_an_llm_cannot_take_is_refused_in_a_sentence_that_lists_ours(vllm, checkpoint, wrong, said):
    with pytest.raises(UsageError) as caught:
        vllm(checkpoint, **wrong)
    assert said in str(caught.value)
    assert "does not take" not in str(caught.value) or "It has model, tokenizer" in str(caught.value)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"maxtokens": 3}, "did you mean 'max_tokens'?"),
        ({"best_of": 3}, "best_of=3: ask for n"),
        ({"guided_decoding": {"json": {}}}, "give structured_outputs"),
        ({"bad_words": ["x"]}, "logit_bias"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens=3"),
    ],
    ids=str,
)
def test_sampling_parameters_of_vllm_that_are_not_ours_are_refused_in_a_sentence_that_lists_ours(wrong, said):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**wrong)
    assert said in str(caught.value) and "It has n, temperature" in str(caught.value)
    with pytest.raises(UsageError, match="by name"):
        SamplingParams(1, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, "float32", "float", "auto"])
def test_dtypes_by_all_their_names(vllm, checkpoint, dtype):
    with vllm(checkpoint, dtype=dtype, max_model_len=64) as llm:
        assert llm.engine.plan.dtype == torch.float32


def test_a_share_of_the_gpus_memory_is_a_budget(vllm, checkpoint, monkeypatch):
    monkeypatch.setattr("flexmoe.system.device.Device.total_bytes", 2**30)
    with vllm(checkpoint, max_model_len=64, gpu_memory_utilization=0.75) as llm:
        assert llm.engine.config.gpu_mem == 0.75


def test_a_log_says_what_changes_nothing_and_how_fast_it_went(vllm, checkpoint, caplog):
    caplog.set_level(logging.INFO, "flexmoe")
    with vllm(checkpoint, max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.5) as llm:
        assert "LLM: enforce_eager changes nothing here" in caplog.text
        assert "gpu_memory_utilization changes nothing on a CPU" in caplog.text
        llm.generate(PROMPTS, SamplingParams(max_tokens=2))
    assert "3 prompts, in " in caplog.text and "token/s" in caplog.text


@pytest.mark.parametrize("wrong", ["hello", 3, b"x"])
def test_a_chat_that_is_no_list_of_messages_is_shown_whole(llm, wrong):
    with pytest.raises(UsageError, match=re.escape(f"messages is {wrong!r}; give a conversation")):
        llm.chat(wrong)


def test_a_result_has_an_error_code_only_with_an_error(llm):
    [output] = llm.generate(["Hello"], SamplingParams(max_tokens=1))
    assert (output.error, output.error_code) == (None, None)
