"""The check of the planner against rivals: what a run leaves for the next one."""

from scripts.check_optimal import Result, earlier, summary, write

ABOUT = {"command": "python -m scripts.check_optimal", "tolerance": 0.02, "code": "0123"}


def result(seed, planned, best):
    return Result(
        seed=seed, problem="a machine", planned=planned, best=best, by="climb", lp=planned, programmes=100, evaluations=2000,
        seconds=2.0, cpu_s=2.0, candidates=5000, judged=9000, policy={}, rival={},
    )  # fmt: skip


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
    assert [line for line in summary(results) if line in table] == summary(results)


def test_a_run_in_which_nothing_fits_yet_has_a_record_too(tmp_path):
    write(tmp_path / "optimal", [result(0, 0.0, 0.0)], ABOUT)
    assert "1 machines, on which nothing fits" in (tmp_path / "optimal.md").read_text()


def test_rivals_that_fit_where_the_planner_found_nothing_count_as_beating_it():
    assert result(0, 0.0, 3.0).ratio == float("inf")
    assert result(0, 0.0, 0.0).ratio == 1.0
