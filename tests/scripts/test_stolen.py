"""Stolen time is read from the kernel's counters, and a round of the benchmark in which there was much does not count."""

import pytest

from scripts.benchmark import limit, loads
from scripts.support.stolen import MOST, Stolen, stolen_by_reads, wait_for_calm

CPU = "cpu  {user} 0 100 {idle} 50 0 10 {stolen} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


def test_share_is_of_the_time_since(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text(CPU.format(user=1000, idle=500, stolen=70))
    stolen = Stolen(stat)
    assert stolen.share() == 0
    stat.write_text(CPU.format(user=1060, idle=520, stolen=90))
    assert stolen.share() == pytest.approx(20 / 100)


def test_waiting_ends_in_the_time_allowed():
    assert wait_for_calm(0.05, look_s=0.02) < 5


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, ""),
        ({"stolen": MOST + 0.05}, "8% of the cores' time went to other machines"),
        ({"stolen": MOST + 0.15, "stolen_by_reads": 0.2}, ""),
        ({"stolen": MOST + 0.17, "stolen_by_reads": 0.2}, "20% of the cores' time went to other machines"),
        ({"disk_s": 20.0}, "D/C drifted out of the class"),
        ({"fraction": 1.1}, "it ran faster than its limit"),
    ],
)
def test_round_counts_where_the_machine_was_the_same_for_all_of_it(change, reason):
    one = {"stolen": 0.01, "stolen_by_reads": 0.0, "compute_s": 8.25, "disk_s": 8.0, "wall_s": 10.0, "fraction": 0.9}
    found = limit.why_not("balanced", one | change)
    assert found.startswith(reason) and bool(found) == bool(reason)
    assert loads.in_class("balanced", one["disk_s"], one["compute_s"])


def test_what_own_reads_cost_is_a_share(tmp_path):
    assert 0 <= stolen_by_reads(tmp_path, seconds=0.05) < 1
