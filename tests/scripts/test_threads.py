"""Idle threads of a script wait: those that spin starve what runs beside them."""

import subprocess
import sys

import pytest

SCRIPT = "import scripts, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"


@pytest.mark.parametrize("given, found", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_a_script_says_how_idle_threads_wait_before_torch_is_loaded(monkeypatch, given, found):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [found, "False"]
