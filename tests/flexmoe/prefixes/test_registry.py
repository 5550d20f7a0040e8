"""Rows share a prefix where their tokens are equal, whatever somebody said about where they might be."""

import pytest

from flexmoe.prefixes import registry as registry_module
from flexmoe.prefixes.registry import PrefixRegistry


def test_equal_tokens_are_one_prefix_and_others_are_not():
    known = PrefixRegistry(16)
    a = known.find([1] * 40, [32])
    assert a.tokens == 32 and known.find([1] * 33, [32]) is a
    assert known.find([1] * 31 + [2] * 9, [32]) is not a
    assert known.find([1] * 40, [16]).tokens == 16


def test_said_ends_of_unlike_prompts_share_nothing():
    """As where two digests are the same by chance."""
    known = PrefixRegistry(16)
    a, b = known.find([1] * 100, [32, 64]), known.find([1] * 32 + [2] * 68, [32, 64])
    assert a is not b and a.parent is b.parent and [p.tokens for p in a.path] == [32, 64]


def test_the_last_token_of_a_prompt_is_never_shared():
    known = PrefixRegistry(16)
    assert known.find([1] * 16, [16]) is None and known.find([1] * 17, [16]).tokens == 16
    assert known.find([1] * 32, [32]).tokens == 16 and known.find([], [16]) is None


@pytest.mark.parametrize("ends", [[], [0], [3], [15]])
def test_less_than_a_page_is_no_prefix(ends):
    assert PrefixRegistry(16).find([1] * 100, ends) is None


def test_rows_whose_keys_are_rotated_otherwise_have_prefixes_of_their_own():
    known = PrefixRegistry(16)
    assert known.find([1] * 40, [32], past=True) is not known.find([1] * 40, [32])


def test_prefixes_that_nobody_needs_are_forgotten(monkeypatch):
    monkeypatch.setattr(registry_module, "_FEWEST", 8)
    known = PrefixRegistry(16)
    kept = known.find([7] * 40, [16, 32])
    for prefix in kept.path:
        prefix.wanted = 1
    for i in range(1000):
        known.find([i] * 20, [16])
    assert len(known) <= 16 and known.find([7] * 40, [16, 32]) is kept
