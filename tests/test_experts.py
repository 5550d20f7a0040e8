"""Expert dispatch equals a loop over tokens, whatever the routing."""

import pytest
import torch

from flexmoe import experts
from flexmoe.device import Device
from flexmoe.experts import ExpertDispatch

EXPERTS, TOP_K, WIDTH = 6, 2, 8


def routing(kind, tokens, generator):
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    if kind == "skewed":
        scores[:, 2] += 10
        scores[:, 5] -= (torch.arange(tokens) % 7 > 0).float()
    elif kind == "two experts only":
        scores[:, [1, 4]] += 10
    elif kind == "last untouched":
        scores[:, EXPERTS - 1] -= 10
    ids_TK = scores.topk(TOP_K).indices
    return ids_TK, torch.rand(tokens, TOP_K, generator=generator)


def compute(expert, weights, x):
    return torch.tanh(x @ weights[expert])


def run(dispatch, ids_TK, weights_TK, x_TD, weights, order=range(EXPERTS)):
    y_TD = torch.zeros_like(x_TD)
    sizes = dispatch.route(ids_TK, weights_TK, x_TD.dtype)
    for expert in order:
        dispatch.add(expert, x_TD, y_TD, lambda x: compute(expert, weights, x))
    return sizes, y_TD


def naive(ids_TK, weights_TK, x_TD, weights):
    y_TD = torch.zeros_like(x_TD)
    for t, (ids, factors) in enumerate(zip(ids_TK.tolist(), weights_TK)):
        for expert, factor in zip(ids, factors):
            y_TD[t] += compute(expert, weights, x_TD[t : t + 1])[0] * factor
    return y_TD


@pytest.mark.parametrize("kind", ["balanced", "skewed", "two experts only", "last untouched"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
@pytest.mark.parametrize("tokens", [1, 2, 53])
def test_dispatch_equals_a_loop_over_tokens(monkeypatch, kind, chunk, tokens):
    monkeypatch.setitem(experts.EXPERT_CHUNK_TOKENS, "cpu", chunk)
    generator = torch.Generator().manual_seed(tokens)
    ids_TK, weights_TK = routing(kind, tokens, generator)
    x_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS, tokens, TOP_K)
    sizes, y_TD = run(dispatch, ids_TK, weights_TK, x_TD, weights)
    assert sizes == torch.bincount(ids_TK.flatten(), minlength=EXPERTS).tolist()
    torch.testing.assert_close(y_TD, naive(ids_TK, weights_TK.double(), x_TD, weights))


def test_order_of_the_experts_changes_nothing_but_rounding():
    generator = torch.Generator().manual_seed(1)
    ids_TK, weights_TK = routing("balanced", 40, generator)
    x_TD = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS, 40, TOP_K)
    _, forward = run(dispatch, ids_TK, weights_TK, x_TD, weights)
    _, backward = run(dispatch, ids_TK, weights_TK, x_TD, weights, reversed(range(EXPERTS)))
    torch.testing.assert_close(forward, backward)


def test_expert_sees_each_of_its_tokens_once_and_in_order(monkeypatch):
    monkeypatch.setitem(experts.EXPERT_CHUNK_TOKENS, "cpu", 4)
    generator = torch.Generator().manual_seed(2)
    ids_TK, weights_TK = routing("skewed", 30, generator)
    x_TD = torch.arange(30.0)[:, None].expand(30, WIDTH).contiguous()
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS, 30, TOP_K)
    dispatch.route(ids_TK, weights_TK, torch.float32)
    for expert in range(EXPERTS):
        seen, y_TD = [], torch.zeros_like(x_TD)

        def note(x):
            assert len(x) <= 4
            seen.extend(x[:, 0].int().tolist())
            return torch.ones_like(x)

        dispatch.add(expert, x_TD, y_TD, note)
        chosen = (ids_TK == expert).any(1)
        assert seen == chosen.nonzero()[:, 0].tolist()
        expected = (weights_TK * (ids_TK == expert)).sum(1)[:, None].expand(30, WIDTH)
        torch.testing.assert_close(y_TD, expected)


def test_expert_without_tokens_is_not_computed():
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS, 2, TOP_K)
    sizes = dispatch.route(torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2), torch.float32)
    assert sizes == [2, 2, 0, 0, 0, 0]

    def never(x):
        raise AssertionError("computed an expert without tokens")

    y_TD = torch.zeros(2, WIDTH)
    dispatch.add(3, torch.ones(2, WIDTH), y_TD, never)
    assert not y_TD.any()


def test_route_on_the_cpu_waits_for_no_device():
    device = Device("cpu")
    dispatch = ExpertDispatch(device, EXPERTS, 2, TOP_K)
    dispatch.route(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), torch.float32)
    assert device.host_waits == 0
