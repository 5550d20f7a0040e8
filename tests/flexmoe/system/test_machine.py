"""What the machine is, and what it has left of cores and disk space."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flexmoe.system import machine


def test_free_disk_is_that_of_the_nearest_existing_directory(tmp_path):
    here, below = machine.free_disk_bytes(tmp_path), machine.free_disk_bytes(tmp_path / "not" / "there" / "yet")
    assert here > 0 and below == pytest.approx(here, rel=0.2)


def test_relative_directory_is_looked_up_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert machine.free_disk_bytes(Path("some/where")) > 0


@pytest.mark.parametrize(
    "quota, cores", [("150000 100000", 1), ("50000 100000", 1), ("100000000 100000", None), ("max 100000", None)]
)
def test_cores_are_those_of_the_affinity_within_the_quota(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text(quota)
    assert machine.usable_cores() == (cores or len(os.sched_getaffinity(0)))


def test_work_of_other_processes_counts_as_busy(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", os.cpu_count)
    before = machine.busy_core_s()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    assert machine.busy_core_s() - before > 0.1


def test_busy_cores_of_a_machine_that_is_not_all_ours_say_nothing(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: os.cpu_count() + 1)
    assert machine.busy_core_s() is None


def test_filesystem_is_that_of_the_longest_mount(tmp_path, monkeypatch):
    mounts = ["/dev/a / ext4 rw 0 0", f"b {tmp_path} tmpfs rw 0 0", f"c {tmp_path}x xfs rw 0 0"]
    monkeypatch.setattr(machine, "lines_of", lambda path: mounts)
    assert machine.filesystem(tmp_path / "not" / "there") == "tmpfs"
    assert machine.filesystem(Path("/elsewhere")) == "ext4"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("avx2 fma f16c", "AVX2"),
        ("avx2 avx512f avx512bw", "AVX-512"),
        ("avx2 avx512f avx512_bf16", "AVX-512 with bf16"),
        ("avx512f avx512_bf16 amx_bf16", "AMX"),
        ("asimd bf16", "NEON with bf16"),
    ],
)
def test_the_instruction_set_is_the_widest_that_multiplies(flags, name):
    assert machine.instruction_set(frozenset(flags.split())) == name


def test_processor_has_a_name():
    assert machine.cpu_name()


def test_thread_that_yields_has_a_lower_priority_and_the_others_keep_theirs():
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def work():
        machine.yield_to_others(10)
        found.append(niceness())
        machine.yield_to_others(50)
        found.append(niceness())

    found, before = [], niceness()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [min(19, before + 10), 19] and niceness() == before
