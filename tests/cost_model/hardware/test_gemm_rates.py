import math
import random
from itertools import pairwise

import pytest

from cost_model.hardware.gemm_rates import GemmRates
from policies.common.errors import UsageError


def rates(tokens, *flops_per_s, elements=(100.0,)):
    return GemmRates(tokens=tokens, weight_elements=elements, flops_per_s=flops_per_s)


ROOFLINE = rates((1, 4, 16, 64), (100.0, 400.0, 1000.0, 1000.0))


def envelope(pieces, tokens):
    return max(slope * tokens + constant for slope, constant in pieces)


def test_at_a_measured_point_time_is_flops_over_rate():
    for tokens, rate in zip(ROOFLINE.tokens, ROOFLINE.flops_per_s[0], strict=True):
        assert ROOFLINE.seconds(tokens, 100) == pytest.approx(2 * tokens * 100 / rate)
    assert ROOFLINE.seconds(16, 250) == pytest.approx(2 * 16 * 250 / 1000)


def test_between_points_time_is_linear_and_beyond_them_the_last_rate_holds():
    assert ROOFLINE.seconds(10, 100) == pytest.approx((ROOFLINE.seconds(4, 100) + ROOFLINE.seconds(16, 100)) / 2)
    assert ROOFLINE.seconds(6400, 100) == pytest.approx(2 * 6400 * 100 / 1000)


def test_fewer_tokens_than_measured_still_read_the_weights():
    late = rates((8, 16), (400.0, 500.0))
    assert late.seconds(0.01, 100) == late.seconds(8, 100) == pytest.approx(4.0)
    assert late.seconds(0, 100) == late.seconds(-1, 100) == 0.0


def test_between_weight_sizes_time_is_linear_and_outside_that_per_element_holds():
    two = rates((1, 10), (10.0, 10.0), (20.0, 40.0), elements=(100.0, 10_000.0))
    assert [two.seconds(10, elements) for elements in (100, 10_000)] == pytest.approx([200.0, 5000.0])
    assert two.seconds(10, 5050) == pytest.approx((200.0 + 5000.0) / 2)
    assert [two.seconds(10, elements) / elements for elements in (1, 100, 10_000, 1e9)] == pytest.approx(
        [2, 2, 0.5, 0.5]
    )


def test_a_call_that_costs_a_constant_and_a_rate_is_met_exactly_between_weight_sizes():
    def took_s(tokens, elements):
        return 20e-6 + 2 * tokens * elements / 100e9

    sizes, tokens = (1e5, 1e6, 3e7), (1, 16, 256)
    measured = rates(tokens, *([2 * n * size / took_s(n, size) for n in tokens] for size in sizes), elements=sizes)
    for n in (1, 5, 16, 100, 256):
        for elements in (1e5, 2e5, 9e5, 1e6, 2e7, 3e7):
            assert measured.seconds(n, elements) == pytest.approx(took_s(n, elements))
            assert envelope(measured.pieces(elements), n) == pytest.approx(took_s(n, elements))


def test_pieces_of_a_convex_curve_are_the_curve():
    pieces = ROOFLINE.pieces(100)
    assert [slope for slope, _ in pieces] == sorted(slope for slope, _ in pieces)
    for tokens in (0.5, 1, 3, 4, 10, 16, 40, 64, 1000):
        assert envelope(pieces, tokens) == pytest.approx(ROOFLINE.seconds(tokens, 100))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_never_exceed_a_measured_curve_and_touch_it(seed):
    draw = random.Random(seed)
    tokens = sorted(draw.sample(range(1, 5000), 7))
    measured = rates(tokens, *([draw.uniform(1e9, 1e12) for _ in tokens] for _ in range(2)), elements=(1e6, 1e8))
    pieces = measured.pieces(3e7)
    for count in [draw.uniform(0.01, 20_000) for _ in range(200)] + tokens:
        assert envelope(pieces, count) <= measured.seconds(count, 3e7) * (1 + 1e-9)
    touched = [count for count in tokens if math.isclose(envelope(pieces, count), measured.seconds(count, 3e7))]
    assert touched
    assert all(left[0] < right[0] for left, right in pairwise(pieces))
    assert pieces[-1][0] == pytest.approx(measured.seconds(tokens[-1], 3e7) / tokens[-1])


@pytest.mark.parametrize(
    "values",
    [
        {"tokens": ()},
        {"tokens": (1, 1)},
        {"tokens": (2, 1)},
        {"tokens": (0.5, 1)},
        {"tokens": "12"},
        {"tokens": (1, float("nan"))},
        {"weight_elements": (0,)},
        {"flops_per_s": ((1.0,),)},
        {"flops_per_s": ((1.0, 2.0), (1.0, 2.0))},
        {"flops_per_s": ((1.0, 0.0),)},
        {"flops_per_s": ((1.0, True),)},
        {"flops_per_s": (3.0, 4.0)},
    ],
)
def test_a_malformed_curve_is_refused_by_the_name_of_the_list(values):
    good = {"tokens": (1, 2), "weight_elements": (1,), "flops_per_s": ((1.0, 2.0),)}
    GemmRates(**good)
    with pytest.raises(UsageError, match=next(iter(values))):
        GemmRates(**good | values)


def test_the_tokens_that_are_best_computed_at_once_are_the_fewest_at_nearly_the_best_rate():
    amx = rates((64, 512, 1024, 2048), (633.0, 1664.0, 2705.0, 2733.0))
    assert amx.fastest(100, 512) == 1024 and amx.fastest(100, 2048) == 2048
    flat = rates((64, 512, 1024), (300.0, 400.0, 405.0))
    assert flat.fastest(100, 512) == 512
    assert ROOFLINE.fastest(100, 512) == 512, "nothing was measured there"


def test_more_tokens_than_are_computed_at_once_take_as_long_as_their_pieces():
    amx = rates((512, 1024), (1000.0, 2000.0))
    assert amx.seconds_in_chunks(1024, 100, 512) == pytest.approx(2 * amx.seconds(512, 100))
    assert amx.seconds_in_chunks(1024, 100, 1024) == pytest.approx(amx.seconds(1024, 100))
    assert amx.seconds_in_chunks(1100, 100, 512) == pytest.approx(2 * amx.seconds(512, 100) + amx.seconds(76, 100))
    assert amx.seconds_in_chunks(0, 100, 512) == 0
