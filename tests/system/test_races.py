"""Sleeps and poisoned free memory change no token; a buffer that is given back too early does."""

import random

import pytest

from flexmoe.engine.executor import Executor
from flexmoe.kernels.expert_weights import ExpertWeights
from tests.support import races
from tests.support.exactness import Case, check

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")
STREAMED = Case(placement=(0, 50, 0, 50, 100, 0), cpu_attention=0)


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    races.disturb(random.Random(1), monkeypatch.setattr)
    return lambda: check(tiny(), STREAMED, "cpu", tmp_path, monkeypatch)


def test_tokens_are_the_same_whatever_sleeps_and_is_poisoned(run):
    run()


def test_experts_that_are_released_before_they_are_computed_are_seen(run, monkeypatch):
    def early(self, op):
        weights = ExpertWeights.of(self._feed.get(op.unit))
        self._feed.release(op.unit)
        tokens = self._block.tokens
        self._experts.add_unit(op.unit.experts, self._x_TD[:tokens], self._y_TD[:tokens], weights, self._family)

    monkeypatch.setattr(Executor, "_op_expert", early)
    with pytest.raises((AssertionError, IndexError)):  # other tokens, or none because the logits are not finite
        run()
