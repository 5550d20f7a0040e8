"""Runs tests of the project for a stage of the GPU benchmark, within its time."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Sequence

from scripts.benchmark.worker import ROOT
from scripts.gpu.context import Context


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
