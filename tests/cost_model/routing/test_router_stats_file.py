"""The file of router statistics: its numbers, strictness, and sums of several."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from cost_model.model.arch import ModelArch
from cost_model.routing.router_stats import Balance, RouterStats
from policies.common.errors import DataError, InfeasibleError, InputMissingError
from tests.support.router_stats import MODEL, made

# Balance.


def test_even_use_is_balanced():
    even = Balance.of(np.full(8, 30))
    assert asdict(even) == {
        "max_over_mean": 1.0,
        "variance": 0.0,
        "variation": 0.0,
        "entropy_bits": 3.0,
        "relative_entropy": 1.0,
        "unused_experts": (),
    }


def test_two_experts_for_every_token_are_as_uneven_as_top_2_can_be():
    b = Balance.of(np.array([50, 0, 0, 50, 0, 0, 0, 0]))
    assert (b.max_over_mean, b.entropy_bits, b.relative_entropy) == (4.0, 1.0, pytest.approx(1 / 3))
    assert (b.variance, b.variation) == (468.75, pytest.approx(468.75**0.5 / 12.5))
    assert b.unused_experts == (1, 2, 4, 5, 6, 7)


def test_uneven_use_is_measured_by_the_definitions():
    b = Balance.of(np.array([6, 3, 3]))
    assert b.max_over_mean == 1.5 and b.variance == pytest.approx(2.0) and b.entropy_bits == pytest.approx(1.5)


def test_a_single_expert_is_balanced():
    assert Balance.of(np.array([7])).relative_entropy == 1.0


# The file.


def test_what_was_saved_is_loaded(tmp_path):
    stats = made()
    stats.save(tmp_path / "stats.json")
    loaded = RouterStats.load(tmp_path / "stats.json")
    assert (loaded.model, loaded.tokens, loaded.layers) == (MODEL, 40, (0, 2))
    assert (loaded.counts == stats.counts).all() and (loaded.coactivation == stats.coactivation).all()


def test_the_file_has_what_follows_from_the_counts(tmp_path):
    stats = made()
    stats.save(tmp_path / "stats.json")
    first, second = json.loads((tmp_path / "stats.json").read_text())["layers"]
    assert (first["layer"], second["layer"]) == (0, 2)
    assert first["max_over_mean"] == stats.balance(0).max_over_mean
    assert second["entropy_bits"] == stats.balance(2).entropy_bits and second["unused_experts"] == []
    assert first["coactivation"][1][3] == first["coactivation"][3][1]
    assert [first["coactivation"][e][e] for e in range(5)] == first["tokens_per_expert"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "flexmoe.expert-usage"}, "flexmoe.router-stats"),
        ({"schema_version": 2}, "newer"),
        ({"tokens": 41}, "layer 0 counts 80"),
        ({"tokens": 0}, "tokens"),
        ({"layers": []}, "every layer with experts once"),
        ({"layers": [1, 2]}, "list of objects"),
        ({"layers": 3}, "list of objects"),
        ({"model": {"num_layers": 3}}, "top_k"),
        ({"model": MODEL | {"num_layers": 10**12}}, "every layer with experts once"),
        ({"model": MODEL | {"dense_layers": [0]}}, "every layer with experts once"),
        ({"model": MODEL | {"dense_layers": "1"}}, "dense_layers"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path, change, said):
    path = tmp_path / "stats.json"
    made().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        RouterStats.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer": 2}, "every layer with experts once"),
        ({"layer": 7}, "every layer with experts once"),
        ({"layer": -1}, "layer is -1"),
        ({"tokens_per_expert": [80]}, "5 whole numbers"),
        ({"tokens_per_expert": [80.0, 0, 0, 0, 0]}, "5 whole numbers"),
        ({"coactivation": [[0] * 5] * 4}, "5 lists"),
        ({"coactivation": [[0] * 4] * 5}, "5 whole numbers"),
        ({"coactivation": [[1] * 5] * 5}, "contradicts the counts"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_bad_layer_is_refused_with_the_reason(tmp_path, change, said):
    path = tmp_path / "stats.json"
    made().save(path)
    document = json.loads(path.read_text())
    document["layers"][0] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=said):
        RouterStats.load(path)


def test_coactivation_that_is_not_symmetric_is_refused():
    stats = made()
    stats.coactivation[0, 1, 2] += 1
    stats.coactivation[0, 1, 3] -= 1
    with pytest.raises(DataError, match="symmetric"):
        RouterStats(model=MODEL, tokens=40, counts=stats.counts, coactivation=stats.coactivation)


def test_no_tokens_are_no_statistics():
    counts = np.zeros((3, 5), dtype=np.int64)
    with pytest.raises(DataError, match="no token was routed"):
        RouterStats(model=MODEL, tokens=0, counts=counts, coactivation=np.zeros((3, 5, 5), dtype=np.int64))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputMissingError, match="none.json"):
        RouterStats.load(tmp_path / "none.json")


# Several files, and the frequencies alone.


def test_statistics_of_one_model_add_up():
    one, other = made(40, 0), made(25, 1)
    total = RouterStats.sum([one, other])
    assert total.tokens == 65 and (total.counts == one.counts + other.counts).all()
    assert (total.coactivation == one.coactivation + other.coactivation).all()


def test_statistics_of_different_models_are_refused_with_what_differs():
    with pytest.raises(InfeasibleError, match="different models: num_experts, top_k differ"):
        RouterStats.sum([made(), made(model=MODEL | {"num_experts": 6, "top_k": 3})])


def test_the_frequencies_are_taken_as_expert_usage():
    arch = ModelArch.from_name("Mixtral-8x7B")
    usage = made(model=arch.fingerprint()).usage()
    usage.check_model(arch)
    assert usage.shares.sum(axis=1) == pytest.approx(np.full(32, 2))
