"""Samples of one prompt, and its scores, where a row's length decides how keys are rotated and the head has a bias.

`tests.support.tiny_families.SWITCH` is the longest row that a LongRoPE rotates by its short factors.
"""

import pytest

from flexmoe import LLM
from flexmoe.engine.requests import RequestRules, RequestState
from flexmoe.params import Resumed
from policies import Policy, Workload
from tests.support.references import (
    DRAWN,
    HOMES,
    assert_records,
    prompt_reference,
    reference,
    request,
    run,
)
from tests.support.tiny import offload
from tests.support.tiny_families import SWITCH

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")
GEN = 12
#: It shares three blocks of KV, and grows past the switch after four tokens.
SHORT = SWITCH - 4


@pytest.fixture
def serve(tmp_path):
    made = []

    def call(variant, home="gpu", *, rows=4, prefill_tokens=1000, **options):
        percent, on_cpu = HOMES[home]
        policy = Policy.from_percent(
            percent,
            gpu_batch_size=rows,
            num_gpu_batches=1,
            prompt_len=SWITCH,
            gen_len=GEN,
            prefill_tokens=prefill_tokens,
            cpu_attention_percent=on_cpu,
        )
        workload = Workload(prompt_len=SWITCH, gen_len=GEN)
        made.append(LLM(variant.directory, policy=policy, workload=workload, **offload(tmp_path) | options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


def prompt_of(tokens):
    return [(7 * at + 3) % 300 for at in range(tokens)]


def expected_samples(variant, prompt, count):
    return [reference(variant, prompt, GEN, index=index, **DRAWN)[0] for index in range(count)]


#: The prompt that grows past the switch is quick in every home, the two others in one.
@pytest.mark.parametrize(
    "tokens, home, rows, prefill_tokens",
    [
        pytest.param(tokens, *ways, marks=() if ways[0] == "gpu" or tokens == SHORT else pytest.mark.slow)
        for ways in (("gpu", 4, 1000), ("all", 2, 25), ("disk", 1, 1000))
        for tokens in (SHORT, SWITCH, SWITCH + 1)
    ],
)
def test_samples_that_outgrow_the_switch_are_those_of_rows_on_their_own(
    tokens, home, rows, prefill_tokens, variants, serve
):
    prompt, llm = prompt_of(tokens), serve(variants("phi"), home, rows=rows, prefill_tokens=prefill_tokens)
    (out,) = run(llm, request(prompt, max_tokens=GEN, n=3, **DRAWN)).values()
    assert [list(o.token_ids) for o in out.outputs] == expected_samples(variants("phi"), prompt, 3)
    assert llm.metrics()["restarts"] == (3 if tokens <= SWITCH else 0)


@pytest.mark.parametrize("had", [(7, 0, 0), (0, 7, 2), (4, 5, 0), (5, 6, 7), (0, 0, 11)], ids=str)
@pytest.mark.parametrize("home", ["gpu", "all"])
def test_resumed_samples_on_both_sides_of_the_switch_are_those_of_rows_on_their_own(had, home, variants, serve):
    prompt = prompt_of(SHORT)
    expected = expected_samples(variants("phi"), prompt, 3)
    resumed = tuple(Resumed(token_ids=tuple(ids[:count])) for ids, count in zip(expected, had))
    llm = serve(variants("phi"), home)
    (out,) = run(llm, request(prompt, max_tokens=GEN, n=3, resumed=resumed, **DRAWN)).values()
    assert [list(o.token_ids) for o in out.outputs] == expected
    assert llm.metrics()["prompt_tokens"] == len(prompt), "the prompt counts once"


@pytest.mark.parametrize(
    "had, scored, order",
    [
        ((7, 0, 2), False, [1, 2, 0]),
        ((7, 0, 2), True, [1, 2, 0]),
        ((7, 9, 5), False, [0, 1, 2]),
        ((7, 9, 5), True, [-1, 0, 1, 2]),
    ],
    ids=str,
)
def test_the_row_that_computes_the_prompt_for_others_is_as_short_where_one_is(had, scored, order):
    rules = RequestRules(
        vocab_size=10_000,
        context=SHORT + GEN,
        largest_row_tokens=SHORT + GEN,
        default_max_tokens=GEN,
        eos_ids=frozenset(),
        seed=0,
        detokenize=None,
        grammars=lambda: None,
        recompute_past=SWITCH,
    )
    resumed = tuple(Resumed(token_ids=(5,) * count) for count in had)
    asked = request(prompt_of(SHORT), max_tokens=GEN, n=3, resumed=resumed, prompt_logprobs=1 if scored else None)
    assert [row.index for row in RequestState(asked, rules).rows] == order


@pytest.mark.parametrize("had", [(7, 7), (7, 0), (0, 7), (12, 12), (12, 7)], ids=str)
def test_prompt_is_scored_at_its_own_length_whatever_its_samples_have_grown_to(had, variants, serve):
    variant, prompt = variants("phi"), prompt_of(SHORT)
    expected = expected_samples(variant, prompt, 2)
    resumed = tuple(Resumed(token_ids=tuple(ids[:count])) for ids, count in zip(expected, had))
    asked = request(prompt, max_tokens=GEN, n=2, prompt_logprobs=2, resumed=resumed, **DRAWN)
    (out,) = run(serve(variant, prefill_tokens=30), asked).values()
    assert_records(out.prompt_logprobs, prompt[1:], prompt_reference(variant, prompt), 2)
    assert [list(o.token_ids) for o in out.outputs] == expected


@pytest.mark.parametrize("name", ["phi", "phi-packed"])
@pytest.mark.parametrize("home", ["gpu", "all"])
def test_scores_of_a_prompt_have_the_bias_of_the_head(name, home, variants, serve):
    variant = variants(name)
    assert variant.model.lm_head.bias.abs().max() > 0.1
    llm = serve(variant, home, prefill_tokens=37, longest_row=160)
    prompts = {str(tokens): prompt_of(tokens) for tokens in (2, 40, SWITCH, SWITCH + 9, 150)}
    asked = [request(ids, request_id=key, max_tokens=0, echo=True, logprobs=3) for key, ids in prompts.items()]
    for key, out in run(llm, *asked).items():
        assert_records(out.prompt_logprobs, prompts[key][1:], prompt_reference(variant, prompts[key]), 3)
