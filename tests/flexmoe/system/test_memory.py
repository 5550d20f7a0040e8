"""What this process holds and may hold, within the machine, its cgroups and its resource limits."""

import subprocess
import sys
from pathlib import Path

import pytest

from flexmoe.errors import InfeasibleError
from flexmoe.system import memory, memory_watch
from policies.common.memory_units import GIB, MIB


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Writes files of a cgroup below the place where cgroups are, and puts this process into it."""
    own = tmp_path / "own"
    own.write_text("")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", own)

    def write(group="", line=None, **files):
        own.write_text(own.read_text() + (f"{line}\n" if line else ""))
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / group / f"memory.{name}").write_text(text)

    return write


def test_without_a_cgroup_it_is_what_the_kernel_calls_available(cgroup):
    kernel = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    assert memory.available_host_bytes() == pytest.approx(int(kernel.split()[1]) * 1024, rel=0.2)


def test_cgroup_limit_holds_and_inactive_pages_of_files_count_as_free(cgroup):
    cgroup(max="1000000\n", current="700000\n", stat="anon 5\ninactive_file 50000\nactive_file 9\n")
    assert memory.available_host_bytes() == 1_000_000 - 700_000 + 50_000


def test_the_narrowest_of_the_groups_above_this_process_counts(cgroup):
    cgroup("a/b", "0::/a/b", max="9000000\n", current="1000000\n", stat="inactive_file 0\n")
    cgroup("a", max="7000000\n", current="3000000\n", stat="inactive_file 100\n")
    assert memory.available_host_bytes() == 4_000_100
    cgroup("other", max="5\n", current="5\n")
    assert memory.available_host_bytes() == 4_000_100


def test_cgroups_of_version_1_count_too(cgroup):
    cgroup(
        "memory/job",
        "4:memory:/job",
        limit_in_bytes="600000\n",
        usage_in_bytes="500000\n",
        stat="total_inactive_file 7\n",
    )
    assert memory.available_host_bytes() == 100_007


def test_unlimited_or_incomplete_cgroup_does_not_count(cgroup):
    cgroup(max="max\n", current="700000\n")
    assert memory.available_host_bytes() > 10_000_000
    cgroup(max="1000\n")
    (memory._CGROUPS / "memory.current").unlink()
    assert memory.available_host_bytes() > 10_000_000


def test_a_full_cgroup_leaves_nothing_and_not_less(cgroup):
    cgroup(max="1000\n", current="5000\n", stat="inactive_file 0\n")
    assert memory.available_host_bytes() == 0


def test_the_process_may_hold_what_it_holds_and_what_is_left(cgroup):
    cgroup(max=f"{2 * GIB}\n", current=f"{GIB}\n", stat="inactive_file 0\n")
    assert memory.process_limit_bytes() == pytest.approx(GIB + memory.resident_bytes(), abs=16 * MIB)
    assert memory.process_limit_bytes(0.5) == GIB // 2
    assert memory.process_limit_bytes(1000) == pytest.approx(GIB + memory.resident_bytes(), abs=16 * MIB)


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_resource_limits_count(limit):
    code = (
        "import resource; from flexmoe.system import memory; before = memory.available_host_bytes(); "
        f"resource.setrlimit(resource.{limit}, (3 << 30, resource.RLIM_INFINITY)); "
        "print(before, memory.available_host_bytes())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, left = map(int, run.stdout.split())
    assert 0 < left < 3 * GIB and left < before


def test_what_a_process_takes_is_more_than_it_holds_and_the_same_at_each_start():
    held, needed = memory.resident_bytes(), memory.process_bytes()
    assert held + 128 * MIB <= needed <= held + 512 * MIB and needed % (32 * MIB) == 0
    assert memory.process_bytes() == needed


def test_memory_is_short_just_below_the_limit():
    held = memory.resident_bytes()
    assert memory.is_short(held) and memory.is_short(held + held // 100) and not memory.is_short(2 * held)


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("the weight stream is at another unit"), False),
        (InfeasibleError("no"), False),
    ],
)
def test_which_errors_are_a_lack_of_host_memory(error, lacks):
    assert memory_watch.lacks_memory(error) is lacks
