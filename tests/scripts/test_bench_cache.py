"""The cache benchmark measures what it says: hits of one trace beside the optimum on the same, and speeds beside no cache."""

import json

import pytest

from scripts import bench_cache
from scripts.checkpoints.shapes import SIZES

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")


@pytest.mark.slow
def test_the_record_has_hits_beside_the_optimum_and_speeds_beside_no_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | {"num_local_experts": 8, "vocab_size": 600})
    monkeypatch.setattr(bench_cache, "_NEW", {1: 40})
    monkeypatch.setattr(bench_cache, "_NEW_WITHOUT", 4)
    out = tmp_path / "record.json"
    arguments = ["--models", "tiny", "--rows", "1", "--repeats", "1", "--sections", "stationary", "shift"]
    assert bench_cache.main([*arguments, "--workdir", str(tmp_path), "--out", str(out)]) in (0, 1)
    sections = json.loads(out.read_text())["sections"]
    assert set(sections) == {"tiny, stationary", "tiny, shift"}
    for tier in ("disk", "host"):
        raw = sections["tiny, stationary"]["raw"][f"{tier}, 1 rows"]
        cache = raw["lfu"][1]
        assert cache["lookups"] > 0 and cache["hits"] + cache["loads"] == cache["lookups"]
        assert raw["off"][1]["lookups"] == 0 < raw["off"][0][0]
        assert 0 < raw["best static"] <= 1 and cache["hit_rate"] <= raw["belady"] + 0.05
    shift = sections["tiny, shift"]["raw"]["host, 1 rows"]
    assert shift["lfu"]["lookups"] > raw["lfu"][1]["lookups"] and shift["belady"] > 0
    assert "best static set" in capsys.readouterr().out
