"""What a job says about its speed and its end; the clock is the tests' own."""

import contextlib
import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from flexmoe.progress import LOG_INTERVAL_S, Left, Progress, Rates, Steps, Volume, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_rates_are_of_all_and_of_the_last_minute(clock):
    rates = Rates(clock)
    for _ in range(100):
        clock.now += 10
        rates.add(1000, 50)
    for _ in range(12):
        clock.now += 10
        rates.add(0, 100)
    assert rates.whole() == (pytest.approx(100_000 / 1120), pytest.approx(6200 / 1120))
    prompt, generated = rates.recent()
    assert prompt == 0 and generated == pytest.approx(10)


def test_the_marks_of_a_long_job_do_not_pile_up(clock):
    rates = Rates(clock)
    for _ in range(100_000):
        clock.now += 0.1
        rates.add(1, 1)
    assert len(rates._marks) < 100 and rates.recent() == (pytest.approx(10, rel=0.02),) * 2


def test_the_end_follows_from_the_tokens_that_are_left(clock):
    rates = Rates(clock)
    assert rates.seconds_left(Left(prompt_tokens=0, generated_tokens=10)) is None
    clock.now += 10
    rates.add(1000, 100)
    assert rates.seconds_left(Left(prompt_tokens=1000, generated_tokens=500)) == pytest.approx(50)
    assert rates.seconds_left(Left(prompt_tokens=10_000, generated_tokens=500)) == pytest.approx(100)
    assert rates.seconds_left(Left(prompt_tokens=0, generated_tokens=0)) == 0


def test_without_a_terminal_a_line_is_logged_every_half_minute(clock, caplog):
    caplog.set_level(logging.INFO, "flexmoe.progress")
    left = Left(prompt_tokens=0, generated_tokens=3600)
    progress = Progress(10, 2, bar=False, left=lambda: left, clock=clock)
    for _ in range(90):
        clock.now += 1
        progress.sweep(20, 1)
    progress.row()
    assert len(caplog.records) == 90 // LOG_INTERVAL_S
    assert caplog.messages[0] == "2 of 10 rows, 1:00:00 left, in 20 out 1.0 token/s of late (20 and 1.0 in all)"


def test_the_bar_has_rows_and_rates(clock, capsys):
    progress = Progress(10, 2, bar=True, left=lambda: Left(prompt_tokens=0, generated_tokens=5), clock=clock)
    clock.now += 10
    progress.sweep(100, 10)
    progress.row()
    progress.close()
    err = capsys.readouterr().err
    assert "3/10 rows" in err and "0:05 left, in 10 out 1.0 token/s of late (10 and 1.0 in all)" in err


def test_the_time_left_fits_a_narrow_terminal(clock, capsys):
    progress = Progress(1_000_000, 2, bar=True, left=lambda: Left(prompt_tokens=0, generated_tokens=1e6), clock=clock)
    progress._bar.dynamic_ncols, progress._bar.ncols = None, 80
    clock.now += 10
    progress.sweep(1_000_000, 10_000)
    progress._bar.refresh()
    shown = capsys.readouterr().err.split("\r")[-1]
    progress.close()
    assert len(shown) <= 80 and "16:40 left, in " in shown


def test_the_bar_is_not_drawn_every_sweep_and_is_drawn_between_rows(clock, capsys):
    progress = Progress(10, 0, bar=True, left=lambda: Left(prompt_tokens=0, generated_tokens=5), clock=clock)
    now = progress._bar._time()
    progress._bar._time = lambda: now
    progress._bar.last_print_t = now
    capsys.readouterr()
    for _ in range(1000):
        now += 0.01
        progress.sweep(10, 1)
    drawn = capsys.readouterr().err.count("\r")
    progress.close()
    assert 15 <= drawn <= 25, "every half second of ten"


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (90061, "1 d 01:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_steps_are_lines_without_a_terminal_and_another_process_may_name_them(caplog):
    with caplog.at_level("INFO", "flexmoe.progress"), Steps("measuring", bar=False) as steps:
        steps.begin(2, 9, "the disk")
        line = caplog.messages[-1]
        assert line == "measuring, step 2 of 9: the disk"
        steps.relay(line)
        steps.relay("something else, step by step")
    assert caplog.messages == [line, line]


def test_steps_are_a_bar_on_a_terminal(capsys):
    with Steps("measuring", bar=True) as steps:
        steps.begin(1, 3, "the disk")
        steps.begin(2, 3, "copies")
    err = capsys.readouterr().err
    assert "measuring: 0/3" in err and "measuring: 1/3" in err and "copies" in err


@pytest.mark.parametrize("lines, columns", [(0, 0), (24, 0), (0, 80), (24, 30), (24, 120)])
def test_a_terminal_of_any_size_shows_a_bar(lines, columns):
    """A fresh pseudo-terminal says that it has no columns."""
    code = (
        "from flexmoe.progress import Left, Progress\n"
        "shown = Progress(9, 2, bar=True, left=lambda: Left(prompt_tokens=0, generated_tokens=5))\n"
        "shown.row()\nshown.sweep(3, 4)\nshown.close()"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 1 << 16):
                seen += chunk
    os.close(ours)
    assert b"3/9 rows" in seen, seen


def test_a_volume_says_its_share_its_rate_and_the_time_left(clock, caplog):
    with (
        caplog.at_level(logging.INFO, "flexmoe.progress"),
        Volume(10**9, 10**8, "packing", bar=False, clock=clock) as volume,
    ):
        assert "? left" in volume.describe()
        clock.now += LOG_INTERVAL_S
        volume.add(3 * 10**8)
    assert caplog.messages == ["packing: 40 % of 1.0 GB, 10 MB/s, 1:00 left"]


def test_the_bar_of_a_volume_has_the_time_left(capsys):
    with Volume(1 << 30, 0, "packing", bar=True) as volume:
        volume.add(1 << 29)
        assert volume.describe().startswith("50 %")
    assert "packing" in capsys.readouterr().err
