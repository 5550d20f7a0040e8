"""Completions as they are asked for: drawn, scored, stopped, several of a prompt, and taken up again after a crash.

What must come out is computed token by token with transformers' model and this project's sampler.
"""

import shutil
from dataclasses import replace

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.errors import UsageError
from flexmoe.params import Resumed
from policies import Policy, Workload
from tests.support.engines import is_clean
from tests.support.references import DRAWN, HOMES, assert_records, prompt_reference, reference, request, run
from tests.support.tiny import offload, transformers_greedy
from tests.support.tokenizers import build_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")


@pytest.fixture(scope="module")
def spoken(tiny, tmp_path_factory):
    """A tiny checkpoint with a tokenizer."""
    directory = tmp_path_factory.mktemp("spoken") / "model"
    shutil.copytree(tiny().directory, directory)
    build_tokenizer(directory, vocab_size=300)
    return directory


@pytest.fixture
def make(tiny, tmp_path):
    made = []

    def call(home="gpu", *, directory=None, rows=4, batches=1, prefill_tokens=1000, **options):
        percent, on_cpu = HOMES[home]
        policy = Policy.from_percent(
            percent,
            gpu_batch_size=rows,
            num_gpu_batches=batches,
            prompt_len=60,
            gen_len=12,
            prefill_tokens=prefill_tokens,
            cpu_attention_percent=on_cpu,
            schedule=options.pop("schedule", "rolling"),
        )
        options = offload(tmp_path) | {"workload": Workload(prompt_len=60, gen_len=12)} | options
        made.append(LLM(directory or tiny().directory, policy=policy, **options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


# Draws.


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "seed": 7},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.5, "logit_bias": {5: 2.0, 9: -100.0}},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_sampler_on_transformers_logits(asked, make, tiny):
    variant, llm = tiny(), make(rows=8)
    rows = (1, 3, 5)
    outputs = run(
        llm,
        *(
            request(variant.prompts[r], f"k{r}", request_id=str(r), max_tokens=10, ignore_eos=True, **asked)
            for r in rows
        ),
    )
    for r in rows:
        expected, _ = reference(variant, variant.prompts[r], 10, key=f"k{r}", **asked)
        assert list(outputs[str(r)].outputs[0].token_ids) == expected


def test_draws_are_the_same_in_any_order_block_home_and_chunking(make, tiny):
    variant, asked = tiny(), [{}, {"top_p": 0.8}, {"top_k": 30, "seed": 3}, {"presence_penalty": 1.0}, {"logprobs": 2}]
    requests = [
        request(variant.prompts[r], f"k{r}", request_id=str(r), max_tokens=3 + r % 9, **DRAWN, **asked[r % 5])
        for r in range(14)
    ]
    expected = {out.request_id: out.outputs[0].token_ids for out in make(rows=14).stream(requests)}
    for home, rows, batches, pace, order in (
        ("all", 3, 2, 31, -1),
        ("disk", 2, 1, 500, 1),
        ("cpu", 5, 1, 17, -1),
        ("gpu", 1, 1, 9, 1),
    ):
        outputs = run(make(home, rows=rows, batches=batches, prefill_tokens=pace), *requests[::order])
        assert {i: out.outputs[0].token_ids for i, out in outputs.items()} == expected, home


def test_a_restart_changes_no_draw_and_no_logprob(make, tiny):
    variant, llm = tiny(), make("all", rows=3, prefill_tokens=40)
    asked = {"max_tokens": 9, "logprobs": 2, "frequency_penalty": 0.5, **DRAWN}
    for r in (2, 3, 4):
        llm.engine.submit(request(variant.prompts[r], f"k{r}", request_id=str(r), **asked))
    outputs, scheduler = {}, llm.engine.scheduler
    for sweep in range(100):
        if sweep in (2, 4, 5, 8) and scheduler.running:
            scheduler.preempt(scheduler.running[sweep % len(scheduler.running)])
        outputs |= {out.request_id: out.outputs[0] for out in llm.engine.step()}
    for r in (2, 3, 4):
        expected, records = reference(variant, variant.prompts[r], 9, key=f"k{r}", **asked)
        assert list(outputs[str(r)].token_ids) == expected
        assert [x.logprob for x in outputs[str(r)].logprobs] == pytest.approx([x.logprob for x in records], abs=2e-5)
    assert is_clean(llm)


def test_seed_of_the_job_serves_rows_without_one_and_the_key_defaults_to_the_request_id(make, tiny):
    prompt = tiny().prompts[3]
    llm = make(seed=5)
    outputs = run(
        llm,
        request(prompt, "", request_id="a", max_tokens=8, **DRAWN),
        request(prompt, "a", request_id="b", max_tokens=8, **DRAWN),
        request(prompt, "a", request_id="c", max_tokens=8, seed=6, **DRAWN),
    )
    ids = {i: list(out.outputs[0].token_ids) for i, out in outputs.items()}
    assert ids["a"] == ids["b"] == reference(tiny(), prompt, 8, key="a", seed=5, **DRAWN)[0] != ids["c"]


# Log-probabilities.


@pytest.mark.parametrize("k", [0, 5, 20])
def test_logprobs_of_generated_tokens_are_those_of_transformers(k, make, tiny):
    variant = tiny()
    (out,) = run(make(), request(variant.prompts[4], max_tokens=8, logprobs=k, **DRAWN)).values()
    completion = out.outputs[0]
    ids = list(completion.token_ids)
    with torch.no_grad():
        logits = variant.model(torch.tensor([[*variant.prompts[4], *ids]])).logits[0]
    expected = logits.log_softmax(-1)[len(variant.prompts[4]) - 1 : -1]
    assert_records(completion.logprobs, ids, expected, k)
    assert out.prompt_logprobs is None


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("pace, at_once", [(1000, None), (13, 1)])
def test_prompts_are_scored_as_by_transformers_and_nothing_is_generated(home, pace, at_once, make, tiny, monkeypatch):
    if at_once is not None:
        monkeypatch.setattr("flexmoe.engine.build.scored_at_once", lambda *_, **__: at_once)
    variant, llm = tiny(), make(home, rows=5, batches=2, prefill_tokens=pace)
    rows = (0, 1, 3, 6, 7, 8)
    outputs = run(
        llm, *(request(variant.prompts[r], request_id=str(r), max_tokens=0, echo=True, logprobs=r % 4) for r in rows)
    )
    for r in rows:
        out, prompt = outputs[str(r)], variant.prompts[r]
        assert_records(out.prompt_logprobs, prompt[1:], prompt_reference(variant, prompt), r % 4)
        (completion,) = out.outputs
        assert (completion.token_ids, completion.finish_reason, completion.logprobs) == ((), "length", ())
    assert llm.metrics()["generated_tokens"] == 0 and is_clean(llm)


def test_prompt_is_scored_beside_the_completions_of_several_samples(make, tiny):
    variant, prompt = tiny(), tiny().prompts[7]
    llm = make("all", rows=3, prefill_tokens=50)
    (out,) = run(llm, request(prompt, max_tokens=5, n=3, prompt_logprobs=2, **DRAWN)).values()
    assert_records(out.prompt_logprobs, prompt[1:], prompt_reference(variant, prompt), 2)
    for index, completion in enumerate(out.outputs):
        assert list(completion.token_ids) == reference(variant, prompt, 5, index=index, **DRAWN)[0]
        assert completion.logprobs is None


def test_scoring_goes_on_after_a_restart(make, tiny):
    variant, prompt, llm = tiny(), tiny().prompts[7], make(prefill_tokens=30)
    llm.engine.submit(request(prompt, max_tokens=2, prompt_logprobs=1, ignore_eos=True))
    llm.engine.step()
    llm.engine.step()
    llm.engine.scheduler.preempt(llm.engine.scheduler.running[0])
    outputs = [out for _ in range(9) for out in llm.engine.step()]
    assert_records(outputs[0].prompt_logprobs, prompt[1:], prompt_reference(variant, prompt), 1)


def test_what_needs_no_sweep_is_answered_without_one(make, tiny):
    llm = make()
    outputs = run(
        llm,
        request(tiny().prompts[3], request_id="echo", max_tokens=0, echo=True),
        request([5], request_id="one token", max_tokens=0, prompt_logprobs=3),
    )
    assert outputs["echo"].outputs[0].token_ids == () and outputs["echo"].prompt_logprobs is None
    assert outputs["one token"].prompt_logprobs == ()
    assert llm.metrics()["sweeps"] == 0


def test_a_stream_of_requests_without_a_sweep_is_pulled_no_further_than_a_block(make, tiny):
    llm, pulled = make(rows=3), []

    def source():
        for number in range(50):
            pulled.append(number)
            yield request([5, 6], request_id=str(number), max_tokens=0, echo=True)

    assert [int(out.request_id) - len(pulled) <= 0 for out in llm.stream(source())] == [True] * 50
    stream = make(rows=3).stream(source())
    pulled.clear()
    next(stream)
    assert len(pulled) == 3
    stream.close()


def test_a_prompt_that_fills_the_context_can_be_scored_but_not_continued(make, tiny):
    llm = make(longest_row=512)
    prompt = (tiny().prompts[4] * 2)[: llm.model.arch.max_position]
    assert "leaves no room" in llm.check(request(prompt, max_tokens=1))
    (out,) = run(llm, request(prompt, max_tokens=0, prompt_logprobs=0)).values()
    assert len(out.prompt_logprobs) == len(prompt) - 1
    assert "context is 512" in llm.check(request([*prompt, 5], max_tokens=0, echo=True))


# Several samples.


@pytest.mark.parametrize("home", HOMES)
def test_samples_of_a_prompt_are_those_of_separate_rows_and_the_prompt_is_computed_once(home, make, tiny):
    variant, llm = tiny(), make(home, rows=3, batches=2, prefill_tokens=64)
    prompt, asked = variant.prompts[7], {"max_tokens": 6, **DRAWN}
    (out,) = run(llm, request(prompt, n=5, **asked)).values()
    for index, completion in enumerate(out.outputs):
        assert completion.index == index
        assert list(completion.token_ids) == reference(variant, prompt, 6, index=index, **DRAWN)[0]
    assert len({c.token_ids for c in out.outputs}) > 1
    metrics, shared = llm.metrics(), (len(prompt) - 1) // 16 * 16
    assert metrics["prompt_tokens"] == len(prompt)
    twice = sum(metrics["tokens_per_sweep"]) - len(prompt) - 4 * (len(prompt) - shared) - 5 * 5
    # Where there are other tiers, a sample that finds that of its prompt full goes there and computes it again.
    assert twice == 0 or (home == "all" and twice in (shared, 2 * shared))
    assert is_clean(llm)


@pytest.mark.parametrize("schedule", ["rolling", "static"])
def test_samples_of_many_prompts_survive_restarts_and_little_memory(schedule, make, tiny):
    variant = tiny()
    llm = make("all", rows=2, batches=2, prefill_tokens=50, kv_tokens=500, longest_row=200, schedule=schedule)
    rows = (3, 5, 7, 2)
    for r in rows:
        llm.engine.submit(request(variant.prompts[r], f"k{r}", request_id=str(r), n=4, max_tokens=3 + r, **DRAWN))
    outputs, scheduler, sweep = {}, llm.engine.scheduler, 0
    while llm.engine.unfinished:
        sweep += 1
        if sweep % 5 == 0 and scheduler.running:
            scheduler.preempt(scheduler.running[sweep % len(scheduler.running)])
        outputs |= {out.request_id: out.outputs for out in llm.engine.step()}
    for r in rows:
        expected = [reference(variant, variant.prompts[r], 3 + r, key=f"k{r}", index=i, **DRAWN)[0] for i in range(4)]
        assert [list(c.token_ids) for c in outputs[str(r)]] == expected
    assert llm.metrics()["prompt_tokens"] == sum(len(variant.prompts[r]) for r in rows)
    assert is_clean(llm)


def test_samples_end_each_at_its_own_end(make, tiny):
    variant, llm, prompt = tiny(), make(rows=8), tiny().prompts[3]
    stop = reference(variant, prompt, 8, index=1, **DRAWN)[0][3]
    (out,) = run(llm, request(prompt, n=4, max_tokens=8, stop_token_ids=(stop,), **DRAWN)).values()
    for index, completion in enumerate(out.outputs):
        expected = reference(variant, prompt, 8, index=index, **DRAWN)[0]
        ends = expected.index(stop) + 1 if stop in expected else 8
        assert list(completion.token_ids) == expected[:ends]
        assert (completion.finish_reason, completion.stop_reason) == (
            ("stop", stop) if stop in expected else ("length", None)
        )


@pytest.mark.parametrize("sweeps", [0, 1, 2, 4])
def test_request_of_several_samples_is_aborted_as_a_whole(sweeps, make, tiny):
    variant, llm = tiny(), make("all", rows=3, prefill_tokens=60)
    llm.engine.submit(request(variant.prompts[7], n=6, max_tokens=9, **DRAWN))
    llm.engine.submit(request(variant.prompts[2], request_id="other", max_tokens=4, ignore_eos=True))
    for _ in range(sweeps):
        llm.engine.step()
    assert llm.engine.abort("r") and not llm.engine.abort("r")
    finished = [out for _ in range(8) for out in llm.engine.step()]
    assert [list(out.outputs[0].token_ids) for out in finished] == [variant.expected(2, 4)]
    assert is_clean(llm)


def test_stream_closed_among_samples_leaves_a_clean_engine(make, tiny):
    variant, llm = tiny(), make("all", rows=3, prefill_tokens=60)
    stream = llm.stream(
        request(variant.prompts[r], request_id=str(r), n=5, max_tokens=2 + r, **DRAWN) for r in (1, 5, 7, 3)
    )
    next(stream)
    stream.close()
    assert is_clean(llm)


# Stop strings.


def texts(llm, ids):
    return [llm.tokenizer.decode(ids[: at + 1]) for at in range(len(ids))]


@pytest.mark.parametrize("length", [1, 3, 6])
def test_text_is_cut_before_the_stop_string_and_the_ids_that_made_it_are_kept(length, make, spoken):
    llm = make(directory=spoken)
    odd = {t: -100 for t in range(300) if not llm.tokenizer.decode([t]).isprintable()}
    asked = {"max_tokens": 40, "seed": 1, "n": 3, "logit_bias": odd, **DRAWN}
    for free in llm.generate("hello world", SamplingParams(**asked))[0].outputs:
        growing = texts(llm, free.token_ids)
        stop = growing[-1][9 : 9 + length]
        ends = next(i for i, text in enumerate(growing) if stop in text) + 1
        out = llm.generate("hello world", SamplingParams(stop=("never there", stop), **asked))[0].outputs[free.index]
        assert out.token_ids == free.token_ids[:ends]
        assert out.text == growing[ends - 1][: growing[ends - 1].index(stop)]
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_completion_without_its_stop_string_is_whole(make, spoken):
    llm = make(directory=spoken)
    free, watched = (
        llm.generate("hello", SamplingParams(max_tokens=30, stop=stop, **DRAWN))[0].outputs[0]
        for stop in ((), ("\x01\x02",))
    )
    assert watched == free and free.text == llm.tokenizer.decode(free.token_ids) and free.stop_reason is None


def test_end_of_sequence_ends_before_a_stop_string_and_has_no_reason(make, spoken, tiny):
    llm, variant = make(directory=spoken), tiny()
    (out,) = llm.generate([variant.prompts[1]], SamplingParams(max_tokens=12, stop_token_ids=variant.eos_ids))
    completion = out.outputs[0]
    assert completion.token_ids[-1] in variant.eos_ids
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert completion.text == llm.tokenizer.decode(completion.token_ids[:-1])


def test_stop_strings_without_a_tokenizer_are_refused(make):
    assert "stop strings need the model's tokenizer" in make().check(request([5], stop="x"))


def test_bias_outside_the_vocabulary_is_refused(make):
    assert "token id 300, which is outside the vocabulary of 300" in make().check(request([5], logit_bias={300: 1}))
    assert make().check(request([5], logit_bias={299: 1})) is None


def test_no_stop_string_counts_among_the_first_tokens(make, spoken):
    llm = make(directory=spoken)
    asked = {"max_tokens": 30, "ignore_eos": True, "repetition_penalty": 1.5}
    (free,) = llm.generate("hello", SamplingParams(**asked))[0].outputs
    growing = texts(llm, free.token_ids)
    stop = growing[9][-1]
    for least in (0, 5, 10, 20):
        (out,) = llm.generate("hello", SamplingParams(stop=stop, min_tokens=least, **asked))[0].outputs
        passed = len(growing[least - 1].rstrip("\ufffd")) if least else 0
        ends = next((i for i in range(least, 30) if growing[i].find(stop, passed) >= 0), None)
        if ends is None:
            assert (out.token_ids, out.finish_reason) == (free.token_ids, "length")
        else:
            assert out.token_ids == free.token_ids[: ends + 1] and out.stop_reason == stop
            assert out.text == growing[ends][: growing[ends].find(stop, passed)]


def test_text_keeps_what_ended_it_and_special_tokens_where_they_are_asked_for(make, spoken):
    llm = make(directory=spoken, eos_ids=(9,))
    ids = llm.tokenizer.encode("the fox")
    end, resumed = 2, (Resumed(token_ids=(*ids, 2)),)  # 1 and 2 are special
    asked = {"max_tokens": 40, "stop_token_ids": (end,)}
    wanted = {
        "the fox": {},
        "<s>the fox": {"skip_special_tokens": False},
        "<s>the fox</s>": {"skip_special_tokens": False, "include_stop_str_in_output": True},
        None: {"detokenize": False},
    }
    for text, more in wanted.items():
        (out,) = run(llm, request([5, 6], resumed=resumed, **asked, **more)).values()
        assert (out.outputs[0].text, out.outputs[0].stop_reason) == (text, end)
    (out,) = run(llm, request([5, 6], resumed=resumed, **asked, include_stop_str_in_output=True)).values()
    assert out.outputs[0].text == "the fox"
    spelled = {"max_tokens": 40, "stop": "<s>", "skip_special_tokens": False, "include_stop_str_in_output": True}
    for said, more in ((None, {"skip_special_tokens": True}), ("<s>", {})):
        asked = spelled | more | {"max_tokens": len(ids)}
        (out,) = run(llm, request([5, 6], resumed=(Resumed(token_ids=ids),), **asked)).values()
        assert out.outputs[0].stop_reason == said
        assert out.outputs[0].text == (said or "the fox")


# A least length.


@pytest.mark.parametrize("least", [1, 5, 9, 12])
def test_greedy_tokens_of_a_least_length_are_those_of_transformers(least, make, tiny):
    variant, llm = tiny(), make("all", rows=3, prefill_tokens=40)
    rows = (1, 3, 5, 7)
    asked = {"max_tokens": 12, "min_tokens": least, "logprobs": 2}
    outputs = run(llm, *(request(variant.prompts[r], request_id=str(r), **asked) for r in rows))
    for r in rows:
        expected = transformers_greedy(
            variant.model, variant.prompts[r], eos_token_id=list(variant.eos_ids), min_new_tokens=least
        )
        (out,) = outputs[str(r)].outputs
        assert list(out.token_ids) == expected
        assert len(out.token_ids) >= least and not {*out.token_ids[:least]} & {*variant.eos_ids}
    changed = [r for r in rows if list(outputs[str(r)].outputs[0].token_ids) != variant.expected(r, eos=True)]
    assert changed, "without it, some of them end earlier"


@pytest.mark.parametrize("asked", [{}, DRAWN | {"ignore_eos": False}], ids=str)
def test_a_row_of_a_least_length_is_resumed_after_any_token(asked, make, tiny):
    llm, prompt = make("all", rows=3, prefill_tokens=40), tiny().prompts[1]
    asked = {"max_tokens": 9, "min_tokens": 6, "logprobs": 1, "stop_token_ids": tuple(range(3, 150)), **asked}
    (whole,) = run(llm, request(prompt, **asked)).values()
    (completion,) = whole.outputs
    assert len(completion.token_ids) > 6 and not {*completion.token_ids[:6]} & {*range(3, 150), *tiny().eos_ids}
    requests = [
        request(
            prompt,
            request_id=str(cut),
            resumed=(Resumed(token_ids=completion.token_ids[:cut], logprobs=completion.logprobs[:cut]),),
            **asked,
        )
        for cut in range(len(completion.token_ids) + 1)
    ]
    for out in run(llm, *requests).values():
        assert out.outputs[0].token_ids == completion.token_ids
        assert out.outputs[0].finish_reason == completion.finish_reason


# After a crash.


@pytest.mark.parametrize("asked", [{}, DRAWN, DRAWN | {"logprobs": 2, "repetition_penalty": 1.3}], ids=str)
def test_a_row_that_is_resumed_after_any_token_ends_as_if_nothing_had_happened(asked, make, tiny):
    llm, prompt = make("all", rows=3, prefill_tokens=40), tiny().prompts[5]
    asked = {"max_tokens": 7, **asked}
    (whole,) = run(llm, request(prompt, **asked)).values()
    completion = whole.outputs[0]
    requests = []
    for cut in range(len(completion.token_ids) + 1):
        logprobs = None if completion.logprobs is None else completion.logprobs[:cut]
        resumed = (Resumed(token_ids=completion.token_ids[:cut], logprobs=logprobs),)
        requests.append(request(prompt, request_id=str(cut), resumed=resumed, **asked))
    before = llm.metrics()["generated_tokens"]
    outputs = run(llm, *requests)
    for cut in range(len(requests)):
        (again,) = outputs[str(cut)].outputs
        assert again.token_ids == completion.token_ids and again.finish_reason == completion.finish_reason
        assert [r.token_id for r in again.logprobs or ()] == [r.token_id for r in completion.logprobs or ()]
    count = len(completion.token_ids)
    assert llm.metrics()["generated_tokens"] - before == count * (count + 1) // 2, "only what was missing"


def test_samples_are_resumed_each_where_it_was_and_the_prompt_is_computed_once(make, tiny):
    variant, prompt = tiny(), tiny().prompts[7]
    asked = {"n": 4, "max_tokens": 6, "prompt_logprobs": 1, **DRAWN}
    (whole,) = run(make(), request(prompt, **asked)).values()
    llm = make("disk", prefill_tokens=50)
    resumed = tuple(Resumed(token_ids=c.token_ids[:cut]) for c, cut in zip(whole.outputs, (6, 2, 0, 5)))
    (again,) = run(llm, request(prompt, resumed=resumed, **asked)).values()
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in whole.outputs]
    assert_records(again.prompt_logprobs, prompt[1:], prompt_reference(variant, prompt), 1)
    assert llm.metrics()["prompt_tokens"] == len(prompt)


def test_a_row_that_was_at_its_end_is_finished_without_a_sweep(make, tiny):
    variant, llm = tiny(), make()
    ended = {
        "length": request(variant.prompts[3], request_id="length", max_tokens=2, resumed=(Resumed(token_ids=(5, 6)),)),
        "eos": request(
            variant.prompts[3], request_id="eos", max_tokens=9, resumed=(Resumed(token_ids=(5, variant.eos_ids[0])),)
        ),
        "stop": request(
            variant.prompts[3], request_id="stop", max_tokens=9, stop_token_ids=(9,), resumed=(Resumed(token_ids=(9,)),)
        ),
    }
    outputs = run(llm, *ended.values())
    assert {i: (out.outputs[0].finish_reason, out.outputs[0].stop_reason) for i, out in outputs.items()} == {
        "length": ("length", None),
        "eos": ("stop", None),
        "stop": ("stop", 9),
    }
    assert llm.metrics()["sweeps"] == 0


def test_a_stop_string_is_found_in_what_was_generated_before_the_crash(make, spoken):
    llm = make(directory=spoken)
    ids = llm.tokenizer.encode("the quick brown fox")[1:]
    asked = {"max_tokens": 40, "stop": "own f", "ignore_eos": True}
    (out,) = run(llm, request([5, 6], resumed=(Resumed(token_ids=ids),), **asked)).values()
    assert (out.outputs[0].text, out.outputs[0].stop_reason, out.outputs[0].token_ids) == ("the quick br", "own f", ids)
    assert llm.metrics()["sweeps"] == 0


def test_prompt_of_a_row_that_had_ended_is_scored_all_the_same(make, tiny):
    variant, prompt, llm = tiny(), tiny().prompts[6], make()
    resumed = (Resumed(token_ids=(5, 6)),)
    (out,) = run(llm, request(prompt, max_tokens=2, prompt_logprobs=2, resumed=resumed)).values()
    assert_records(out.prompt_logprobs, prompt[1:], prompt_reference(variant, prompt), 2)
    assert out.outputs[0].token_ids == (5, 6) and llm.metrics()["generated_tokens"] == 0


@pytest.mark.parametrize(
    "resumed, asked, reason",
    [
        ((Resumed(token_ids=(1,)),), {"n": 2}, "resumes 1 samples"),
        ((Resumed(token_ids=(300,)),), {}, "outside the vocabulary"),
        ((Resumed(token_ids=(3,)),), {"logprobs": 1}, "without the log-probabilities"),
    ],
)
def test_what_cannot_be_resumed_is_refused(resumed, asked, reason, make):
    assert reason in make().check(request([5], resumed=resumed, **asked))


# Rows that take less than they ask for.


@pytest.mark.slow
def test_expected_ends_follow_the_rows_of_the_job_and_change_no_token(make, tiny):
    variant, rows, done = tiny(), (1, 6, 2, 14), {}
    asked = {"max_tokens": 200, "stop_token_ids": tuple(range(0, 300, 12)), **DRAWN}
    requests = [request(variant.prompts[rows[i % 4]], f"k{i}", request_id=str(i), **asked) for i in range(120)]
    for reserve in ("max", "p95"):
        llm = make(rows=64, prefill_tokens=64, kv_tokens=700, longest_row=220, reserve=reserve)
        outputs = run(llm, *requests)
        done[reserve] = {i: out.outputs for i, out in outputs.items()}, llm.metrics()["sweeps"]
        assert is_clean(llm)
    assert done["max"][0] == done["p95"][0]
    assert done["p95"][1] < 0.8 * done["max"][1]


# Looking in from outside.


@pytest.mark.parametrize("last", [1, 2, 4, 7])
def test_a_job_that_stops_after_a_sweep_and_is_resumed_from_in_flight_gives_what_it_would_have_given(last, make, tiny):
    variant, asked = tiny(), {"n": 2, "logprobs": 1, **DRAWN}
    requests = [
        request(variant.prompts[r], f"k{r}", request_id=str(r), max_tokens=2 + r, **asked) for r in (1, 3, 5, 6)
    ]
    whole = {i: out.outputs for i, out in run(make(), *requests).items()}
    llm, done, states, sweeps = make("all", rows=3, prefill_tokens=20), {}, {}, []

    def stop():
        sweeps.append(llm.in_flight())
        if len(sweeps) == last:
            states.update({(state.request_id, state.index): state for state in sweeps[-1]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for out in llm.stream(requests, on_sweep=stop):
            done[out.request_id] = out.outputs
    assert is_clean(llm)
    assert not {request_id for request_id, _ in states} & set(done), "what was yielded is not in flight"
    left = [r for r in requests if r.request_id not in done]
    done |= {i: out.outputs for i, out in run(make("disk"), *(resumed(r, states) for r in left)).items()}
    assert {i: [c.token_ids for c in o] for i, o in done.items()} == {
        i: [c.token_ids for c in o] for i, o in whole.items()
    }


def resumed(interrupted, states):
    """The request with what its samples had generated."""
    found = [states.get((interrupted.request_id, index)) for index in range(interrupted.params.n)]
    return replace(
        interrupted,
        resumed=tuple(
            Resumed(token_ids=tuple(s.token_ids), logprobs=tuple(s.logprobs)) if s else Resumed() for s in found
        ),
    )


def test_in_flight_ids_are_copies(make, tiny):
    llm = make()
    llm.engine.submit(request(tiny().prompts[3], max_tokens=5, ignore_eos=True))
    assert llm.engine.in_flight() == []
    llm.engine.step()
    (state,) = llm.engine.in_flight()
    llm.engine.step()
    assert state.token_ids == tiny().expected(3, 1) and state.logprobs is None
    assert llm.engine.in_flight()[0].token_ids == tiny().expected(3, 2)


@pytest.mark.parametrize("option", [{"seed": 1.5}, {"seed": 2**63}, {"reserve": "p50"}], ids=str)
def test_an_engine_is_not_made_with_a_wrong_seed_or_reserve(option, make):
    with pytest.raises(UsageError, match="seed is|reserve is"):
        make(**option)
