"""The check of the planner against rivals: what a run leaves for the next one."""

import json

import pytest

from scripts.check_optimal import Result, check, earlier, summary, write
from scripts.optimality import ablation

ABOUT = {"command": "python -m scripts.check_optimal", "tolerance": 0.02, "code": "0123"}


def result(seed, planned, best):
    return Result(
        seed=seed,
        problem="a machine",
        planned=planned,
        best=best,
        by="climb",
        closed=planned,
        lp=planned,
        programmes=100,
        evaluations=2000,
        seconds=2.0,
        cpu_s=2.0,
        candidates=5000,
        judged=9000,
        policy={},
        rival={},
    )


def test_a_run_goes_on_with_the_results_of_the_same_command_and_code(tmp_path):
    results = [result(0, 10.0, 10.1), result(1, 0.0, 0.0)]
    write(tmp_path / "optimal", results, ABOUT)
    assert earlier(tmp_path / "optimal", ABOUT) == results
    assert earlier(tmp_path / "optimal", ABOUT | {"code": "4567"}) == []
    assert earlier(tmp_path / "optimal", ABOUT | {"command": "another"}) == []
    assert earlier(tmp_path / "nothing", ABOUT) == []


def test_the_record_tells_who_was_beaten_and_by_how_much(tmp_path):
    results = [result(0, 10.0, 10.1), result(1, 0.0, 0.0), result(2, 10.0, 10.5)]
    write(tmp_path / "optimal", results, ABOUT)
    table = (tmp_path / "optimal.md").read_text()
    assert "beaten by more than 2%: 1; largest best rival / planned: 1.0500 (seed 2)" in table
    assert "2 machines, 1 more on which nothing fits" in table
    assert [line for line in summary(results, 0.02) if line in table] == summary(results, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 7, 24])
def test_no_rival_beats_a_plan_for_rows_of_many_lengths(seed):
    """By the tolerance of the whole check; the seeds have few rows, for which experts come on demand."""
    assert check(seed, 200, mixed=True).ratio <= 1.03


def test_a_run_in_which_nothing_fits_yet_has_a_record_too(tmp_path):
    write(tmp_path / "optimal", [result(0, 0.0, 0.0)], ABOUT)
    assert "1 machines, on which nothing fits" in (tmp_path / "optimal.md").read_text()


def test_rivals_that_fit_where_the_planner_found_nothing_count_as_beating_it():
    assert result(0, 0.0, 3.0).ratio == float("inf")
    assert result(0, 0.0, 0.0).ratio == 1.0


def ablated(seed, **tokens_per_s):
    """A machine on which all variants are alike, but for those that are named."""
    speeds = dict.fromkeys((variant.name for variant in ablation.VARIANTS), 10.0) | tokens_per_s
    about = {"cpu_s": 2.0, "programmes": 100, "evaluations": 2000}
    outcomes = {name: ablation.Outcome(tokens_per_s=speed, **about) for name, speed in speeds.items()}
    return ablation.Machine(seed=seed, problem="a machine", outcomes=outcomes)


def test_loss_is_against_the_best_plan_of_all_variants():
    machine = ablated(0, kicks=9.5, nothing=9.9)
    assert round(machine.loss("kicks"), 6) == 0.05
    assert round(machine.loss("nothing"), 6) == 0.01
    rows = {line.split("|")[1].strip(): line for line in ablation.table([machine, ablated(1)])}
    assert rows["kicks"].startswith("| kicks | 5.00% | 0.00% | 2.50% | 2.00 | 100 | 2000 |")
    assert set(rows) > {variant.name for variant in ablation.VARIANTS}


def test_check_and_ablation_leave_each_other_in_the_record(tmp_path):
    path = tmp_path / "optimal"
    write(path, [result(0, 10.0, 10.1)], ABOUT)
    ablation.write(path, [ablated(0, kicks=9.5)], "an ablation")
    write(path, [result(0, 10.0, 10.1), result(1, 10.0, 10.0)], ABOUT)
    ablation.write(path, [ablated(0), ablated(1)], "another ablation")
    document, text = json.loads(path.with_suffix(".json").read_text()), path.with_suffix(".md").read_text()
    assert len(document["results"]) == 2 and len(document["ablation"]["machines"]) == 2
    assert text.count("## What each part of the search is worth") == 1
    assert "another ablation" in text and "`an ablation`" not in text and "| 1 | a machine |" in text
    assert earlier(path, ABOUT) == [result(0, 10.0, 10.1), result(1, 10.0, 10.0)]
