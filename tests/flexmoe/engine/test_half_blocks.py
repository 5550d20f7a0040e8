"""The first of two half-blocks gets its tokens before the second one: the same tokens, and in which order the host does what."""

from dataclasses import replace

import pytest

from flexmoe import LLM
from flexmoe.engine.engine import Engine
from flexmoe.engine.executor import Executor
from flexmoe.sampling.sampler import Sampling
from policies import Policy, Workload, schedule
from tests.support.engines import is_clean
from tests.support.references import HOMES, request, run
from tests.support.tiny import offload

pytestmark = pytest.mark.usefixtures("small_halves", "one_thread", "loads_cost_their_bytes")
ASKED = (
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.0, "top_p": 0.8, "n": 3},
    {"temperature": 1.0, "top_p": 0.999, "logprobs": 2},
    {"prompt_logprobs": 1, "n": 2},
    {"stop_token_ids": tuple(range(100, 200))},
    {"frequency_penalty": 0.7, "presence_penalty": 0.3, "logit_bias": {5: 2.0}},
    {"max_tokens": 0, "prompt_logprobs": 2},
    {"temperature": 1.2, "top_k": 9, "max_tokens": 1},
)


@pytest.fixture
def make(tiny, tmp_path):
    made = []

    def call(home, half_blocks, *, rows=3, batches=3, **options):
        percent, on_cpu = HOMES[home]
        policy = Policy.from_percent(
            percent,
            gpu_batch_size=rows,
            num_gpu_batches=batches,
            prompt_len=60,
            gen_len=8,
            prefill_tokens=70,
            cpu_attention_percent=on_cpu,
            half_blocks=half_blocks,
        )
        workload = Workload(prompt_len=60, gen_len=8)
        options = offload(tmp_path) | {"workload": workload, "expert_cache": "off"} | options
        made.append(LLM(tiny().directory, policy=policy, **options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


def requests_of(variant):
    """Of every kind of row, some of them after a common beginning of two pages."""
    begin = variant.prompts[9][:32]
    asked = [
        request(
            [*(begin if at % 2 else ()), *variant.prompts[at % 6]],
            f"k{at}",
            request_id=str(at),
            **{"max_tokens": 2 + at % 7, **ASKED[at % len(ASKED)]},
        )
        for at in range(2 * len(ASKED))
    ]
    return [replace(each, prefix_ends=(32,)) if int(each.request_id) % 2 else each for each in asked]


def found(outputs):
    return {
        name: (
            [(o.token_ids, o.finish_reason, o.stop_reason) for o in out.outputs],
            [[record.token_id for record in o.logprobs or ()] for o in out.outputs],
            [record.logprob for record in out.prompt_logprobs or ()],
        )
        for name, out in outputs.items()
    }


@pytest.mark.parametrize(
    "home, resident, batches",
    [
        ("cpu", True, 3),
        ("all", False, 2),
        pytest.param("all", False, 3, marks=pytest.mark.slow),
        pytest.param("disk", True, 3, marks=pytest.mark.slow),
        pytest.param("fetch", True, 2, marks=pytest.mark.slow),
    ],
)
def test_rows_of_every_kind_get_the_tokens_that_they_get_in_one_block(home, resident, batches, make, tiny):
    asked = requests_of(tiny())
    expected = found(run(make(home, 1, batches=batches), *asked))
    llm = make(home, 2, batches=batches)
    assert llm.engine.plan.allocation.head_in_halves == resident
    got = found(run(llm, *asked))
    assert got.keys() == expected.keys()
    for name, (ended, chosen, scores) in got.items():
        assert (ended, chosen) == expected[name][:2], name
        assert scores == pytest.approx(expected[name][2], abs=2e-5)
    assert is_clean(llm)


def test_requests_that_are_aborted_between_sweeps_leave_the_others_as_they_are(make, tiny):
    asked = requests_of(tiny())
    llm, expected = make("all", 2), found(run(make("all", 1), *asked))
    for each in asked:
        llm.engine.submit(each)
    outputs = {}
    for sweep in range(60):
        outputs |= {out.request_id: out for out in llm.engine.step()}
        if sweep in (1, 3, 4):
            llm.engine.abort(str(2 * sweep))
    assert {name: each[0] for name, each in found(outputs).items()} == {name: expected[name][0] for name in outputs}
    assert len(outputs) >= len(asked) - 3 and is_clean(llm)


def events_of(monkeypatch, llm):
    """What the host does in a sweep, in order: it issues experts (half, layer), has tokens of a part chosen, waits for them,
    and books them."""
    events, parts = [], {}
    issue, init, chosen, book = Executor._op_expert, Sampling.__init__, Sampling.chosen, Engine._book

    def op_expert(self, op):
        events.append(("experts", op.half, op.layer))
        issue(self, op)

    def sampling(self, *args, **more):
        init(self, *args, **more)
        parts[self] = len([each for each in events if each[0] == "sample"])
        events.append(("sample", parts[self]))

    def waited(self):
        events.append(("wait", parts[self]))
        return chosen(self)

    def booked(self, part, *args):
        book(self, part, *args)
        events.append(("booked", len(part.runs)))

    for owner, name, method in (
        (Executor, "_op_expert", op_expert),
        (Sampling, "__init__", sampling),
        (Sampling, "chosen", waited),
        (Engine, "_book", booked),
    ):
        monkeypatch.setattr(owner, name, method)
    llm.engine.step()
    return events


def test_the_first_half_is_sampled_before_the_last_experts_of_the_second_and_booked_while_those_compute(
    make, tiny, monkeypatch
):
    variant, llm = tiny(), make("cpu", 2, rows=2, batches=3)
    for at in range(6):
        llm.engine.submit(request(variant.prompts[1], f"k{at}", request_id=str(at), max_tokens=4, ignore_eos=True))
    llm.engine.step()
    events, last = events_of(monkeypatch, llm), variant.model.config.num_hidden_layers - 1
    first = events.index(("sample", 0))
    assert max(at for at, each in enumerate(events) if each == ("experts", 0, last)) < first
    assert events[first + 1 :] == [
        *[("experts", 1, last)] * events.count(("experts", 1, last)),
        *(("sample", 1), ("wait", 0), ("booked", 4), ("wait", 1), ("booked", 2)),
    ]


def test_where_the_head_is_streamed_all_rows_get_their_tokens_at_the_end(make, tiny, monkeypatch):
    variant, llm = tiny(), make("all", 2, rows=2, batches=3)
    for at in range(6):
        llm.engine.submit(request(variant.prompts[1], f"k{at}", request_id=str(at), max_tokens=4, ignore_eos=True))
    llm.engine.step()
    events, last = events_of(monkeypatch, llm), variant.model.config.num_hidden_layers - 1
    assert ("experts", 1, last) in events
    assert events[-3:] == [("sample", 0), ("wait", 0), ("booked", 6)]


def test_on_the_cpu_a_sweep_of_few_tokens_marches_as_one(make, tiny, monkeypatch):
    monkeypatch.setattr(schedule, "LEAST_HALF_TOKENS", 3)
    variant, llm = tiny(), make("cpu", 2, rows=2, batches=3)
    for at in range(6):
        llm.engine.submit(request(variant.prompts[1], f"k{at}", request_id=str(at), max_tokens=4, ignore_eos=True))
    prompts, tokens = events_of(monkeypatch, llm), events_of(monkeypatch, llm)
    assert {half for kind, half, *_ in prompts if kind == "experts"} == {0, 1}
    assert {half for kind, half, *_ in tokens if kind == "experts"} == {0}
