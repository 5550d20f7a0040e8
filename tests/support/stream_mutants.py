"""The engine without one of its waits: what each of them is for, as runs on simulated streams show."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest

from tests.support.stream_queues import Event, Simulator, Stream, Wait, caller
from tests.support.stream_tensors import DeviceTensor

_METHODS = {
    "wait": (Event, "wait"),
    "synchronize": (Event, "synchronize"),
    "drain": (Stream, "synchronize"),
    "record": (Event, "record"),
    "record_stream": (DeviceTensor, "record_stream"),
}


@dataclass(frozen=True)
class Mutant:
    """The engine without the calls of a kind that one of its functions makes.

    Attributes:
        kind: ``wait`` of a stream for an event, ``synchronize`` of the host with an event, ``drain`` of a stream by the
            host, ``record`` of an event, which has then always passed, or ``record_stream``.
        where: the function, as ``folder/module.function``.
    """

    kind: str
    where: str

    def __str__(self):
        return f"{self.kind} in {self.where}"

    @contextlib.contextmanager
    def applied(self, simulator: Simulator):
        """Drop the calls.

        Raises:
            LookupError: there was none: no function of that name makes such calls.
        """
        owner, name = _METHODS[self.kind]
        whole, dropped = getattr(owner, name), []

        def method(self_, *args):
            if caller() != self.where:
                return whole(self_, *args)
            dropped.append(self.where)
            if self.kind == "record":
                self_.place = Wait(simulator.current(), 0)
            return None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, method)
            yield
        if not dropped:
            raise LookupError(f"{self.where} makes no call of kind {self.kind}: name the mutant anew")


#: Each with a case and the first seed that catches it there.
CAUGHT = {
    # A slot is filled again while a kernel still reads it.
    Mutant("wait", "weights/slots.copy_to_device"): ("weights from disk", 0),
    Mutant("record", "weights/stream.release"): ("weights from disk", 0),
    Mutant("record", "weights/expert_cache.experts"): ("experts on demand", 0),
    # Weights are used before they have arrived.
    Mutant("wait", "weights/stream._take"): ("one after another", 0),  # a stream that is ahead is paced, which hides it
    Mutant("wait", "weights/expert_cache._tensors"): ("experts on demand", 0),
    Mutant("record", "weights/slots.copy_to_device"): ("weights from disk", 0),
    # A pinned buffer is filled again while a copy still reads it.
    Mutant("synchronize", "weights/slots.wait"): ("weights from disk", 0),
    Mutant("synchronize", "engine/hidden_states._load"): ("hidden states on disk", 0),
    Mutant("synchronize", "kv/transfers._load"): ("fetched KV", 0),
    # The host reads what has not come down yet.
    Mutant("synchronize", "kv/transfers._bring_down"): ("fetched KV", 0),
    Mutant("synchronize", "engine/hidden_states._store"): ("hidden states on disk", 0),
    Mutant("synchronize", "kernels/expert_dispatch.route"): ("weights from pinned memory", 0),
    Mutant("synchronize", "kv/transfers._wait_for_copies"): ("prompts from tier to tier", 0),
    Mutant("synchronize", "system/uploads.arrived"): ("two half-blocks of pinned weights", 0),
    Mutant("record", "system/uploads.bring"): ("two half-blocks of pinned weights", 0),
    # A copy takes what has not been computed yet.
    Mutant("wait", "kv/transfers._bring_down"): ("fetched KV", 0),
    Mutant("record", "kv/transfers.store"): ("fetched KV", 0),
    Mutant("wait", "engine/hidden_states._store"): ("hidden states in host memory", 0),
    Mutant("record", "engine/hidden_states.store"): ("hidden states in host memory", 0),
    # The staging buffer of fetched KV is filled again while attention still reads it.
    Mutant("wait", "kv/transfers._load"): ("fetched KV", 0),
    Mutant("record", "kv/transfers.attend_fetched"): ("fetched KV", 0),
    # A kernel uses what another stream has not brought yet.
    Mutant("wait", "engine/executor._wait"): ("attention on the CPU", 0),
    Mutant("record", "system/uploads.__call__"): ("fetched KV", 0),
    Mutant("record", "kv/transfers._load"): ("fetched KV", 0),
    Mutant("record", "kv/transfers._cpu_attend"): ("attention on the CPU", 0),
    Mutant("record", "engine/hidden_states._load"): ("hidden states in host memory", 0),
    # Memory of another stream is freed while a kernel still reads it.
    Mutant("record_stream", "engine/hidden_states.__getitem__"): ("hidden states in host memory", 0),
}
