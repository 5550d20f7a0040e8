"""The stages `parity` and `races` of the GPU benchmark: tests of the project, within the time of a stage.

`races` runs those of exactness with streams of random pace and with memory that is free filled with NaN, seed after seed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Sequence

from scripts.benchmark.record import Figure
from scripts.benchmark.worker import ROOT
from scripts.gpu.context import Context

RACES = "tests/system/test_exactness.py"
#: A further round is begun only if so much more time than the longest one took is left.
SPARE = 1.2


def parity(run: Context) -> tuple[list[Figure], dict]:
    """The tests marked gpu: float32 tokens equal to transformers', on CUDA."""
    counts = run_tests(run, "parity", ["-m", "gpu and not slow"])
    return [
        Figure(
            what="tests marked gpu that pass",
            value=f"{counts['passed']} of {counts['tests']} ({counts['skipped']} skipped)",
            beside="all of them",
            ratio=counts["passed"] / max(1, counts["tests"]),
            target=1.0,
        )
    ], counts


def races(run: Context) -> tuple[list[Figure], dict]:
    """As many seeds as the time takes, one at least."""
    chosen = ["-m", "not gpu and not slow", "-k", "greedy and window"] if run.rehearse else ["-m", "gpu and not slow"]
    rounds: list[dict] = []
    longest_s = 0.0
    while not rounds or (run.left_s() > SPARE * longest_s and not run.rehearse):
        before = run.left_s()
        counts = run_tests(
            run, f"races-{len(rounds)}", ["-p", "tests.support.races", RACES, *chosen], FLEXMOE_RACES=str(len(rounds))
        )
        rounds.append({"seed": len(rounds), **counts})
        longest_s = max(longest_s, before - run.left_s())
        run.say(f"seed {len(rounds) - 1}: {counts}")
    passed = sum(one["passed"] for one in rounds)
    asked = sum(one["tests"] - one["skipped"] for one in rounds)
    return [
        Figure(
            what=f"tests of exactness with streams of random pace, {len(rounds)} seeds",
            value=f"{passed} of {asked} pass",
            beside="all of them",
            ratio=passed / max(1, asked),
            target=1.0,
        )
    ], {"rounds": rounds}


def run_tests(run: Context, name: str, arguments: Sequence[str], **environment: str) -> dict:
    """Run pytest in a process of its own.

    Args:
        name: of the report in the work directory.
        arguments: of pytest.
        environment: variables beside this process's own.

    Returns:
        dict: ``tests``, ``passed``, ``failures``, ``errors``, ``skipped``, and ``exit_code``, pytest's or ``"timeout"``.
    """
    report = run.workdir / f"gpu-{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider", *arguments]
    code: int | str
    try:
        code = subprocess.run(
            command, cwd=ROOT, timeout=max(1.0, run.left_s()), check=False, env=os.environ | environment
        ).returncode
    except subprocess.TimeoutExpired:
        code = "timeout"
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    if report.exists():
        suite = next(xml.parse(report).getroot().iter("testsuite"))
        counts = {key: int(suite.get(key, 0)) for key in counts}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {**counts, "passed": passed, "exit_code": code}
