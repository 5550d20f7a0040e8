import json
import random
from collections import Counter
from itertools import combinations

import pytest

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from policies.common.errors import UsageError
from policies.placement import (
    TIERS,
    Residency,
    describe,
    place_batches,
    place_pieces,
    place_weights,
    residency_order,
)
from policies.units import EMBEDDING, Unit, UnitId

MIXTRAL = units_of(ModelArch.from_name("mixtral-8x7b"))


def small_units(num_layers=6, num_experts=4, expert_bytes=100, attention_bytes=30):
    units = [Unit(EMBEDDING, 50)]
    for layer in range(num_layers):
        units.append(Unit(UnitId("attention", layer), attention_bytes))
        units += [Unit(UnitId("expert", layer, e), expert_bytes) for e in range(num_experts)]
    return units + [Unit(UnitId("head", num_layers, 0), 30), Unit(UnitId("head", num_layers, 1), 20)]


def random_units(rng):
    units = small_units(rng.randint(1, 40), rng.randint(1, 16))
    scale = rng.choice([3, 1000, 400_000_000])
    return [Unit(unit.id, rng.randint(1, scale)) for unit in units]


def random_shares(rng):
    gpu = rng.choice([0.0, 100.0, rng.uniform(0, 100), float(rng.randint(0, 100))])
    cpu = rng.choice([0.0, 100.0 - gpu, rng.uniform(0, 100.0 - gpu)])
    return gpu, cpu


def experts_per_layer(placement, tier, num_layers=32):
    counts = Counter(unit.layer for unit, home in placement.tier_of.items() if home == tier and unit.kind == "expert")
    return [counts[layer] for layer in range(num_layers)]


@pytest.mark.parametrize("seed", range(300))
def test_placing_the_achieved_percents_gives_the_same_placement(seed):
    rng = random.Random(seed)
    units = random_units(rng)
    placement = place_weights(units, *random_shares(rng))
    gpu, cpu, disk = json.loads(json.dumps(placement.achieved_percent))
    again = place_weights(units, gpu, cpu)
    assert again == placement
    assert gpu + cpu + disk == pytest.approx(100)


def test_bytes_per_tier_are_the_bytes_of_the_placed_units():
    placement = place_weights(MIXTRAL, 10, 20)
    counted = dict.fromkeys(TIERS, 0)
    for unit in MIXTRAL:
        counted[placement.tier_of[unit.id]] += unit.stored_bytes
    assert counted == placement.bytes_per_tier
    assert list(placement.tier_of) == [unit.id for unit in MIXTRAL]


@pytest.mark.parametrize("gpu", [0, 0.5, 7, 10, 20, 33.3, 50, 99, 100])
def test_achieved_percent_is_within_half_a_unit_of_the_asked_one(gpu):
    largest = max(unit.stored_bytes for unit in MIXTRAL)
    half_unit_percent = 50 * largest / sum(unit.stored_bytes for unit in MIXTRAL)
    achieved, _, _ = place_weights(MIXTRAL, gpu, 0).achieved_percent
    assert abs(achieved - gpu) <= half_unit_percent


@pytest.mark.parametrize("shares, only", [((100, 0), "gpu"), ((0, 100), "cpu"), ((0, 0), "disk")])
def test_a_hundred_percent_is_everything_and_zero_is_nothing(shares, only):
    placement = place_weights(MIXTRAL, *shares)
    assert set(placement.tier_of.values()) == {only}
    assert placement.achieved_percent == tuple(100.0 if tier == only else 0.0 for tier in TIERS)


def test_shares_that_sum_to_a_hundred_leave_nothing_on_disk():
    for gpu, cpu in [(14.1, 85.9), (33.3, 66.7), (0.1, 99.9), (1 / 3, 100 - 1 / 3)]:
        assert place_weights(MIXTRAL, gpu, cpu).bytes_per_tier["disk"] == 0


def test_of_two_equally_near_prefixes_the_smaller_is_taken():
    units = [Unit(UnitId("expert", layer), 10) for layer in range(4)]
    assert place_weights(units, 37.5, 0).bytes_per_tier["gpu"] == 10
    assert place_weights(units, 37.6, 0).bytes_per_tier["gpu"] == 20


@pytest.mark.parametrize("gpu", range(0, 101, 7))
def test_experts_of_a_tier_are_spread_evenly_over_layers(gpu):
    for cpu in range(0, 101 - gpu, 9):
        placement = place_weights(MIXTRAL, gpu, cpu)
        for tier in TIERS:
            counts = experts_per_layer(placement, tier)
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("num_layers", [1, 5, 16, 56])
def test_every_interval_of_the_order_is_spread_evenly_over_layers(num_layers):
    order = [unit.layer for unit in residency_order(small_units(num_layers, 3)) if unit.kind == "expert"]
    for start, stop in combinations(range(0, len(order) + 1, 3), 2):
        counts = Counter(order[start:stop])
        per_layer = [counts[layer] for layer in range(num_layers)]
        assert max(per_layer) - min(per_layer) <= 1


def random_order(rng, num_layers, num_experts):
    return tuple(tuple(rng.sample(range(num_experts), num_experts)) for _ in range(num_layers))


@pytest.mark.parametrize("seed", range(30))
def test_a_given_order_of_experts_says_which_of_a_layer_come_first_and_no_more(seed):
    rng = random.Random(seed)
    num_layers, num_experts = rng.randint(1, 20), rng.randint(1, 12)
    units, order = small_units(num_layers, num_experts), random_order(rng, num_layers, num_experts)
    plain, ordered = Residency(units), Residency(units, order)
    assert [(unit.layer, unit.kind) for unit in ordered.order] == [(unit.layer, unit.kind) for unit in plain.order]
    for layer in range(num_layers):
        placed = [unit.id for unit in ordered.order if (unit.layer, unit.kind) == (layer, "expert")]
        assert placed == [UnitId("expert", layer, number) for number in order[layer]]


@pytest.mark.parametrize("seed", range(50))
def test_placing_the_achieved_percents_in_a_given_order_gives_the_same_placement(seed):
    rng = random.Random(seed)
    num_layers, num_experts = rng.randint(1, 40), rng.randint(1, 16)
    units = [Unit(u.id, rng.randint(1, 1000)) for u in small_units(num_layers, num_experts)]
    residency = Residency(units, random_order(rng, num_layers, num_experts))
    placement = residency.place(*random_shares(rng))
    assert residency.place(*placement.achieved_percent[:2]) == placement
    assert set(placement.tier_of) == {unit.id for unit in units}
    larger = residency.place(min(100.0, placement.achieved_percent[0] + 10), 0)
    on_gpu = [{unit for unit, tier in each.tier_of.items() if tier == "gpu"} for each in (placement, larger)]
    assert on_gpu[0] <= on_gpu[1]


def test_residencies_of_different_orders_are_different():
    units = small_units(1, 3)
    assert Residency(units, ((2, 0, 1),)) != Residency(units) == Residency(units, ((0, 1, 2),))
    assert hash(Residency(units)) == hash(Residency(units, ((0, 1, 2),)))


@pytest.mark.parametrize(
    "order, said",
    [(((0, 1),), "1 layers"), (((0, 1), (0, 1)), "layer 0, which has 3"), (((0, 1, 1), (0, 1, 2)), "once")],
)
def test_an_order_of_other_units_is_refused(order, said):
    with pytest.raises(UsageError, match=said):
        Residency(small_units(2, 3), order)


def test_layers_with_one_expert_more_lie_apart():
    order = [unit.layer for unit in residency_order(small_units(8, 2)) if unit.kind == "expert"]
    assert order[:4] == [0, 4, 2, 6]


def test_what_every_token_needs_comes_before_the_experts():
    order = residency_order(small_units())
    kinds = list(dict.fromkeys(unit.kind for unit in order))
    assert kinds == ["embed", "attention", "head", "expert"]
    assert sorted(str(unit.id) for unit in order) == sorted(str(unit.id) for unit in small_units())


@pytest.mark.parametrize(
    "shares", [(-1, 0), (101, 0), (60, 41), (float("nan"), 0), (float("inf"), 0), (True, 0), ("10", 0), (None, 0)]
)
def test_shares_that_cannot_be_are_refused(shares):
    for place in (lambda: place_weights(MIXTRAL, *shares), lambda: place_pieces(4, *shares)):
        with pytest.raises(UsageError):
            place()


def test_units_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="different names"):
        place_weights([Unit(EMBEDDING, 1)] * 2, 0, 0)
    with pytest.raises(UsageError, match="no weight units"):
        place_weights([], 0, 0)


@pytest.mark.parametrize("seed", range(300))
def test_blocks_sum_to_the_total_and_split_the_same_again(seed):
    rng = random.Random(seed)
    total = rng.choice([1, 2, 3, 7, 100, rng.randint(1, 10**7)])
    shares = random_shares(rng)
    counts = place_pieces(total, *shares)
    assert sum(counts.values()) == total and list(counts) == list(TIERS)
    for tier, percent in zip(TIERS, (*shares, 100 - sum(shares)), strict=True):
        assert abs(counts[tier] - total * percent / 100) < 1 + total * 1e-8
        assert percent > 0 or counts[tier] == 0
    assert place_pieces(total, 100 * counts["gpu"] / total, 100 * counts["cpu"] / total) == counts


def test_no_blocks_are_no_blocks():
    assert place_pieces(0, 50, 50) == {"gpu": 0, "cpu": 0, "disk": 0}
    assert place_batches(0, 50, 50) == ()


def test_an_odd_block_goes_to_the_slower_tier():
    assert place_pieces(1, 50, 50) == {"gpu": 0, "cpu": 1, "disk": 0}


def test_batches_are_interleaved_evenly():
    assert place_batches(4, 50, 50) == ("gpu", "cpu", "gpu", "cpu")
    assert place_batches(6, 0, 100) == ("cpu",) * 6
    tiers = place_batches(100, 50, 30)
    assert Counter(tiers) == place_pieces(100, 50, 30)
    for start in range(0, 100, 10):
        assert Counter(tiers[start : start + 10]) == {"gpu": 5, "cpu": 3, "disk": 2}


def test_describe_sets_achieved_beside_asked():
    line = describe((10, 20, 70), (10.2, 19.8, 70.0))
    assert line == "weights: asked 10/20/70 %, placed 10.2/19.8/70.0 %"
    assert describe((100, 0, 7.1e-15), (100.0, 0.0, 0.0)) == "weights: asked 100/0/0 %, placed 100.0/0.0/0.0 %"
    assert describe((0, 100, 0), (0.0, 100.0, 0.0), "cache") == "cache: asked 0/100/0 %, placed 0.0/100.0/0.0 %"
