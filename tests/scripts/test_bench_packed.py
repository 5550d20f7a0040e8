"""The section `packed` of the benchmark: speeds are those beside bf16 in the same round, and a quick run has every figure."""

import json

import pytest

from scripts.bench import main
from scripts.benchmark import loads
from scripts.packed.section import balanced_figure, disk_figure


def runs(**seconds):
    return {name: [{"wall_s": each} for each in many] for name, many in seconds.items()}


def test_a_format_is_compared_with_bf16_in_the_same_round():
    """The machine was half as fast in the second round, and disturbed in the third."""
    job = loads.equal_job(rows=2, prompt_len=1, new_tokens=5, vocab=100, seed=0)
    measured = runs(bf16=(8.0, 16.0, 8.0), int4=(2.0, 4.0, 6.0))
    figure = disk_figure("int4", job, measured, disk_s=0.25, fewer_bytes=3.9)
    assert figure.ratio == pytest.approx(4.0) and figure.met
    assert "2.5 tokens/s (31% of the disk's 8.0)" in figure.value and "bf16 1.2 tokens/s" in figure.beside
    assert disk_figure("bf16", job, measured, disk_s=1.0, fewer_bytes=1.0).met is None


def test_a_format_of_which_no_round_counts_has_missed_its_target():
    figure = balanced_figure("fp8", [{"counts": False, "reason": "the probes differ by more than 20 %"}])
    assert figure.met is False and "the probes differ" in figure.beside


@pytest.mark.slow
def test_a_quick_run_has_every_figure(tmp_path):
    assert main(["--quick", "--section", "packed", "--workdir", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "bench-quick.json").read_text())["sections"]["packed"]["figures"]
    found = [figure["what"].split(",")[0] for figure in figures]
    assert [found.count(kind) for kind in ("disk-bound", "balanced", "resident", "memory")] == [5, 5, 5, 1]
