"""The branches that only CUDA takes, on a device that says it is CUDA and computes on the CPU.

Streams and events do nothing, so nothing here says that work on the GPU is ordered rightly: `test_streams` and the `gpu`
tests do.
"""

import threading

import pytest
import torch

from flexmoe.engine import engine_plan
from flexmoe.engine.executor import Executor
from flexmoe.system.uploads import Uploads
from tests.support import flash
from tests.support.exactness import Case, check, make_llm
from tests.support.pretend_cuda import PretendCuda

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")


CASES = [
    Case(placement=(30, 30, 0, 100, 100, 0), cpu_attention=100),
    Case(placement=(30, 30, 0, 100, 0, 100), cpu_attention=50, batches=(3, 6)),
    Case(placement=(0, 0, 0, 0, 0, 0), cpu_attention=0, overlap=False),
    Case(placement=(0, 100, 100, 0, 50, 50), variant="gqa-4-to-1", native=False),
    Case(placement=(10, 20, 30, 30, 30, 30), variant="window", cpu_attention=50, disturbed="sent-back"),
    Case(
        placement=(0, 50, 0, 100, 100, 0), variant="all-experts", cpu_attention=100, batches=(16, 1), schedule="static"
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_branches_give_the_same_ids(case, pretend, tiny, tmp_path, monkeypatch):
    check(tiny(case.variant), case, "cuda", tmp_path, monkeypatch)


@pytest.mark.parametrize("case", CASES[1:5], ids=str)
def test_flash_attention_of_gathered_pages_gives_the_same_ids(case, pretend, tiny, tmp_path, monkeypatch):
    op = flash.everywhere(monkeypatch)
    check(tiny(case.variant), case, "cuda", tmp_path, monkeypatch)
    assert op.calls


def test_at_most_one_host_wait_per_moe_layer(pretend, tiny, tmp_path, monkeypatch):
    devices = []
    monkeypatch.setattr(engine_plan, "Device", lambda name: devices.append(PretendCuda(name)) or devices[-1])
    variant = tiny("gqa-8-to-2")
    metrics = check(variant, CASES[0], "cuda", tmp_path, monkeypatch)
    assert devices[0].host_waits == metrics["sweeps"] * variant.model.config.num_hidden_layers


def test_an_engine_computes_on_its_own_stream_whichever_thread_steps_it(pretend, tiny, tmp_path, monkeypatch):
    """That of the calling thread may belong to another GPU: events recorded there would say nothing about this one's work."""
    variant, seen, real = tiny("gqa-8-to-2"), set(), Executor.run

    def run(executor, block):
        seen.add((threading.current_thread().name, executor._device.current is executor._device.compute))
        return real(executor, block)

    monkeypatch.setattr(Executor, "run", run)
    llm = make_llm(variant, CASES[0], "cuda", tmp_path, monkeypatch, longest_row=200)
    try:
        thread = threading.Thread(target=llm.generate, args=(variant.prompts[:1],), name="another")
        thread.start()
        thread.join()
        llm.engine.logits(variant.prompts[0])
    finally:
        llm.close()
    assert seen == {("another", True), ("MainThread", True)}
    assert llm.engine.device.current is None


def test_the_index_tensors_of_a_sweep_travel_in_one_copy(pretend, tiny, tmp_path, monkeypatch):
    variant, calls, real, sweeps = tiny("gqa-8-to-2"), [], Uploads.__call__, []
    monkeypatch.setattr(Uploads, "__call__", lambda self, arrays: calls.append(arrays) or real(self, arrays))
    run = Executor.run

    def counted(*args):
        calls.clear()
        yield from run(*args)
        sweeps.append(len(calls))

    monkeypatch.setattr(Executor, "run", counted)
    check(variant, CASES[1], "cuda", tmp_path, monkeypatch)
    assert set(sweeps) == {1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_operation_of_a_sweep_waits_for_the_gpu_in_secret(case, tiny, tmp_path, monkeypatch):
    run = Executor.run

    def watched(executor, block):
        parts, part = run(executor, block), None
        while True:
            torch.cuda.set_sync_debug_mode("error")  # of any thread; waits for events are no operations
            try:
                part = next(parts, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if part is None:
                return
            yield part

    monkeypatch.setattr(Executor, "run", watched)
    check(tiny(case.variant), case, "cuda", tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_the_second_gpu_gives_the_same_ids_in_a_thread_that_is_on_the_first(tiny, tmp_path, monkeypatch):
    variant, failed = tiny("gqa-8-to-2"), []

    def stepped():
        try:
            check(variant, CASES[1], "cuda:1", tmp_path, monkeypatch)
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=stepped)
    thread.start()
    thread.join()
    assert not failed, failed
    assert torch.cuda.memory_reserved(0) == 0
