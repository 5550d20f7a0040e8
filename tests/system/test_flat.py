"""A large file costs the runner little memory, and a row of it no more work than a row of a small one."""

import json
import os
import random
import sys
from collections import Counter

import pytest

from flexmoe.job.runner import RowStream
from policies.common.memory_units import MIB
from tests.support.fake_engine import FakeEngine
from tests.support.jobs import Runner, make_setup

pytestmark = pytest.mark.usefixtures("quick_disk")


class Forgetful(FakeEngine):
    """Keeps no request that it has answered."""

    def __init__(self, **options):
        super().__init__(**options)
        self.pulled = self

    def append(self, request):
        """Takes the place of a list of all requests."""


def big_file(path, rows):
    """Rows of about 1 KB; one in a thousand cannot run."""
    rng = random.Random(0)
    ids = [rng.randrange(3, 300) for _ in range(1000)]
    with open(path, "w") as file:
        for row in range(rows):
            start = rng.randrange(800)
            line = {"custom_id": f"request-{row:09}", "prompt": ids[start : start + 190], "max_tokens": 1}
            file.write(json.dumps(line | ({"tools": [{}]} if row % 1000 == 7 else {})) + "\n")


def resident_bytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def grown_bytes(run):
    """How much the resident memory of a process grows at most while it runs, above what it has before."""
    reads, writes = os.pipe()
    process = os.fork()
    if not process:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak is counted from here
            before = resident_bytes("VmRSS:")
            run()
            os.write(writes, str(resident_bytes("VmHWM:") - before).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads, "rb") as file:
        answer = file.read()
    os.waitpid(process, 0)
    return int(answer)


@pytest.mark.parametrize(
    "rows, limit_bytes",
    [
        (8_000, 40 * MIB),
        pytest.param(500_000, 300 * MIB, marks=pytest.mark.slow),
    ],
    ids=["8,000 rows", "500,000 rows"],
)
def test_the_memory_of_a_job_stays_below_its_limit(tmp_path, rows, limit_bytes):
    runner = Runner(tmp_path, make_setup(None, context=1000))
    big_file(runner.input, rows)
    assert runner.input.stat().st_size > 900 * rows

    def run():
        report = runner.run(Forgetful(window=256))
        assert report.rows_ok + report.rows_failed == rows

    grown = grown_bytes(run)
    print(f"{rows} rows: {grown / MIB:.1f} MiB, {grown / rows:.0f} bytes a row")
    assert runner.output.exists() and grown < limit_bytes
    again = grown_bytes(lambda: runner.run(files={"overwrite": False}))
    assert again < limit_bytes


def work(runner, rows):
    """Calls of functions, of Python's and of the operating system's, that a job of so many rows makes."""
    big_file(runner.input, rows)
    calls = Counter()

    def count(_, event, argument):
        if event in ("call", "c_call"):
            calls["function"] += 1
            if event == "c_call" and argument.__module__ == "posix":
                calls["system"] += 1

    sys.setprofile(count)
    try:
        runner.run(Forgetful(window=16))
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.slow
def test_the_work_for_a_row_does_not_grow_with_the_file(tmp_path):
    counts = []
    for rows in (300, 2400):
        directory = tmp_path / str(rows)
        directory.mkdir()
        calls = work(Runner(directory, make_setup(None, context=1000)), rows)
        counts.append({name: count / rows for name, count in calls.items()})
    small, large = counts
    print(f"calls for a row: {small} of 300 rows, {large} of 2400")
    assert large["function"] < 1.1 * small["function"]
    assert large["system"] < 1.1 * small["system"] < 40


def test_what_is_left_in_memory_of_finished_rows_is_counts(tmp_path, monkeypatch):
    """Of a row in flight the journal knows what it wrote; of a finished one only the place of its line."""
    runner = Runner(tmp_path, make_setup(None, context=1000))
    big_file(runner.input, 300)
    streams, real = [], RowStream.run
    monkeypatch.setattr(RowStream, "run", lambda self, *args: (streams.append(self), real(self, *args)))
    runner.run(Forgetful(window=16), interval_s=0.0)
    [stream] = streams
    assert not stream._waiting and not stream._journal._written and not stream._journal._partial
