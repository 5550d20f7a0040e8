"""Scales of packed weights beside others: ours are the best that need no zero points."""

import torch

from scripts.packed.scales import GROUPS, OTHERS, compare


def test_our_error_is_below_that_of_any_positive_scale():
    weights = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    figures = compare("normal", weights)
    assert len(figures) == len(GROUPS) and all(figure.met and figure.ratio < 0.98 for figure in figures)


def test_each_other_scale_is_better_than_that_of_the_largest_weight():
    groups = torch.randn(16, 4, 32, generator=torch.Generator().manual_seed(1))
    errors = {name: float((unpack(groups) - groups).norm()) for name, unpack in OTHERS.items()}
    assert all(errors[name] < errors["largest weight"] for name in errors if name != "largest weight")
