"""Tokens chosen by native code are those that torch chooses, whatever the width of a vector and the rest."""

import numpy as np
import pytest
import torch

from flexmoe.kernels.native import choice
from flexmoe.kernels.native import library as native
from flexmoe.sampling.logprobs import finite_rows
from flexmoe.sampling.random_draws import draw_keys, log_arrivals

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

VOCABULARIES = (1, 3, 15, 16, 17, 100, 1023, 16384)


def keys_of(rows):
    at = np.arange(rows, dtype=np.uint64)
    return torch.from_numpy(draw_keys(at + 7, at * 3).view(np.int32))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_largest_is_the_first_of_equal_ones(vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    for decimals in (0, 3):  # rounded to integers most rows have several largest logits
        x = (torch.randn(9, vocab + 5, generator=generator) * 2).round(decimals=decimals).to(dtype)[:, :vocab]
        assert choice.largest(x).equal(x.argmax(-1))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_row_with_a_number_that_is_not_finite_has_no_largest(vocab, bad):
    x = torch.randn(4, vocab, generator=torch.Generator().manual_seed(3))
    x[1, 0] = x[2, -1] = x[3, vocab // 2] = bad
    assert choice.largest(x).tolist() == [x[0].argmax(), -1, -1, -1]
    assert finite_rows(x).tolist() == [True, False, False, False]


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("scale", (0.01, 4, 1e6))
def test_winners_are_those_of_the_race_in_torch(vocab, scale):
    x = torch.randn(64, vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    x[5, : vocab // 2] = x[6, vocab // 3 : -1] = -torch.inf
    keys = keys_of(64)
    assert choice.winners(x, keys).equal((x - log_arrivals(keys, vocab)).argmax(-1))


def test_tensors_that_do_not_fit_are_refused():
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"keys torch.int32 \[3, 2\]"):
        choice.winners(x, keys_of(3))
    with pytest.raises(ValueError, match="must be fp32"):
        choice.winners(x.bfloat16(), keys_of(4))
    with pytest.raises(ValueError, match="side by side"):
        choice.largest(x.t())
    with pytest.raises(ValueError, match="one or more"):
        choice.largest(x[:, :0])
