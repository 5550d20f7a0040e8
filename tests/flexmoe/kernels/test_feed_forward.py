"""The gated feed-forward network in one native call equals its products one after the other."""

import pytest
import torch
import torch.nn.functional as F

from cost_model.model.arch import ModelArch
from flexmoe.kernels import expert_dispatch
from flexmoe.kernels.expert_dispatch import ExpertDispatch
from flexmoe.kernels.expert_weights import ExpertProducts, ExpertWeights
from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.feed_forward import can_feed_forward, feed_forward
from flexmoe.models.registry import family
from flexmoe.system.device import Device

pytestmark = pytest.mark.skipif(not native.has_tiles(), reason="this CPU has no AMX")


def drawn(hidden, ffn, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape, width=1):
        return (torch.randn(*shape, generator=generator) / width**0.5).bfloat16()

    weights = noise(ffn, hidden, width=hidden), noise(ffn, hidden, width=hidden), noise(hidden, ffn, width=ffn)
    return noise(tokens, hidden), noise(tokens, hidden), weights, generator


def wanted_of(x, y, weights, tokens, factors):
    gate, up, down = (weight.double() for weight in weights)
    inputs = x.double()[tokens]
    outputs = (F.silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T
    return y.double().index_add(0, tokens, factors.double() * outputs)


@pytest.mark.parametrize(
    "hidden, ffn, tokens",
    [(32, 32, 1), (64, 96, 5), (96, 160, 16), (160, 64, 33), (64, 4160, 40), (4160, 64, 17), (96, 96, 1100)],
)
def test_one_call_adds_what_the_products_give(hidden, ffn, tokens, two_threads):
    x, y, weights, generator = drawn(hidden, ffn, 2 * tokens + 3)
    chosen = torch.randperm(len(x), generator=generator)[:tokens]
    factors = torch.rand(tokens, 1, generator=generator).bfloat16()
    wanted = wanted_of(x, y, weights, chosen, factors)
    assert can_feed_forward(x, y, *weights)
    feed_forward(x, y, weights, chosen, factors)
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=2**-7)


def test_without_a_choice_all_tokens_are_computed_with_factor_one():
    x, y, weights, _ = drawn(64, 96, 20)
    wanted = wanted_of(x, y, weights, torch.arange(20), torch.ones(20, 1))
    feed_forward(x, y, weights)
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("tokens", [1, 16, 31, 600])
def test_a_row_depends_neither_on_the_others_nor_on_the_threads(tokens, two_threads):
    x, y, weights, _ = drawn(96, 4160, 600)
    alone, together = y.clone(), y.clone()
    feed_forward(x, together, weights)
    torch.set_num_threads(1)
    feed_forward(x[:tokens], alone[:tokens], weights)
    assert torch.equal(alone[:tokens], together[:tokens])
    assert torch.equal(alone[tokens:], y[tokens:])


@pytest.mark.parametrize("gate, up", [(-200.0, 3.0), (200.0, 3.0), (0.0, 5.0), (float("nan"), 1.0)])
def test_gates_far_from_zero_and_numbers_that_are_none_are_those_of_torch(gate, up):
    x, y = torch.zeros(1, 32).bfloat16(), torch.zeros(1, 32).bfloat16()
    x[0, 0] = 1
    weights = [torch.zeros(32, 32).bfloat16() for _ in range(3)]
    weights[0][:, 0], weights[1][:, 0], weights[2][0, 0] = gate, up, 1.0
    feed_forward(x, y, tuple(weights))
    wanted = F.silu(torch.tensor(gate)) * up
    torch.testing.assert_close(y[0, 0].float(), wanted, rtol=2**-7, atol=1e-20, equal_nan=True)


def test_tokens_that_are_not_there_are_refused():
    x, y, weights, _ = drawn(32, 32, 4)
    for tokens in ([0, 4], [-1]):
        with pytest.raises(IndexError, match="tokens that 4 rows do not have"):
            feed_forward(x, y, weights, torch.tensor(tokens), torch.ones(len(tokens), 1).bfloat16())


def test_tokens_and_factors_that_do_not_fit_are_refused():
    x, y, weights, _ = drawn(32, 32, 4)
    tokens = torch.arange(3)
    for chosen, factors in (
        (tokens.int(), torch.ones(3).bfloat16()),
        (tokens, torch.ones(3)),
        (tokens, torch.ones(2).bfloat16()),
    ):
        with pytest.raises(ValueError, match="3 contiguous int64 and bf16"):
            feed_forward(x, y, weights, chosen, factors)


def test_what_the_call_does_not_take_goes_by_products():
    x, y, (gate, up, down), _ = drawn(64, 96, 4)
    assert not can_feed_forward(x.float(), y.float(), gate.float(), up.float(), down.float())
    assert not can_feed_forward(x, y, gate[:80], up[:80], down[:, :80].contiguous())
    assert not can_feed_forward(x, y, gate, up, down.t().contiguous().t())

    def add(**options):
        products = ExpertProducts([torch.cat([gate, up])], down, lambda *_: None, **options)
        return products.add_gated(x, y.clone())

    assert add()
    assert not add(alternate=True)
    assert not add(biases=(gate[:, 0], down[:, 0]))


@pytest.mark.parametrize("how", ["units of one expert", "a unit of all", "on demand"])
@pytest.mark.parametrize("chunk", [7, 512])
def test_dispatch_gives_the_same_in_one_call_and_by_products(how, chunk, monkeypatch):
    monkeypatch.setattr(expert_dispatch, "_LARGE", 1)
    monkeypatch.setattr(expert_dispatch, "GROUPED_TOKENS", 0)
    generator = torch.Generator().manual_seed(1)
    stacks = {
        "gate_up": (torch.randn(4, 192, 64, generator=generator) / 8).bfloat16(),
        "down": (torch.randn(4, 64, 96, generator=generator) / 10).bfloat16(),
    }
    x = torch.randn(50, 64, generator=generator).bfloat16()
    ids = torch.rand(50, 4, generator=generator).topk(2).indices
    factors = torch.rand(50, 2, generator=generator)
    each = {e: ExpertWeights.of({name: stack[e : e + 1] for name, stack in stacks.items()}) for e in range(4)}

    def outputs():
        dispatch, y, math = (
            ExpertDispatch(Device("cpu"), 4, chunk),
            torch.zeros_like(x),
            family(ModelArch.from_name("mixtral-8x7b")),
        )
        dispatch.route(ids, factors, torch.bfloat16)
        if how == "on demand":
            dispatch.add_some(each, x, y, math)
        elif how == "a unit of all":
            dispatch.add_unit(range(4), x, y, ExpertWeights.of(stacks), math)
        else:
            for expert, own in each.items():
                dispatch.add_unit(range(expert, expert + 1), x, y, own, math)
        return y

    calls = []
    add_gated = ExpertProducts.add_gated
    monkeypatch.setattr(ExpertProducts, "add_gated", lambda *given: calls.append(add_gated(*given)) or calls[-1])
    in_one_call = outputs()
    assert calls and all(calls)
    monkeypatch.setattr(ExpertProducts, "add_gated", lambda *_: False)
    torch.testing.assert_close(in_one_call, outputs(), rtol=2**-6, atol=2**-6)
