"""The branches that only CUDA takes, on a device that says it is CUDA and computes on the CPU.

Streams and events do nothing, so nothing here says that work on the GPU is ordered rightly: `test_streams` and the `gpu`
tests do.
"""

import pytest

from flexmoe.engine import engine_plan
from tests.support import flash
from tests.support.exactness import Case, check
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
