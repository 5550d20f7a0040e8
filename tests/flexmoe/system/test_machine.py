"""What the machine has left, within the limits of its cgroup."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexmoe.system import machine


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text)

    return write


def test_without_a_cgroup_it_is_what_the_kernel_calls_available(cgroup):
    kernel = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    assert machine.available_host_bytes() == pytest.approx(int(kernel.split()[1]) * 1024, rel=0.2)


def test_cgroup_limit_holds_and_inactive_pages_of_files_count_as_free(cgroup):
    cgroup(max="1000000\n", current="700000\n", stat="anon 5\ninactive_file 50000\nactive_file 9\n")
    assert machine.available_host_bytes() == 1_000_000 - 700_000 + 50_000


def test_unlimited_or_incomplete_cgroup_does_not_count(cgroup):
    cgroup(max="max\n", current="700000\n")
    unlimited = machine.available_host_bytes()
    assert unlimited > 10_000_000
    cgroup(max="1000\n")
    (machine._CGROUP / "memory.current").unlink()
    assert machine.available_host_bytes() > 10_000_000


def test_free_disk_is_that_of_the_nearest_existing_directory(tmp_path):
    here, below = machine.free_disk_bytes(tmp_path), machine.free_disk_bytes(tmp_path / "not" / "there" / "yet")
    assert here > 0 and below == pytest.approx(here, rel=0.2)


def test_relative_directory_is_looked_up_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert machine.free_disk_bytes(Path("some/where")) > 0


@pytest.mark.parametrize(
    "quota, cores", [("150000 100000", 1), ("50000 100000", 1), ("100000000 100000", None), ("max 100000", None)]
)
def test_cores_are_those_of_the_affinity_within_the_quota(cgroup, quota, cores):
    (machine._CGROUP / "cpu.max").write_text(quota)
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
    monkeypatch.setattr(machine, "_lines", lambda path: mounts)
    assert machine.filesystem(tmp_path / "not" / "there") == "tmpfs"
    assert machine.filesystem(Path("/elsewhere")) == "ext4"


def test_processor_has_a_name():
    assert machine.cpu_name()
