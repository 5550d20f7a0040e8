"""Workers that crash, hang or fail are noticed, and the other tasks are done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexmoe.preflight.worker_pool import Task, WorkerPool


def run(works, count=2, setup=None, limit_s=60):
    waiting = [Task(work=work, limit_s=1 if work == "hang" else limit_s) for work in works][::-1]
    with WorkerPool("tests.support.echo_worker", setup or {}, count) as pool:
        return list(pool.run(lambda: waiting.pop() if waiting else None))


def test_every_task_is_answered_and_large_answers_are_whole():
    works = [*range(20), "ä" * 3_000_000]
    assert sorted(map(str, (a.result for a in run(works)))) == sorted(str(w * 2) for w in works)


def test_nothing_is_started_for_no_task():
    assert run([]) == []


def test_a_task_whose_worker_dies_or_hangs_is_lost_and_the_others_are_not():
    answers = run([1, "die", 2, "hang", 3, 4])
    assert sorted(a.result for a in answers if a.lost is None) == [2, 4, 6, 8]
    lost = {a.task.work: a.lost for a in answers if a.lost}
    assert lost == {"die": "the process that worked on it died", "hang": "it took longer than 1 s"}


def test_a_task_that_fails_otherwise_is_an_error_of_the_program():
    with pytest.raises(RuntimeError, match="KeyError.*something else"):
        run([1, "raise"])


def test_workers_that_do_not_start_are_an_error():
    with pytest.raises(RuntimeError, match="do not start"):
        run([1], setup={"refuse": True})


def test_no_worker_is_left_when_the_run_is_given_up():
    with WorkerPool("tests.support.echo_worker", {}, 2) as pool:
        waiting = [Task(work=n, limit_s=60) for n in range(5)]
        next(pool.run(lambda: waiting.pop() if waiting else None))
        processes = [worker.process for worker in pool._workers]
        assert processes
    assert all(process.returncode is not None for process in processes)
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


PARENT = """
import sys
from flexmoe.preflight.worker_pool import Task, WorkerPool

waiting = [Task(work={"hang and tell": sys.argv[1]}, limit_s=600), Task(work=1, limit_s=600)]
pool = WorkerPool("tests.support.echo_worker", {}, 1)
for answer in pool.run(lambda: waiting.pop() if waiting else None):
    print(pool._workers[0].process.pid, flush=True)
"""


def test_a_busy_worker_dies_with_a_parent_that_was_killed(tmp_path):
    told = tmp_path / "busy"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(told)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    wait_for(told.exists)
    parent.kill()
    parent.wait()
    try:
        wait_for(lambda: not is_running(worker))
    finally:
        if is_running(worker):
            os.kill(worker, signal.SIGKILL)


def wait_for(happened):
    until = time.monotonic() + 120
    while not happened():
        if time.monotonic() > until:
            pytest.fail("it does not happen")
        time.sleep(0.02)


def is_running(process):
    """Whether it is there, and no zombie that nobody has asked after."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
