"""The analysis of expert usage: its tables, heat map and file of frequencies."""

import numpy as np
import pytest

from cost_model.model.arch import ModelArch
from cost_model.routing.expert_usage import ExpertUsage
from scripts import analyze_expert_usage as command
from scripts.analyze_expert_usage import balance_table, carriers, pairs, touched_table
from tests.support.command_lines import THREE_TIERS
from tests.support.router_stats import MODEL, made


@pytest.fixture
def analyze(capsys):
    def call(*args):
        code = command.main([str(arg) for arg in args])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def stats(tmp_path):
    path = tmp_path / "stats.json"
    made().save(path)
    return path


def test_the_tables_have_a_line_for_each_layer_that_routes(stats, analyze):
    code, out, err = analyze(stats)
    assert (code, err) == (0, "")
    assert "2 layers of 5 experts, 2 of them for each token; 40 tokens" in out
    balance, touched = out.split("chosen together most\n")[1].split("\n\n")
    assert [line.split()[0] for line in balance.splitlines()] == ["0", "2"]
    assert [line.split()[0] for line in touched.splitlines()[3:]] == ["0", "2", "mean", "uniform"]
    assert touched.splitlines()[-1].split()[1:] == ["2.0", "4.4", "5.0", "5.0"]


def test_a_line_tells_balance_hot_experts_and_hot_pairs():
    model = {"num_layers": 1, "num_experts": 4, "top_k": 2}
    stats = made(tokens=4, model=model)
    stats.counts[:] = [[4, 2, 2, 0]]
    stats.coactivation[:] = [[[4, 2, 2, 0], [2, 2, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0]]]
    _, line = balance_table(stats, 2)
    assert line.split() == [
        "0",
        "2.00",
        "0.71",
        "2",
        "1.50",
        "75.0%",
        "1",
        "1/3/3",
        "0:100.0%",
        "1:50.0%",
        "0+1:50.0%,1.50x",
        "0+2:50.0%,1.50x",
    ]


def test_few_experts_carry_a_skewed_layer():
    counts = np.array([0, 70, 10, 20])
    assert [carriers(counts, part) for part in (0.5, 0.7, 0.71, 0.95, 1.0)] == [1, 1, 2, 3, 3]
    assert carriers(np.full(10, 7), 0.8) == 8


def test_pairs_are_named_once_strongest_first_and_only_where_there_are_any():
    together = np.array([[9, 1, 5], [1, 8, 0], [5, 0, 7]])
    assert pairs(together, 5) == [(0, 2), (0, 1)] and pairs(together, 1) == [(0, 2)]
    alone = made(model={"num_layers": 1, "num_experts": 3, "top_k": 1})
    assert balance_table(alone, 3)[1].endswith(" -")


def test_a_skewed_layer_reaches_fewer_experts_than_uniform_routing():
    stats = made(tokens=400, model={"num_layers": 1, "num_experts": 8, "top_k": 1})
    stats.counts[:] = [[393, 1, 1, 1, 1, 1, 1, 1]]
    measured, uniform = (line.split()[1:] for line in (touched_table(stats)[1], touched_table(stats)[-1]))
    assert float(measured[0]) == float(uniform[0]) == 1.0
    assert all(float(m) < 0.5 * float(u) for m, u in zip(measured[1:], uniform[1:]))


def test_the_usage_file_is_what_planner_and_cache_take(tmp_path, analyze):
    arch, path = ModelArch.from_name("Qwen3-30B-A3B"), tmp_path / "stats.json"
    made(tokens=60, model=arch.fingerprint()).save(path)
    assert analyze(path, "--usage", tmp_path / "usage.json")[0] == 0
    usage = ExpertUsage.load(tmp_path / "usage.json")
    usage.check_model(arch)
    assert usage.tokens == 60 and (usage.counts == made(tokens=60, model=arch.fingerprint()).counts).all()


def test_files_of_one_model_are_added_up(tmp_path, stats, analyze):
    made(25, 1).save(tmp_path / "more.json")
    code, out, _ = analyze(stats, tmp_path / "more.json", "--usage", tmp_path / "usage.json")
    assert code == 0 and "65 tokens" in out and ExpertUsage.load(tmp_path / "usage.json").tokens == 65


def test_files_of_different_models_are_refused(tmp_path, stats, analyze):
    made(model=MODEL | {"num_experts": 6}).save(tmp_path / "other.json")
    code, out, err = analyze(stats, tmp_path / "other.json", "--usage", tmp_path / "usage.json")
    assert (code, out) == (4, "") and "num_experts differ" in err and not (tmp_path / "usage.json").exists()


@pytest.mark.parametrize(("dense", "suffix"), [([], ".png"), ([1], ".svg")])
def test_the_heat_map_is_a_picture(tmp_path, analyze, dense, suffix):
    pytest.importorskip("matplotlib")
    made(model=MODEL | {"dense_layers": dense}).save(tmp_path / "stats.json")
    path = tmp_path / f"map{suffix}"
    code, out, _ = analyze(tmp_path / "stats.json", "--heat-map", path)
    assert code == 0 and f"heat map: {path}" in out
    assert path.read_bytes().lstrip().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_a_heat_map_without_matplotlib_says_what_to_install(stats, analyze, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = analyze(stats, "--heat-map", "map.png")
    assert (code, out) == (2, "") and "--heat-map needs matplotlib" in err and "flexmoe[plot]" in err


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--heat-map", "map.jpeg"], 2, "--heat-map map.jpeg has no known format"),
        (["--top", "0"], 2, "--top"),
        (["none.json"], 66, "none.json"),
        (["--usage", "/no/such/usage.json"], 74, "/no/such"),
    ],
)
def test_a_fault_is_one_sentence_with_its_code(stats, analyze, flags, code, said):
    pytest.importorskip("matplotlib")
    got, _, err = analyze(stats, *flags)
    assert got == code and said in err and len(err.splitlines()) == 1


def test_no_file_counts_twice_and_none_is_replaced(stats, analyze):
    for again in ([stats], ["--usage", stats]):
        code, _, err = analyze(stats, *again)
        assert code == 2 and "given twice" in err


def test_from_a_job_to_the_file_of_frequencies(job, main, analyze):
    stats, usage = job.directory / "stats.json", job.directory / "usage.json"
    assert main(job.args(*THREE_TIERS, "--router-stats", str(stats)))[0] == 0
    assert analyze(stats, "--usage", usage)[0] == 0
    ExpertUsage.load(usage).check_model(ModelArch.from_dir(job.model))
