"""The benchmark of the expert cache: a replayed trace gives the runtime's own numbers, and the optimum is above them."""

import json

import pytest

from scripts.bench_expert_cache import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_was_measured_is_what_a_replay_of_the_trace_gives(tmp_path, capsys):
    flags = "--size tiny --tiers disk --jobs shift --rows 2 --round-tokens 32 --share 0.5"
    assert main([str(tmp_path), *flags.split(), "--json", str(tmp_path / "r.json")]) == 0
    (result,) = [json.loads(line) for line in (tmp_path / "r.json").read_text().splitlines()]
    policies, trace = result["policies"], result["on_the_trace"]
    assert policies["lfu"]["on_demand_sweeps"] > 0 and policies["lfu"]["lookups"] > 0
    assert (policies["lfu"]["hits"], policies["lfu"]["evictions"]) == (trace["lfu"]["hits"], trace["lfu"]["evictions"])
    assert policies["lfu"]["loads"] == trace["lfu"]["lookups"] - trace["lfu"]["hits"]
    assert policies["off"]["lookups"] == 0
    assert max(trace[kind]["hits"] for kind in ("lfu", "lru", "static")) <= trace["optimum"]["hits"]
    shown = capsys.readouterr().out
    assert "all resident" in shown and "on the trace of lfu" in shown


def test_an_error_is_a_sentence_and_an_exit_code(tmp_path, capsys):
    (tmp_path / "tiny-zipf-1").mkdir()
    assert main([str(tmp_path), "--size", "tiny"]) == 66
    assert capsys.readouterr().err.startswith("bench_expert_cache: ")
