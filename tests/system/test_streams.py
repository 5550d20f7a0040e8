"""Exactness on simulated CUDA streams, in orders that an adversary chooses: no result may depend on how late work runs.

The unmutated engine passes every case in the order of every seed; without one of its waits it fails within few.
"""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.support.exactness import check, sample
from tests.support.kept import kept
from tests.support.stream_cases import CASES, KNOWN_FAULTS, Outcome, run
from tests.support.stream_cuda import simulated
from tests.support.stream_mutants import CAUGHT, Mutant
from tests.support.stream_queues import ORDERS

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")

#: Where the thread of a sweep may wait for the device.
ALLOWED = {
    "kernels/expert_dispatch.route": "the tokens of each expert, once per MoE layer",
    "engine/executor.run": "an event at the beginning of a sweep, when the device has nothing to compute: the clocks are matched",
    "system/uploads.begin": "likewise: the last sweep's uploads",
    "models/common/rotary.__call__": "the angles of positions go up, once per engine",
    "kv/transfers._wait_for_copies": "between two sweeps: pages of a prefix from tier to tier",
    "system/uploads.arrived": "the tokens that were chosen, once per sweep, or once for each half-block",
    "sampling/sampler.chosen": "again while top_p sets are larger than what was sorted",
    "sampling/sampler.records": "log-probabilities that were asked for",
    "sampling/logprobs.records": "likewise",
    "sampling/logprobs.top_tokens": "likewise: whether equal logits are at the edge",
    "weights/expert_loader.settle": "between two sweeps, when on-demand mode begins or ends",
    "weights/transfers.stop": "likewise",
}
#: In the quick tests each case runs in one order, and all orders occur.
QUICK = [(name, at) for at, name in enumerate(CASES)]


@pytest.fixture(scope="module")
def outcome(tiny, variants, in_common):
    """`outcome(name, seed)`: of a run of the unmutated engine, in whichever process it has run."""

    def get(name, seed):
        file = in_common / f"streams-{name.replace(' ', '-')}-{seed}.json"
        found = kept(file, lambda: vars(replace(run(name, _either(tiny, variants), seed), metrics={})))
        return Outcome(**found | {"syncs": Counter(found["syncs"])})

    return cache(get)


def _either(tiny, variants):
    return lambda name: variants(name) if name == "qwen3" else tiny(name)


@pytest.mark.parametrize("name, seed", QUICK, ids=str)
def test_ids_do_not_depend_on_the_order_of_streams(name, seed, outcome):
    found = outcome(name, seed)
    if name in KNOWN_FAULTS:
        assert found.alarm, f"{name} passes: it is no known fault any more"
        return
    assert not found.alarm
    assert found.syncs["kernels/expert_dispatch.route"] >= found.routed > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 32))
@pytest.mark.parametrize("name", sorted(set(CASES) - set(KNOWN_FAULTS)))
def test_ids_do_not_depend_on_any_of_many_orders(name, seed, outcome):
    assert not outcome(name, seed).alarm


@pytest.mark.parametrize(
    "case, seed",
    [
        pytest.param(case, seed, marks=pytest.mark.slow if seed != 30 else ())
        for seed, case in enumerate(sample(48, seed=2))
    ],
    ids=str,
)
def test_random_cases_do_not_depend_on_the_order_of_streams(case, seed, tiny, tmp_path, monkeypatch):
    with simulated(seed) as simulator:
        check(tiny(case.variant), case, "cuda", tmp_path, monkeypatch)
    assert not simulator.faults


@pytest.mark.parametrize("name", ["everything everywhere", "a static block", "experts on demand"])
def test_one_host_wait_per_moe_layer(name, outcome):
    found = outcome(name, dict(QUICK)[name])
    assert found.syncs["kernels/expert_dispatch.route"] == found.routed


@pytest.mark.parametrize("name", ["two half-blocks", "two half-blocks of pinned weights"])
def test_two_host_waits_per_moe_layer_of_two_half_blocks(name, outcome):
    """Sweeps of one GPU batch, the last ones of the job, march as one."""
    found = outcome(name, dict(QUICK)[name])
    assert 1.5 * found.routed < found.syncs["kernels/expert_dispatch.route"] <= 2 * found.routed


def test_a_sweep_waits_for_the_device_at_named_places_only(outcome):
    waits = {where for name, seed in QUICK if name not in KNOWN_FAULTS for where in outcome(name, seed).syncs}
    assert not waits - set(ALLOWED), "hidden waits of the host"
    assert not set(ALLOWED) - waits, "nobody waits there any more: take them off the list"


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(mutant, marks=pytest.mark.slow if at % 3 else ()) for at, mutant in enumerate(CAUGHT)],
    ids=str,
)
def test_an_engine_without_one_of_its_waits_is_caught(mutant, tiny, variants):
    name, known = CAUGHT[mutant]
    # The threads of the host take turns as they like: now and then another seed of the ten has to show it.
    seeds = sorted(range(10), key=lambda seed: seed != known)
    assert any(run(name, _either(tiny, variants), seed, mutant).alarm for seed in seeds)


def test_a_mutant_that_takes_nothing_away_is_refused(tiny, variants):
    with pytest.raises(LookupError, match="name the mutant anew"):
        run("a static block", _either(tiny, variants), 0, Mutant("wait", "weights/slots.nothing"))


# The simulator itself.


@pytest.fixture(params=range(len(ORDERS)), ids=ORDERS)
def simulator(request):
    with simulated(request.param) as simulator:
        yield simulator


def test_a_result_is_there_when_the_host_has_waited_and_not_before():
    with simulated(ORDERS.index("lazy")):
        pinned = torch.ones(4)
        on_device = pinned.to("cuda:0", non_blocking=True) + 1
        assert on_device.device == torch.device("cuda", 0)
        assert on_device.numbers.isnan().all()
        assert on_device.tolist() == [2.0] * 4


def test_a_stream_waits_for_events_of_others_and_for_nothing_else(simulator):
    for waits in (True, False):
        side, made = torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(side):
            x = torch.zeros(3, device="cuda").add_(5)
            made.record()
        if waits:
            made.wait()
        y = x * 2
        assert y.tolist() == [10.0] * 3 or not waits
        side.synchronize()
        assert x.tolist() == [5.0] * 3


@pytest.mark.parametrize("recorded", [True, False])
def test_freed_memory_is_another_tensors_unless_its_use_was_recorded(recorded):
    with simulated(ORDERS.index("lazy")):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = torch.ones(3, device="cuda")
        side.synchronize()
        if recorded:
            x.record_stream(torch.cuda.current_stream())
        y = x + 1
        del x
        assert y.isnan().tolist() == [not recorded] * 3


def test_a_late_copy_reads_what_pinned_memory_holds_then():
    from flexmoe.system.device import Device

    with simulated(ORDERS.index("lazy")):
        pinned, pageable = Device("cuda").host_buffer(4), torch.zeros(4, dtype=torch.uint8)
        copies = [source.to("cuda:0", non_blocking=True) for source in (pinned, pageable)]
        pinned.fill_(7)
        pageable.fill_(7)
        assert [each.tolist() for each in copies] == [[7] * 4, [0] * 4]


def test_a_host_tensor_in_a_kernel_is_a_fault(simulator):
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device="cuda") + torch.ones(3)


def test_waiting_for_an_event_that_nobody_recorded_is_a_fault(simulator):
    with pytest.raises(RuntimeError, match="nobody recorded"):
        torch.cuda.Event().wait()
