"""When a sweep moves only the experts that were routed to."""

import random
from dataclasses import replace

import numpy as np
import pytest

from cost_model.memory.allocation import residency
from cost_model.model.arch import ModelArch
from cost_model.routing.on_demand import OnDemand, touched, uniform_shares

MIXTRAL, QWEN = ModelArch.from_name("Mixtral-8x7B"), ModelArch.from_name("Qwen3-30B-A3B")


def on_demand(arch, cached=4, gpu=0):
    return OnDemand.of(arch, residency(arch).place(gpu, 50).tier_of, cached)


def test_what_is_touched_is_what_is_drawn():
    rng, shares, tokens = random.Random(0), np.array([0.9, 0.5, 0.1, 0.0]), 3
    drawn = np.zeros(4)
    for _ in range(20000):
        drawn += [any(rng.random() < share for _ in range(tokens)) for share in shares]
    assert touched(shares, tokens) == pytest.approx(drawn / 20000, abs=0.02)


def test_only_experts_off_the_device_of_layers_with_experts_are_streamed():
    arch = MIXTRAL
    assert on_demand(arch).streamed.all()
    some = on_demand(arch, gpu=40).streamed
    assert 0 < some.sum() < some.size
    assert not on_demand(arch, gpu=100 - 50).pays(uniform_shares(arch), 1e9)
    place = residency(arch).place(40, 30)
    streamed = arch.num_layers * arch.num_experts - place.count_of("gpu", "expert")
    assert some.sum() == streamed


@pytest.mark.parametrize("arch", [MIXTRAL, QWEN], ids=["mixtral", "qwen3"])
def test_missed_experts_are_those_touched_beyond_what_is_cached(arch):
    every, shares = arch.num_layers * arch.num_experts, uniform_shares(arch)
    assert on_demand(arch, cached=0).missed(shares, 1) == pytest.approx(arch.num_layers * arch.top_k)
    assert on_demand(arch, cached=every // 2).missed(shares, 1) == pytest.approx(arch.num_layers * arch.top_k / 2)
    assert on_demand(arch, cached=every).missed(shares, 1) == 0
    skewed = shares * 0.5
    skewed[:, : arch.top_k] = 1.0  # always the same ones, which are cached
    held = arch.num_layers * arch.top_k
    assert on_demand(arch, held).missed(skewed, 1) < 0.6 * on_demand(arch, held).missed(shares, 1)


def test_few_tokens_are_on_demand_and_many_are_not():
    shares = uniform_shares(MIXTRAL)
    assert [on_demand(MIXTRAL).pays(shares, tokens) for tokens in (1, 2, 16, 1000)] == [True, True, False, False]
    shares = uniform_shares(QWEN)
    assert [on_demand(QWEN).pays(shares, tokens) for tokens in (1, 8, 128, 1000)] == [True, True, False, False]


def test_with_all_experts_cached_many_tokens_are_still_streamed():
    every = MIXTRAL.num_layers * MIXTRAL.num_experts
    assert on_demand(MIXTRAL, every).pays(uniform_shares(MIXTRAL), 16)
    assert not on_demand(MIXTRAL, every).pays(uniform_shares(MIXTRAL), 64)


def test_a_run_does_not_change_its_mode_at_a_trifle():
    shares = uniform_shares(MIXTRAL)
    between = on_demand(MIXTRAL, 4)  # 4 tokens touch 68 % of the experts
    assert not between.pays(shares, 4) and between.pays(shares, 4, already=True)


def test_small_experts_have_to_spare_more_loads_the_faster_their_link_is():
    small, shares = replace(QWEN, hidden=512, ffn=256), uniform_shares(QWEN)
    tiers = {tier: residency(small).place(0, share).tier_of for tier, share in (("disk", 0), ("host", 100))}
    most = {}
    for tier, tier_of in tiers.items():
        rule = OnDemand.of(small, tier_of, 4)
        most[tier] = max(tokens for tokens in range(1, 40) if rule.pays(shares, tokens))
    assert most == {"disk": 7, "host": 3}


def test_one_place_to_load_into_is_too_few():
    assert not on_demand(MIXTRAL, cached=1).pays(uniform_shares(MIXTRAL), 1)


@pytest.mark.parametrize("cached", [1, 4, 40, 10_000])
@pytest.mark.parametrize("arch", [MIXTRAL, QWEN], ids=["mixtral", "qwen3"])
def test_the_largest_sweep_on_demand_is_the_last_that_pays(arch, cached):
    shares, some = uniform_shares(arch), on_demand(arch, cached, gpu=10)
    last = max((tokens for tokens in range(1, 600) if some.pays(shares, tokens)), default=0)
    assert int(some.most_tokens(None) + 1e-9) == last == some.most_tokens(shares)
