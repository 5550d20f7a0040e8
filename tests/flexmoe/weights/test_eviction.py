"""Who makes room in the expert cache: frequencies that age, recency, and a fixed choice."""

from dataclasses import replace

import numpy as np
import pytest

from cost_model.model.arch import ModelArch
from flexmoe.weights.eviction import HALF_LIFE_TOKENS, LFU, LRU, Static, Usage

ARCH = replace(ModelArch.from_name("Mixtral-8x7B"), num_layers=2)


def counts(**tokens):
    row = np.zeros(8, dtype=int)
    for name, count in tokens.items():
        row[int(name[1:])] = count
    return row


def test_shares_are_even_at_first_and_then_what_was_seen():
    usage = Usage(ARCH)
    assert (usage.shares == 2 / 8).all()
    for _ in range(200):
        usage.add(0, counts(e1=10, e2=5, e7=5), 10)
    assert usage.shares[0] == pytest.approx([0, 1, 0.5, 0, 0, 0, 0, 0.5], abs=1e-4)
    assert (usage.shares[1] == 2 / 8).all()


def test_shares_of_a_layer_always_add_up_to_top_k():
    usage, rng = Usage(ARCH), np.random.default_rng(0)
    for tokens in (1, 7, 300, 5000, 2):
        chosen = rng.random((tokens, 8)).argsort(axis=1)[:, :2]
        usage.add(1, np.bincount(chosen.ravel(), minlength=8), tokens)
        assert usage.shares.sum(axis=1) == pytest.approx([2, 2])


def test_what_was_seen_a_half_life_ago_counts_half():
    usage = Usage(ARCH)
    for _ in range(40 * HALF_LIFE_TOKENS):
        usage.add(0, counts(e0=1, e1=1), 1)
    for _ in range(HALF_LIFE_TOKENS):
        usage.add(0, counts(e2=1, e3=1), 1)
    assert usage.shares[0, :4] == pytest.approx([0.5] * 4, abs=0.01)


def test_tokens_count_the_same_in_one_sweep_and_in_many():
    many, one = Usage(ARCH), Usage(ARCH)
    for _ in range(20):
        many.add(0, counts(e0=1, e1=1), 1)
    one.add(0, counts(e0=20, e1=20), 20)
    assert many.shares[0] == pytest.approx(one.shares[0], abs=0.02)


def test_known_usage_is_where_frequencies_start_and_is_not_changed():
    known = np.full((2, 8), 0.25)
    known[0] = [2, 0, 0, 0, 0, 0, 0, 0]
    usage = Usage(ARCH, known)
    usage.add(0, counts(e5=1, e6=1), 1)
    assert usage.shares[0].argmax() == 0 and usage.shares[0, 5] < 0.02
    assert known[0].tolist() == [2, 0, 0, 0, 0, 0, 0, 0]


def test_the_least_frequent_goes_although_it_was_used_last():
    usage = Usage(ARCH)
    policy = LFU(usage)
    for _ in range(5):
        usage.add(0, counts(e0=1, e1=1), 1)
    usage.add(0, counts(e3=1, e4=1), 1)
    policy.used(0, [3, 4])
    assert policy.scores[0, 3] < policy.scores[0, 0]


def test_the_least_recent_goes_however_often_it_was_used():
    policy = LRU(Usage(ARCH))
    for _ in range(5):
        policy.used(0, [0, 1])
    policy.used(1, [4])
    policy.used(0, [3])
    order = [policy.scores[at] for at in ((0, 0), (1, 4), (0, 3))]
    assert order == sorted(order) and order[0] == policy.scores[0, 1] < order[1]


def test_a_static_cache_keeps_the_most_used_streamed_experts_and_lets_the_others_pass():
    shares = np.linspace(1, 0, 16).reshape(2, 8)
    streamed = np.ones((2, 8), dtype=bool)
    streamed[0, :2] = False  # the two most used live on the device
    policy = Static(Usage(ARCH), shares, streamed, kept=5)
    kept = np.argwhere(np.isinf(policy.scores)).tolist()
    assert kept == [[0, 2], [0, 3], [0, 4], [0, 5], [0, 6]]
    policy.used(0, [2, 7])
    policy.used(1, [1])
    assert np.isinf(policy.scores[0, 2]) and 0 < policy.scores[0, 7] < policy.scores[1, 1] < np.inf
