"""Prompts that begin alike, through the whole runtime: ids are transformers', whatever is shared, sent back, aborted or resumed."""

import random
from dataclasses import replace

import pytest

from flexmoe import LLM, EngineRequest, SamplingParams
from flexmoe.params import Resumed
from flexmoe.prefixes.digests import page_digests
from flexmoe.prefixes.finder import find_prefixes
from policies import Policy
from policies.placement import TIERS
from tests.support.engines import RESIDENT, is_clean
from tests.support.exactness import Case, check, make_llm
from tests.support.tiny import GEN_LEN, LONGEST_ROW, Variant, assert_greedy, offload, transformers_greedy

pytestmark = pytest.mark.usefixtures("small_halves", "one_thread", "loads_cost_their_bytes")
PAGE = 16


def random_ids(rng, count):
    return [rng.randrange(3, 300) for _ in range(count)]


def prompts_that_begin_alike():
    """Beginnings of no token, one, a page less one, a page, and many; nested, diverging, inside a page, and whole prompts."""
    rng = random.Random(3)
    head, tail = random_ids(rng, 160), random_ids(rng, 40)
    prompts = [head[:length] + random_ids(rng, 9) for length in (0, 1, 15, 16, 17, 64)]
    prompts += [head + random_ids(rng, length) for length in (1, 5, 30)]
    prompts += [head + tail[:length] + random_ids(rng, 3) for length in (16, 40, 40, 39)]
    return [*prompts, head, head, head[:17], head[:16]]


@pytest.fixture(scope="module")
def alike(tiny):
    """`alike(name)`: a tiny checkpoint with prompts that begin alike."""
    made = {}

    def call(name="gqa-8-to-2"):
        if name not in made:
            base, prompts = tiny(name), prompts_that_begin_alike()
            greedy = [transformers_greedy(base.model, p, eos_token_id=None) for p in prompts]
            made[name] = Variant(base.directory, base.model, prompts, greedy, (greedy[1][4], greedy[7][7]))
        return made[name]

    return call


CASES = [
    Case(placement=RESIDENT, batches=(4, 5), prefill_tokens=1000, eos=False),
    Case(placement=RESIDENT, batches=(16, 1), prefill_tokens=37, eos=False, native=False),
    Case(placement=(100, 0, 0, 100, 100, 0), batches=(8, 2), cpu_attention=100, eos=False),
    Case(placement=(100, 0, 0, 100, 100, 0), batches=(5, 3), cpu_attention=0, eos=False),
    Case(placement=(100, 0, 0, 0, 100, 0), batches=(8, 2), eos=False),
    Case(placement=(30, 30, 30, 30, 30, 30), batches=(3, 6), eos=False, disturbed="sent-back"),
    Case(placement=(60, 0, 0, 60, 50, 0), batches=(3, 4), eos=False, native=False, schedule="static"),
    Case(placement=RESIDENT, batches=(3, 3), eos=False, kv_tokens=480, disturbed="short-sighted"),
    Case(variant="window", placement=(30, 30, 30, 30, 30, 30), batches=(4, 4), eos=False),
    Case(variant="window", placement=RESIDENT, batches=(8, 2), prefill_tokens=1000, eos=False, overlap=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ids_are_those_of_transformers_and_what_is_common_is_computed_once(case, alike, tmp_path, monkeypatch):
    metrics = check(alike(case.variant), case, "cpu", tmp_path, monkeypatch)
    assert metrics["prefix_cache"]["saved_tokens"] > 160
    assert metrics["prompt_tokens"] == sum(map(len, alike(case.variant).prompts))


def test_with_int8_pages_the_ids_are_those_without_prefix_caching(alike, tmp_path, monkeypatch):
    variant, case = alike(), Case(placement=(30, 30, 30, 30, 30, 30), batches=(4, 4), compress_cache=True)
    found = []
    for caching in (True, False):
        llm = make_llm(variant, case, "cpu", tmp_path, monkeypatch, prefix_caching=caching)
        params = SamplingParams(max_tokens=GEN_LEN, ignore_eos=True)
        found.append([output.outputs[0].token_ids for output in llm.generate(variant.prompts, params)])
        assert (llm.metrics()["prefix_cache"]["saved_tokens"] > 0) == caching and is_clean(llm)
        llm.close()
    assert found[0] == found[1]


def tree_of_prompts(rng, count):
    """Prompts of a small tree: nested and diverging beginnings, now and then of whole prompts."""
    branches = [[random_ids(rng, rng.choice((16, 32, 40))) for _ in range(2)] for _ in range(3)]
    prompts = []
    for _ in range(count):
        path = [rng.choice(branches[level]) for level in range(rng.randint(1, 3))]
        prompts.append([*(token for part in path for token in part), *random_ids(rng, rng.choice((1, 5, 12)))])
    return prompts


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow if seed > 3 else ()) for seed in range(16)])
def test_a_prefix_from_another_tier_gives_the_ids_of_one_that_is_computed(seed, tiny, tmp_path, monkeypatch):
    """Drawn tiers, pages and orders; requests are aborted, rows restart, and a killed start is resumed."""
    rng, base = random.Random(seed), tiny(("gqa-8-to-2", "window")[seed % 2])
    case = Case(
        placement=(100, 0, *rng.choice(((30, 30), (50, 50), (50, 0), (0, 50), (20, 50))), 100, 0),
        batches=rng.choice(((3, 4), (6, 2), (2, 8))),
        cpu_attention=rng.choice((0, 50, 100)),
        prefill_tokens=rng.choice((40, 90, 400)),
        kv_tokens=rng.choice((480, 800)),
        overlap=rng.random() < 0.7,
        half_blocks=rng.choice((1, 2)),
    )
    prompts = tree_of_prompts(rng, 24)
    alone = make_llm(base, case, "cpu", tmp_path, monkeypatch, prefix_caching=False)
    params = SamplingParams(max_tokens=GEN_LEN, ignore_eos=True)
    wanted = [list(output.outputs[0].token_ids) for output in alone.generate(prompts, params)]
    alone.close()
    llm = make_llm(base, case, "cpu", tmp_path, monkeypatch)
    engine, copied = llm.engine, []
    copy, tiers = engine.kv.copy, [tier for tier in TIERS if engine.cache.total(tier)]
    monkeypatch.setattr(engine.scheduler.admission, "_tiers", lambda row: rng.sample(tiers, len(tiers)))
    monkeypatch.setattr(engine.kv, "copy", lambda copies: copied.extend(copies) or copy(copies))
    variant = replace(base, prompts=prompts, greedy=wanted)
    requests = {request.request_id: request for request in requests_of(variant)}
    waiting, outputs, aborted, killed = list(requests), {}, set(), False
    generated = {}
    while waiting or engine.unfinished:
        for _ in range(min(len(waiting), rng.randrange(2, 9))):
            chosen = waiting.pop()
            resumed = (Resumed(token_ids=generated.get(chosen, ())),)
            engine.submit(replace(requests[chosen], resumed=resumed))
        running = engine.scheduler.running
        if running and rng.random() < 0.1:
            engine.scheduler.preempt(rng.choice(running))
        if running and rng.random() < 0.05:
            aborted.add(chosen := rng.choice(running).request.request_id)
            engine.abort(chosen)
        if len(outputs) > 6 and not killed:  # and started again
            killed, generated = True, {state.request_id: tuple(state.token_ids) for state in engine.in_flight()}
            engine.clear()
            assert is_clean(llm)
            waiting = [name for name in requests if name not in outputs and name not in aborted]
        outputs |= {output.request_id: output for output in engine.step()}
    assert set(outputs) | aborted == set(requests)
    for name, output in outputs.items():
        assert_greedy(variant, int(name), list(output.outputs[0].token_ids), wanted[int(name)])
    assert copied and killed, "the case shows nothing"
    assert is_clean(llm) and llm.metrics()["prefix_cache"]["saved_tokens"] > 0
    llm.close()


def requests_of(variant, **params):
    tree = find_prefixes(map(page_digests, variant.prompts))
    return [
        EngineRequest(
            request_id=str(i),
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(max_tokens=GEN_LEN, ignore_eos=True, **params),
            prefix_ends=tree.ends(i),
        )
        for i, prompt in enumerate(variant.prompts)
    ]


@pytest.fixture
def llm(alike, tmp_path):
    policy = Policy.from_percent(
        (100, 0, 50, 50, 100, 0), gpu_batch_size=4, num_gpu_batches=2, prompt_len=60, gen_len=GEN_LEN, prefill_tokens=90
    )
    with LLM(alike().directory, policy=policy, **offload(tmp_path)) as made:
        yield made


def test_rows_that_stop_early_and_samples_of_one_prompt_share_as_well(alike, llm):
    variant = alike()
    several = [replace(r, params=replace(r.params, n=1 + i % 3)) for i, r in enumerate(requests_of(variant))]
    several = [
        replace(r, params=replace(r.params, stop_token_ids=variant.greedy[i][i % 9 : i % 9 + 1]))
        for i, r in enumerate(several)
    ]
    outputs = {int(output.request_id): output for output in llm.stream(several)}
    for i, stop in enumerate(r.params.stop_token_ids[0] for r in several):
        ids = variant.greedy[i]
        for sample in outputs[i].outputs:
            assert_greedy(variant, i, list(sample.token_ids), ids[: ids.index(stop) + 1])
    assert is_clean(llm)


def test_cached_tokens_are_those_that_nobody_computed_for_the_request(alike, llm):
    outputs = {int(output.request_id): output for output in llm.stream(requests_of(alike()))}
    cached = [outputs[i].num_cached_tokens for i in range(len(outputs))]
    assert cached[0] == cached[1] == cached[2] == 0
    assert max(cached[6:9]) == 160 and sum(count == 144 for count in cached) + sum(count == 160 for count in cached) > 2
    saved = llm.metrics()["prefix_cache"]["saved_tokens"]
    assert saved == sum(cached) > 0


def test_log_probabilities_of_prompts_that_begin_alike_are_complete(alike, llm):
    variant = alike()
    scored = [replace(r, params=replace(r.params, prompt_logprobs=0)) for r in requests_of(variant)]
    for output in llm.stream(scored):
        prompt = variant.prompts[int(output.request_id)]
        assert [entry.token_id for entry in output.prompt_logprobs] == prompt[1:]
    assert is_clean(llm)


@pytest.mark.parametrize("seed", range(4))
def test_aborted_requests_leave_the_others_as_they_are(seed, alike, llm):
    variant, rng, engine = alike(), random.Random(seed), llm.engine
    waiting, aborted, outputs = requests_of(variant), set(), []
    rng.shuffle(waiting)
    while waiting or engine.unfinished:
        for _ in range(min(len(waiting), rng.randrange(4))):
            engine.submit(waiting.pop())
        running = [row.request.request_id for row in engine.scheduler.running + engine.scheduler.admission.aside]
        if running and rng.random() < 0.3:
            aborted.add(chosen := rng.choice(running))
            assert engine.abort(chosen)
        outputs += engine.step()
    for output in outputs:
        assert_greedy(
            variant, int(output.request_id), list(output.outputs[0].token_ids), variant.greedy[int(output.request_id)]
        )
    assert {int(o.request_id) for o in outputs} | set(map(int, aborted)) == set(range(len(variant.prompts)))
    assert is_clean(llm)


@pytest.mark.parametrize("sweeps", [1, 3, 8, 14])
def test_a_start_that_resumes_what_a_killed_one_had_generated_ends_with_the_same_ids(sweeps, alike, llm):
    variant, engine, requests = alike(), llm.engine, requests_of(alike())
    for request in requests:
        engine.submit(request)
    done = {output.request_id: output for _ in range(sweeps) for output in engine.step()}
    kept = {state.request_id: tuple(state.token_ids) for state in engine.in_flight()}
    engine.clear()
    assert is_clean(llm)
    left = [
        replace(r, resumed=(Resumed(token_ids=kept.get(r.request_id, ())),))
        for r in requests
        if r.request_id not in done
    ]
    for output in llm.stream(left):
        row = int(output.request_id)
        assert_greedy(variant, row, list(output.outputs[0].token_ids), variant.greedy[row])
    assert is_clean(llm) and llm.largest_row_tokens >= LONGEST_ROW - 1
