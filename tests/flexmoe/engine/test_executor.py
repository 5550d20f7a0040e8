"""What the executor keeps of a sweep, and whose errors it tells."""

import errno
import os
import weakref

import pytest

from flexmoe.errors import StorageError
from flexmoe.kv.transfers import KVLanes
from flexmoe.system import direct_io
from tests.support.exactness import Case, make_llm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("overlap", [True, False])
def test_cpu_attended_outputs_are_kept_until_they_are_used_and_no_longer(overlap, pretend, tiny, tmp_path, monkeypatch):
    real, outputs, alive = KVLanes._cpu_attend, [], []

    def cpu_attend(self, *args):
        arrived = real(self, *args)
        outputs.append(weakref.ref(arrived.tensor))
        alive.append(sum(output() is not None for output in outputs))
        return arrived

    monkeypatch.setattr(KVLanes, "_cpu_attend", cpu_attend)
    variant = tiny("gqa-8-to-2")
    case = Case(placement=(100, 0, 0, 100, 100, 0), cpu_attention=100, batches=(3, 2), overlap=overlap)
    llm = make_llm(variant, case, "cuda", tmp_path, monkeypatch, longest_row=200)
    try:
        llm.generate([p for p in variant.prompts if len(p) < 100][:6])
    finally:
        llm.close()
    assert len(outputs) > 2 * 2 * variant.model.config.num_hidden_layers
    # The one that is attended, the next one of the schedule, and one whose thread has not let go of it.
    assert max(alive) <= 3, f"{max(alive)} outputs of CPU attention were alive at once"
    assert not any(output() is not None for output in outputs), "some are kept after the job"


class FailingWrites:
    """`os`, of which the k-th write of hidden states fails."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __getattr__(self, name):
        return self._pwritev if name == "pwritev" else getattr(os, name)

    def _pwritev(self, fd, buffers, offset):
        self.calls += 1
        if self.calls == self.at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.pwritev(fd, buffers, offset)


@pytest.mark.parametrize("at", [1, 7, 20])
@pytest.mark.parametrize("overlap", [True, False])
def test_hidden_states_that_could_not_be_written_end_the_sweep(at, overlap, tiny, tmp_path, monkeypatch):
    variant = tiny("gqa-8-to-2")
    case = Case(placement=(100, 0, 100, 0, 0, 0), batches=(3, 2), overlap=overlap)
    llm = make_llm(variant, case, "cpu", tmp_path, monkeypatch, longest_row=200)
    try:
        failing = FailingWrites(at)
        monkeypatch.setattr(direct_io, "os", failing)
        with pytest.raises(StorageError, match="Input/output error"):
            llm.generate([p for p in variant.prompts if len(p) < 100][:6])
        assert failing.calls >= at
    finally:
        llm.close()
