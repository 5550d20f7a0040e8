"""Memory that runs short: the block shrinks and the run goes on, with the same tokens."""

import logging
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexmoe import LLM, EngineRequest, SamplingParams
from flexmoe.system import memory_watch
from policies import Policy, Workload
from policies.common.memory_units import GIB
from tests.support.drawn import drawn
from tests.support.engines import RESIDENT, STREAMED, is_clean
from tests.support.tiny import GEN_LEN, offload

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = (1, 2, 5, 6, 8, 9)


class Refuses(TorchDispatchMode):
    """From the k-th operation of torch on, so many find no memory for their result."""

    def __init__(self, at, times=1):
        super().__init__()
        self.at, self.left, self.operations = at, times, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations += 1
        if self.left and self.operations > self.at:
            self.left -= 1
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            )
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def make(tiny, tmp_path):
    made = []

    def call(percent, schedule="rolling", **options):
        policy = Policy.from_percent(
            percent, gpu_batch_size=2, num_gpu_batches=2, prompt_len=60, gen_len=GEN_LEN, schedule=schedule
        )
        options = offload(tmp_path) | {"workload": Workload(prompt_len=60, gen_len=GEN_LEN)} | options
        made.append(LLM(tiny().directory, policy=policy, **options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


def requests(variant):
    return [
        EngineRequest(
            request_id=str(row),
            prompt_token_ids=tuple(variant.prompts[row]),
            params=SamplingParams(max_tokens=GEN_LEN, ignore_eos=True),
        )
        for row in ROWS
    ]


def tokens(llm, variant):
    return {int(o.request_id): list(o.outputs[0].token_ids) for o in llm.stream(requests(variant))}


def expected(variant):
    return {row: variant.expected(row, GEN_LEN) for row in ROWS}


@pytest.mark.parametrize(
    "percent, schedule, share",
    drawn(list(product((RESIDENT, STREAMED, (0, 0, 0, 0, 0, 0)), ("rolling", "static"), (0.15, 0.6)))),
)
def test_a_sweep_that_finds_no_memory_is_run_again_with_fewer_rows(make, tiny, caplog, percent, schedule, share):
    variant, llm = tiny(), make(percent, schedule)
    with Refuses(1 << 60) as all_of_it:
        tokens(llm, variant)
    caplog.set_level(logging.WARNING, "flexmoe")
    with Refuses(int(share * all_of_it.operations)) as memory:
        assert tokens(llm, variant) == expected(variant)
    assert memory.left == 0 and is_clean(llm)
    assert 1 <= llm.engine.scheduler.admission.most_rows <= 3
    (said,) = [r.message for r in caplog.records if "memory runs short" in r.message]
    assert "can't allocate memory" in said and f"at most {llm.engine.scheduler.admission.most_rows} rows" in said


def test_without_memory_for_one_row_the_run_fails(make, tiny):
    llm = make(RESIDENT)
    with Refuses(0, times=1000), pytest.raises(RuntimeError, match="can't allocate memory"):
        tokens(llm, tiny())


def test_a_process_near_its_limit_has_fewer_rows_in_flight(make, tiny, monkeypatch, caplog):
    variant, llm = tiny(), make(STREAMED)
    asked = iter([False, True, False, True, True, *[False] * 1000])  # the second time giving back is not enough
    monkeypatch.setattr(memory_watch, "is_short", lambda limit: next(asked))
    caplog.set_level(logging.INFO, "flexmoe")
    assert tokens(llm, variant) == expected(variant)
    in_flight, most = llm.metrics()["rows_in_flight"], llm.engine.scheduler.admission.most_rows
    assert max(in_flight[2:]) <= most < max(in_flight[:2]) and is_clean(llm)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and "memory runs short" in r.message]) == 1


def test_a_process_with_room_changes_nothing(make, tiny):
    llm = make(RESIDENT, memory_limit=8)
    tokens(llm, tiny())
    assert llm.engine.scheduler.admission.most_rows == 4 and llm.engine.scheduler.restarts == 0
    assert llm.engine.plan.limit_bytes == 8 * GIB


def test_freed_pages_give_their_memory_back_and_those_of_rows_keep_theirs(make):
    llm = make(RESIDENT)
    cache = llm.engine.cache
    row = cache.open("gpu")
    cache.reserve(row, 16)
    cache.gpu.fill_(1)
    cache.forget_free()
    held = torch.zeros(cache.total("gpu"), dtype=torch.bool)
    held[row.pages] = True
    assert bool((cache.gpu[:, :, held] == 1).all())
    cache.close(row)
