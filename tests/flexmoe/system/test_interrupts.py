"""Signals and closed streams, from the first line of the program on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flexmoe.system.interrupts import Interrupts, Terminated
from policies.common import command_line
from tests.support.paths import ROOT


@pytest.fixture
def hang_up():
    """Sets what SIGHUP does; as it was afterwards."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda action: signal.signal(signal.SIGHUP, action)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=str)
def test_a_signal_during_the_imports_has_its_exit_code(tmp_path, number, code):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'began')!r}).touch()\ntime.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "flexmoe.run", "--model", "m"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "began").exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "flexmoe: stopped before it began\n")


def test_a_terminal_that_is_closed_stops_as_sigterm_does(hang_up):
    hang_up(signal.SIG_DFL)
    with Interrupts() as interrupts:
        with interrupts.put_off():
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.pending == signal.SIGHUP
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGHUP)


def test_a_program_that_was_started_with_nohup_outlives_the_terminal(hang_up):
    hang_up(signal.SIG_IGN)
    with Interrupts() as interrupts, interrupts.put_off():
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.pending is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_replaced_before_a_file_can_take_their_place(tmp_path, closed):
    code = (
        "import os, sys; from policies.common.command_line import complain, guarded, say\n"
        "def body():\n"
        f"    say('words'), complain('words'), sys.stderr.isatty()\n"
        f"    sys.exit(50 + os.open({str(tmp_path / 'file')!r}, os.O_CREAT))\n"
        "guarded('p', body)\n"
    )
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert 53 <= process.returncode < 60, "a number after those of the three streams"


class Gone:
    encoding = "utf-8"

    def write(self, _):
        raise OSError(5, "Input/output error")

    def flush(self):
        raise OSError(5, "Input/output error")


def test_a_terminal_that_is_gone_changes_no_exit_code(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "stdout", Gone())

    def body():
        command_line.say("words")
        raise KeyboardInterrupt

    assert command_line.guarded("p", body) == 130
