"""Requests that name no limit: they end where the model ends them, or where there is no more room for them."""

import json
import shutil

import pytest

from flexmoe import LLM, EngineRequest, SamplingParams, Workload
from flexmoe.engine import length_estimate
from flexmoe.engine.length_estimate import FIRST_ROWS, LengthEstimate
from flexmoe.engine.scheduler import Row
from flexmoe.params import DEFAULT_MAX_TOKENS, EXPECTED_NEW_TOKENS
from tests.support.engines import is_clean

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")
CONTEXT = 120
PROMPTS = [tuple(range(5, 5 + length)) for length in (3, 20, 61)]


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory):
    """A tiny checkpoint with a short context."""
    directory = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny().directory, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return directory


@pytest.fixture
def make(directory, tmp_path):
    made = []

    def call(**options):
        options = {"policy": None, "device": "cpu", "offload_dir": tmp_path, "eos_ids": (10**6,)} | options
        made.append(LLM(directory, **options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


def ends(llm, params):
    """(ids, finish reason) of each prompt."""
    requests = [EngineRequest(request_id=str(i), prompt_token_ids=p, params=params) for i, p in enumerate(PROMPTS)]
    found = {int(out.request_id): out for out in llm.stream(requests)}
    assert not any(out.error for out in found.values())
    return [(found[i].outputs[0].token_ids, found[i].outputs[0].finish_reason) for i in range(len(PROMPTS))]


def test_open_rows_have_the_ids_of_rows_that_ask_for_the_rest_of_the_context(make):
    llm = make()
    whole = ends(llm, SamplingParams())
    assert [len(ids) + len(prompt) for (ids, _), prompt in zip(whole, PROMPTS)] == [CONTEXT] * len(PROMPTS)
    assert whole == ends(llm, SamplingParams(max_tokens=CONTEXT)) and is_clean(llm)


def test_an_open_row_ends_at_its_eos_beyond_the_usual_limit(make):
    ids, _ = ends(make(), SamplingParams())[0]
    at = next(i for i in range(DEFAULT_MAX_TOKENS, CONTEXT) if ids[i] not in ids[:i])
    [(stopped, reason), *_] = ends(make(eos_ids=(ids[at],)), SamplingParams())
    assert (stopped, reason) == (ids[: at + 1], "stop")


def test_an_open_row_ends_where_its_kv_tier_is_full_and_is_no_error(make):
    whole = ends(make(), SamplingParams())
    llm = make(kv_tokens=80, longest_row=80, workload=Workload(prompt_len=20, gen_len=20))
    room = llm.largest_row_tokens
    assert PROMPTS[-1] and len(PROMPTS[-1]) < room < CONTEXT
    for (ids, reason), (all_ids, _), prompt in zip(ends(llm, SamplingParams()), whole, PROMPTS):
        assert reason == "length" and len(prompt) + len(ids) == room + 1 and ids == all_ids[: len(ids)]
    assert llm.check(EngineRequest(request_id="", prompt_token_ids=(7,) * room, params=SamplingParams())) is None
    too_long = EngineRequest(request_id="", prompt_token_ids=(7,) * (room + 1), params=SamplingParams())
    assert "were planned for at most" in llm.check(too_long)


def test_rows_that_turn_out_longer_than_expected_are_restarted_and_lose_nothing(make, monkeypatch):
    """Four open rows are expected to share the cache, and there is room for two that are as long as they become."""
    monkeypatch.setattr(length_estimate, "EXPECTED_NEW_TOKENS", 16)
    llm = make(kv_tokens=2 * CONTEXT, longest_row=CONTEXT, workload=Workload(prompt_len=20, gen_len=20))
    requests = [
        EngineRequest(request_id=str(i), prompt_token_ids=PROMPTS[0], params=SamplingParams()) for i in range(4)
    ]
    found = [out.outputs[0].token_ids for out in llm.stream(requests)]
    assert len(set(found)) == 1 and len(found[0]) == CONTEXT - len(PROMPTS[0])
    assert llm.metrics()["most_rows_in_flight"] > 2 and llm.metrics()["restarts"] > 0 and is_clean(llm)


def test_prompts_without_a_limit_have_32_tokens_and_gen_len_sets_another_default(make):
    llm = make()
    several = [list(prompt) for prompt in PROMPTS]
    for params in (None, SamplingParams(), [SamplingParams()] * len(PROMPTS)):
        assert [len(o.outputs[0].token_ids) for o in llm.generate(several, params)] == [DEFAULT_MAX_TOKENS] * 3
    assert [len(o.outputs[0].token_ids) for o in make(gen_len=7).generate(several)] == [7] * 3
    assert [len(ids) for ids, _ in ends(make(gen_len=7), SamplingParams())] == [7] * 3


# What is reserved for them.

LIMIT = 100_000


def row(generated=0, **params):
    request = EngineRequest(request_id="r", prompt_token_ids=(1,) * 30, params=SamplingParams(**params))
    return Row(request, [1] * (30 + generated), 30 + LIMIT)


@pytest.mark.parametrize(
    "generated, expected", [(0, EXPECTED_NEW_TOKENS), (255, 256), (256, 512), (3000, 4096), (99_999, LIMIT)]
)
def test_an_open_row_is_expected_to_take_little_and_then_twice_what_it_has(generated, expected):
    assert LengthEstimate(list, open_rows=True).expected_end(row(generated)) == 30 + expected


def test_rows_that_name_a_limit_are_expected_there():
    assert LengthEstimate(list, open_rows=True).expected_end(row(max_tokens=LIMIT)) == 30 + LIMIT
    assert LengthEstimate(list, open_rows=True).expected_end(row(ignore_eos=True)) == 30 + LIMIT
    assert LengthEstimate(list).expected_end(row()) == 30 + LIMIT


def test_open_rows_learn_as_others_do_and_guess_beyond_what_was_learned():
    estimate = LengthEstimate(list, open_rows=True)
    for _ in range(FIRST_ROWS):
        estimate.add(row(700))
    assert estimate.expected_end(row()) == 30 + 700
    assert estimate.expected_end(row(1100)) == 30 + 2048
