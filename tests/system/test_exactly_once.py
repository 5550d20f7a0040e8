"""A runner that is killed at random moments, again and again: every row is there once, to the byte as if nothing had been.

The kills are real (SIGKILL), of processes forked from this one, which has loaded torch already; one form of the test starts
the program anew each time instead.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from flexmoe.cli import run as command
from tests.support.command_lines import THREE_TIERS, body
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread", "fixed_time", "loads_cost_their_bytes")
POLICIES = (
    ["--gpu-batch-size", "4", "--prefill-tokens", "64"],
    [*THREE_TIERS, "--prefill-tokens", "100"],
    [*THREE_TIERS, "--schedule", "static", "--reserve", "max"],
    [
        "--percent",
        "0",
        "50",
        "0",
        "100",
        "0",
        "100",
        "--gpu-batch-size",
        "3",
        "--num-gpu-batches",
        "3",
        "--cpu-cache-compute",
    ],
)
KINDS = (
    {},
    {"temperature": 0.9},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "seed": 11},
    {"n": 2, "temperature": 0.7, "min_p": 0.05},
    {"temperature": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"stop_token_ids": [7, 9, 30], "temperature": 1.0},
)


def write_rows(job, tiny, rows):
    rng = random.Random(rows)
    lines = []
    for row in range(rows):
        prompt = rng.choice(tiny().prompts)[: rng.randrange(1, 40)]
        line = {"custom_id": f"c{row}", "prompt": prompt, "max_tokens": rng.randrange(1, 24), "return_token_ids": True}
        lines.append(line | rng.choice(KINDS) | ({"tools": [{}]} if row % 17 == 5 else {}))
    job.write(lines)


def forked(args):
    """The command line in a process of its own, which may be killed."""
    process = os.fork()
    if process:
        return process
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = command.main(args)
    except BaseException:  # noqa: BLE001 - nothing may go on in a copy of the test
        code = 99
    os._exit(code)


def started(args):
    """The program, started anew."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "flexmoe.run", *args], cwd=ROOT, stdout=quiet, stderr=quiet).pid


def bytes_of(file):
    """None at all where there is no such file, or no longer: the job puts it away at its end."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def kill_when_grown(process, journal, size_bytes):
    """Kills the process once the journal has that many bytes; returns its exit status, None when it was killed."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if bytes_of(journal) >= size_bytes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.0005)
    pytest.fail("the job does not come to an end")


def written(*files):
    """Their bytes, but for what each start found computed by others."""
    return [re.sub(rb'"cached_tokens": \d+', b'"cached_tokens": 0', file.read_bytes()) for file in files]


def check_killed(job, tiny, start, rows, kills, seed):
    write_rows(job, tiny, rows)
    assert command.main(job.args("-o", str(job.directory / "whole.jsonl"), *POLICIES[0])) == 3
    expected = written(job.directory / "whole.jsonl", job.directory / "whole.errors.jsonl")
    work, rng, killed = job.directory / "out.jsonl.flexmoe", random.Random(seed), 0
    journal, lost = work / "journal", []
    step = 0.6 * sum(map(len, expected)) / (kills + 1)
    while True:
        size = bytes_of(journal)
        args = job.args(*rng.choice(POLICIES), "--checkpoint-interval", "0.02")
        # A few bytes on: in the middle of a record, of a checkpoint, of a sweep.
        status = kill_when_grown(start(args), journal, size + rng.randrange(1, int(2 * step)))
        if status is not None:
            break
        killed += 1
        lost.append(bytes_of(journal) - size)
        assert not job.output.exists()
    assert status == 3 and killed >= kills, f"{killed} kills, which found {lost} bytes more each"
    assert written(job.output, job.errors) == expected
    lines = [json.loads(line) for line in job.output.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines) == rows - len(range(5, rows, 17))
    assert all(body(line)["choices"][0]["token_ids"] for line in lines)
    assert sorted(path.name for path in work.iterdir()) == ["manifest.json"]


@pytest.mark.slow
def test_a_job_with_a_compressed_cache_resumes_with_one_only(job, tiny, capsys):
    """Its ids are those of one start but where the last bit of float32 decides what a number is rounded to."""
    job.write([{"custom_id": f"c{row}", "prompt": tiny().prompts[row % 9], "max_tokens": 12} for row in range(24)])
    args = job.args(*POLICIES[1], "--compress-cache", "--checkpoint-interval", "0.02")
    assert command.main([*args, "-o", str(job.directory / "whole.jsonl")]) == 0
    journal = job.directory / "out.jsonl.flexmoe" / "journal"
    assert kill_when_grown(forked(args), journal, (job.directory / "whole.jsonl").stat().st_size // 3) is None
    capsys.readouterr()
    assert command.main(job.args(*POLICIES[1])) == 2
    assert "--compress-cache was True and is False" in capsys.readouterr().err
    assert command.main(args) == 0
    whole, resumed = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (job.directory / "whole.jsonl", job.output)
    )
    assert [line["custom_id"] for line in resumed] == [f"c{row}" for row in range(24)]
    same = [body(a)["choices"] == body(b)["choices"] for a, b in zip(whole, resumed, strict=True)]
    assert sum(same) >= 20


def test_a_job_of_24_rows_that_is_killed_3_times(job, tiny):
    check_killed(job, tiny, forked, rows=24, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_job_of_300_rows_that_is_killed_20_times(job, tiny, seed):
    check_killed(job, tiny, forked, rows=300, kills=20, seed=seed)


@pytest.mark.slow
def test_a_program_that_is_started_anew_each_time(job, tiny):
    check_killed(job, tiny, started, rows=60, kills=4, seed=3)
