"""The benchmarks of the runner: their rows are what they say, and their verdicts follow from their numbers."""

import json

import pytest

from flexmoe.openai.batch_line import parse_line
from scripts.runner.flat import LIMIT_BYTES, Run, custom_id, write_rows
from scripts.runner.flat import figures_of as flat_figures
from scripts.runner.reserve import Run as Reserved
from scripts.runner.reserve import figures_of as reserve_figures
from scripts.runner.reserve import requests


def test_rows_of_the_flat_files_take_a_kilobyte_each_and_run(tmp_path):
    write_rows(tmp_path / "in.jsonl", 50)
    lines = (tmp_path / "in.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [custom_id(row) for row in range(50)]
    assert all(950 < len(line) < 1100 and parse_line(line, 1).error is None for line in lines)


@pytest.mark.parametrize(
    "beyond, slower, met",
    [(0, 1.0, [True] * 3), (2 * LIMIT_BYTES, 1.0, [True, False, True]), (0, 1.5, [True, True, False])],
)
def test_a_large_file_may_cost_neither_memory_nor_time_by_the_row(beyond, slower, met):
    runs = [
        Run(rows=100, wall_s=9, cpu_s=3, peak_bytes=500),
        Run(rows=200, wall_s=9, cpu_s=4, peak_bytes=600),
        Run(rows=400, wall_s=9, cpu_s=4 + 2 * slower, peak_bytes=700 + beyond),
    ]
    assert [figure.met for figure in flat_figures(runs)] == met


def test_reserve_is_measured_on_rows_that_end_by_one_token_in_many():
    rows = requests(30, 100, 1000)
    assert len({row.request_id for row in rows}) == 30
    assert all(len(row.params.stop_token_ids) == 10 and row.params.max_tokens == 1024 for row in rows)


@pytest.mark.parametrize("learned_s, met", [(5.0, True), (12.0, False)])
def test_the_default_has_to_be_the_faster_rule(learned_s, met):
    kept, learned = (
        Reserved(wall_s=wall_s, sweeps=9, mean_rows=3.0, restarts=0, tokens={"0": (1, 2)})
        for wall_s in (10.0, learned_s)
    )
    assert [figure.met for figure in reserve_figures(kept, learned)] == [met, True, None]
