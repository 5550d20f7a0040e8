"""Disks that are full, fail or stutter at any call, and memory that runs out at any operation."""

import errno
import os
import random
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexmoe.errors import StorageError
from policies.common import file_io
from tests.support.command_lines import THREE_TIERS
from tests.support.fake_engine import FakeEngine
from tests.support.jobs import Clock, Runner

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread", "fixed_time", "loads_cost_their_bytes")


# Faults of the disk, at every call.


class FaultyOS:
    """`os`, of which the k-th call that `fails` names goes wrong, and with `for_good` all later ones too."""

    def __init__(self, at, fault, fails, for_good):
        self.at, self.fault, self.fails, self.for_good, self.calls = at, fault, fails, for_good, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.fails:
            return real

        def call(*args, **options):
            self.calls += 1
            if self.calls - 1 == self.at or (self.for_good and self.calls - 1 > self.at):
                return self.fault(name, real, *args, **options)
            return real(*args, **options)

        return call


def fails_with(number):
    def fault(name, real, *args, **options):
        if name == "write":  # a full disk takes what it has room for
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        raise OSError(number, os.strerror(number))

    return fault


def short(name, real, *args, **options):
    if name == "write":
        return real(args[0], bytes(args[1])[: max(1, len(args[1]) // 3)])
    if name == "pread":
        return real(args[0], max(1, args[1] // 3), args[2])
    return real(*args, **options)


WRITES = ("open", "write", "fsync", "replace")
FAULTS = {
    "disk full": (fails_with(errno.ENOSPC), WRITES, True),
    "write error": (fails_with(errno.EIO), WRITES, False),
    "read error": (fails_with(errno.EIO), ("open", "pread"), False),
    "short": (short, ("write", "pread"), True),
}


def small_job(bare):
    rows = [{"prompt": [9 + i] * (1 + i), "custom_id": f"c{i}", "n": 1 + i % 2} for i in range(5)]
    bare.write([*rows, {"prompt": [9], "n": 0}])


def attempt(bare, monkeypatch, fault=None):
    """Runs the small job on such a disk; returns what it raised."""
    clock = Clock()
    engine = FakeEngine(window=3, on_sweep_start=clock.tick)
    with monkeypatch.context() as patch:
        if fault is not None:
            patch.setattr(file_io, "os", fault)
        try:
            bare.run(engine, clock=clock, interval_s=2)
        except Exception as error:  # noqa: BLE001 - any of them is what is asked for
            return error
    return None


#: Every third call is quick; all of them are slow.
every = pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])


@every
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_call_is_a_sentence_and_the_job_goes_on_afterwards(bare, monkeypatch, name, every, tmp_path):
    fault, fails, for_good = FAULTS[name]
    small_job(bare)
    counting = FaultyOS(-1, None, fails, False)
    assert attempt(bare, monkeypatch, counting) is None and counting.calls > 10
    expected = bare.output.read_bytes(), bare.errors.read_bytes()
    for at in range(0, counting.calls, every):
        directory = tmp_path / f"{at}"
        directory.mkdir()
        other = Runner(directory, bare.setup)
        small_job(other)
        error = attempt(other, monkeypatch, FaultyOS(at, fault, fails, for_good))
        if name == "short":
            assert error is None, f"call {at}: {error!r}"
        elif error is not None:
            assert getattr(error, "exit_code", None) in (66, 74), f"call {at}: {error!r}"
            assert attempt(other, monkeypatch) is None, f"after call {at}"
        assert (other.output.read_bytes(), other.errors.read_bytes()) == expected, f"call {at}"
        left = sorted(path.name for path in directory.iterdir())
        assert left == ["in.jsonl", "out.errors.jsonl", "out.jsonl", "out.jsonl.flexmoe"], f"call {at}"


def killed(name, real, *args, **options):
    """Half of a write is done, and of anything else nothing."""
    if name == "write":
        real(args[0], bytes(args[1])[: len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


@every
def test_a_process_that_is_killed_at_any_call_leaves_what_the_next_one_goes_on_with(bare, monkeypatch, every, tmp_path):
    small_job(bare)
    counting = FaultyOS(-1, None, WRITES, False)
    assert attempt(bare, monkeypatch, counting) is None
    expected = bare.output.read_bytes(), bare.errors.read_bytes()
    for at in range(0, counting.calls, every):
        directory = tmp_path / f"{at}"
        directory.mkdir()
        other = Runner(directory, bare.setup)
        small_job(other)
        process = os.fork()
        if not process:
            attempt(other, monkeypatch, FaultyOS(at, killed, WRITES, False))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL, f"call {at}"
        assert attempt(other, monkeypatch) is None, f"call {at}"
        assert (other.output.read_bytes(), other.errors.read_bytes()) == expected, f"call {at}"
        left = sorted(path.name for path in (*directory.iterdir(), *other.work.iterdir()))
        assert left == ["in.jsonl", "manifest.json", "out.errors.jsonl", "out.jsonl", "out.jsonl.flexmoe"], f"call {at}"


def test_a_disk_that_is_full_for_a_while_loses_no_finished_row(bare, monkeypatch):
    bare.write([{"prompt": [9 + i], "custom_id": f"c{i}"} for i in range(20)])
    real, lines = os.write, []

    def write(descriptor, data):
        if b"batch_req" in bytes(data):
            lines.append(data)
            if len(lines) == 8:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(file_io.os, "write", write)
    with pytest.raises(StorageError, match="No space left"):
        bare.run(FakeEngine(window=1))
    monkeypatch.undo()
    engine = FakeEngine()
    report = bare.run(engine)
    assert (report.rows_ok, report.rows_resumed, len(engine.pulled)) == (20, 7, 13)


class NoMemory(TorchDispatchMode):
    """The k-th operation of torch finds no memory for its result."""

    def __init__(self, at=-1):
        super().__init__()
        self.at, self.operations = at, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations += 1
        if self.operations - 1 == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_memory_that_runs_out_at_any_operation_exits_4_and_the_job_goes_on(job, main, tiny, count):
    job.write([{"prompt": tiny().prompts[row], "max_tokens": 4, "temperature": row / 8} for row in (1, 2, 8, 6)])
    with NoMemory() as memory:
        assert main(job.args(*THREE_TIERS))[0] == 0
    expected = job.output.read_bytes()
    for at in sorted(random.Random(1).sample(range(memory.operations), count)):
        job.output.unlink()
        with NoMemory(at):
            code, _, err = main(job.args(*THREE_TIERS))
        assert (
            code == 4 and err.startswith("flexmoe: memory ran out (CUDA out of memory") and len(err.splitlines()) == 1
        )
        assert not job.output.exists()
        code, _, err = main(job.args("--gpu-batch-size", "2"))
        assert (code, err, job.output.read_bytes()) == (0, "", expected), f"after operation {at}"
