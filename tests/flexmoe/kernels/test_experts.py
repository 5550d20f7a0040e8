"""Expert dispatch equals a loop over tokens, whatever the routing."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cost_model.model.arch import ModelArch
from flexmoe.kernels import expert_dispatch, grouped_product
from flexmoe.kernels.expert_dispatch import ExpertDispatch
from flexmoe.kernels.expert_weights import ExpertWeights
from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.products import grouped_products
from flexmoe.models.registry import family
from flexmoe.system.device import Device

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
    monkeypatch.setitem(expert_dispatch.EXPERT_CHUNK_TOKENS, "cpu", chunk)
    generator = torch.Generator().manual_seed(tokens)
    ids_TK, weights_TK = routing(kind, tokens, generator)
    x_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS)
    sizes, y_TD = run(dispatch, ids_TK, weights_TK, x_TD, weights)
    assert sizes == torch.bincount(ids_TK.flatten(), minlength=EXPERTS).tolist()
    torch.testing.assert_close(y_TD, naive(ids_TK, weights_TK.double(), x_TD, weights))


def test_order_of_the_experts_changes_nothing_but_rounding():
    generator = torch.Generator().manual_seed(1)
    ids_TK, weights_TK = routing("balanced", 40, generator)
    x_TD = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS)
    _, forward = run(dispatch, ids_TK, weights_TK, x_TD, weights)
    _, backward = run(dispatch, ids_TK, weights_TK, x_TD, weights, reversed(range(EXPERTS)))
    torch.testing.assert_close(forward, backward)


def test_expert_sees_each_of_its_tokens_once_and_in_order(monkeypatch):
    monkeypatch.setitem(expert_dispatch.EXPERT_CHUNK_TOKENS, "cpu", 4)
    generator = torch.Generator().manual_seed(2)
    ids_TK, weights_TK = routing("skewed", 30, generator)
    x_TD = torch.arange(30.0)[:, None].expand(30, WIDTH).contiguous()
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS)
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


def test_as_many_tokens_are_computed_at_once_as_the_policy_says():
    dispatch, sizes = ExpertDispatch(Device("cpu"), EXPERTS, chunk=700), []
    dispatch.route(torch.zeros(1500, 1, dtype=torch.int64), torch.ones(1500, 1), torch.float32)
    x_TD = torch.ones(1500, WIDTH)
    dispatch.add(0, x_TD, torch.zeros_like(x_TD), lambda x: sizes.append(len(x)) or x)
    assert sizes == [700, 700, 100]


def loop_over(compute):
    """A unit's experts one by one."""

    def run(x_nD, bounds):
        for number, own in bounds.slices():
            x_nD[own] = compute(number, x_nD[own])
        return x_nD

    return run


@pytest.mark.parametrize("kind", ["balanced", "skewed", "two experts only", "last untouched"])
@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("group", [2, 4, 6])
def test_units_of_several_experts_equal_a_loop_over_tokens(monkeypatch, kind, chunk, group):
    monkeypatch.setitem(expert_dispatch.EXPERT_CHUNK_TOKENS, "cpu", chunk)
    generator = torch.Generator().manual_seed(group)
    ids_TK, weights_TK = routing(kind, 53, generator)
    x_TD = torch.randn(53, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    dispatch, y_TD = ExpertDispatch(Device("cpu"), EXPERTS), torch.zeros_like(x_TD)
    dispatch.route(ids_TK, weights_TK, x_TD.dtype)
    for first in range(0, EXPERTS, group):
        own = weights[first : first + group]
        unit = range(first, first + len(own))
        dispatch.add_group(unit, x_TD, y_TD, loop_over(lambda number, x: compute(number, own, x)))  # noqa: B023
    torch.testing.assert_close(y_TD, naive(ids_TK, weights_TK.double(), x_TD, weights))


@pytest.mark.parametrize("chunk", [5, 512])
def test_the_bounds_of_a_chunk_are_the_same_on_host_and_device(monkeypatch, chunk):
    monkeypatch.setitem(expert_dispatch.EXPERT_CHUNK_TOKENS, "cpu", chunk)
    ids_TK, weights_TK = routing("skewed", 40, torch.Generator().manual_seed(3))
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS)
    sizes, seen = dispatch.route(ids_TK, weights_TK, torch.float32), [0] * EXPERTS

    def note(x, bounds):
        ends = bounds.ends().tolist()
        assert bounds.ends().dtype == torch.int32 and ends[-1] == len(x) <= chunk
        for number, own in bounds.slices():
            assert own == slice(ends[number - 1] if number else 0, ends[number])
            seen[2 + number] += own.stop - own.start
        return x

    dispatch.add_group(range(2, 6), torch.ones(40, WIDTH), torch.zeros(40, WIDTH), note)
    assert seen == [0, 0, *sizes[2:]]


def in_pieces(stacked):
    """The same weights as the hub's layout has them: each matrix by itself."""
    gates = {
        f"gate_up.{2 * e + half}": t for e, w in enumerate(stacked["gate_up"]) for half, t in enumerate(w.chunk(2))
    }
    return gates | {f"down.{e}": w for e, w in enumerate(stacked["down"])}


def test_a_grouped_product_serves_weights_of_experts_with_few_tokens_each(monkeypatch):
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS)
    stacked = {"gate_up": torch.zeros(4, 2 * WIDTH, WIDTH), "down": torch.zeros(4, WIDTH, WIDTH)}
    dispatch.route(torch.tensor([[0, 1]] * 100), torch.ones(100, 2), torch.float32)
    of = ExpertWeights.of
    assert dispatch.can_group(range(4), of(stacked))
    for available in (True, False):
        monkeypatch.setattr(native, "available", lambda: available)
        assert dispatch.can_group(range(4), of(in_pieces(stacked))) == available, "torch's product wants them stacked"
    assert not dispatch.can_group(range(4), of({role: t[..., :3] for role, t in stacked.items()})), "rows of 12 bytes"
    dispatch.route(torch.tensor([[0, 1]] * 1000), torch.ones(1000, 2), torch.float32)
    assert not dispatch.can_group(range(4), of(stacked)) and not dispatch.can_group(range(4), of(in_pieces(stacked)))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_a_gpu_has_grouped_products_where_torch_has_a_kernel_for_them(capability, monkeypatch):
    dtypes = {torch.bfloat16} if capability in ((9, 0), (10, 0)) else set()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    known = (torch.bfloat16, torch.float16, torch.float32)
    assert {d for d in known if grouped_product.has_grouped_product(torch.device("cuda"), d)} == dtypes
    assert all(grouped_product.has_grouped_product(torch.device("cpu"), d) for d in known)


@pytest.mark.parametrize("in_native_code", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grouped_products_equal_those_of_one_expert_at_a_time(dtype, in_native_code, monkeypatch, two_threads):
    if in_native_code and not native.available():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(native, "available", lambda: in_native_code)
    math = family(ModelArch.from_name("mixtral-8x7b"))
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(5, 48, 16, generator=generator), torch.randn(5, 16, 24, generator=generator)
    weights = {"gate_up": gate_up.mul(0.25).to(dtype), "down": down.mul(0.2).to(dtype)}
    x_nD, ends = torch.randn(40, 16, generator=generator).to(dtype), [0, 7, 7, 30, 40]

    def grouped(tensors):
        return math.feed_forward(x_nD, ExpertWeights.of(tensors).grouped(torch.tensor(ends, dtype=torch.int32)))

    def one(x_nD, tensors, number):
        return math.feed_forward(x_nD, ExpertWeights.of(tensors).expert(number))

    got, starts = grouped(weights), [0, *ends[:-1]]
    want = torch.cat([one(x_nD[a:b], weights, number) for number, (a, b) in enumerate(zip(starts, ends))])
    close = {"atol": 0.02 if dtype != torch.float32 else 1e-6, "rtol": 0.02}
    torch.testing.assert_close(got, want, **close)
    if in_native_code:
        torch.testing.assert_close(grouped(in_pieces(weights)), got, **close)
        whole = {f"gate_up.{e}": w for e, w in enumerate(weights["gate_up"])}
        whole |= {f"down.{e}": w for e, w in enumerate(weights["down"])}
        torch.testing.assert_close(grouped(whole), got, **close)
        assert torch.equal(one(x_nD[:7], whole, 3), one(x_nD[:7], weights, 3))
        mixed = {"gate_up": weights["gate_up"]} | {k: w for k, w in in_pieces(weights).items() if k.startswith("down")}
        torch.testing.assert_close(grouped(mixed), got, **close)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("depth", [1, 15, 16, 33, 64, 200])
@pytest.mark.parametrize("rows", [1, 3, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_products_of_any_shape_are_those_of_torch(depth, rows, dtype, two_threads):
    generator = torch.Generator().manual_seed(depth)
    counts = [0, 1, 2, 3, 4, 7, 9, 0, 16, 37]
    x_nD = torch.randn(sum(counts), depth + 5, generator=generator).to(dtype)[:, :depth]
    weight = torch.randn(len(counts), rows, depth, generator=generator).to(dtype)
    biases = torch.randn(len(counts), rows, generator=generator).to(dtype)
    got = grouped_products(x_nD, weight, torch.tensor(counts).cumsum(0).to(torch.int32), list(biases))
    pieces = zip(x_nD.float().split(counts), weight.float(), biases.float())
    want = torch.cat([piece @ one.T + bias for piece, one, bias in pieces])
    torch.testing.assert_close(got.float(), want, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=1e-2)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("depth, tokens", [(600, 700), (608, 1200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_product_of_many_tokens_does_not_depend_on_the_others(dtype, depth, tokens, two_threads):
    generator = torch.Generator().manual_seed(1)
    x_nD = torch.randn(tokens, depth, generator=generator).to(dtype)
    weight = torch.randn(2, 130, depth, generator=generator).mul_(0.04).to(dtype)
    got = grouped_products(x_nD, weight, torch.tensor([600, tokens], dtype=torch.int32))
    exact = torch.cat([x_nD[:600].double() @ weight[0].double().T, x_nD[600:].double() @ weight[1].double().T])
    bound = 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5
    assert bool(((got.double() - exact).abs() <= bound).all())
    for first, last in ((0, 20), (505, 540), (590, 600)):
        alone = grouped_products(x_nD[first:last], weight[:1], torch.tensor([last - first], dtype=torch.int32))
        assert torch.equal(alone, got[first:last])


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_native_products_refuse_what_does_not_fit():
    x, weight, ends = torch.ones(4, 8), torch.ones(2, 3, 8), torch.tensor([1, 4], dtype=torch.int32)
    assert grouped_products(x, weight, ends).shape == (4, 3)
    for bad in (
        (x[:, :7], weight, ends),
        (x.T.contiguous().T, weight, ends),
        (x.bfloat16(), weight, ends),
        (x, weight[:, :, :8:2], ends),
        (x, [weight[0], weight[1, :2]], ends),
        (x, list(weight.mT.contiguous().mT), ends),
        (x, [weight[0], weight[1].double()], ends),
        (x, weight, ends.long()),
        (x, weight, ends[:1]),
        (x, weight, ends.flip(0)),
        (x, weight, ends - 2),
        (x, weight, ends + 1),
        (x, weight, ends, [torch.ones(3)]),
        (x, weight, ends, [torch.ones(3), torch.ones(4)]),
        (x, weight, ends, [torch.ones(3), torch.ones(3).double()]),
    ):
        with pytest.raises(ValueError):
            grouped_products(*bad)


def test_an_expert_is_the_same_whether_its_unit_lies_stacked_or_in_pieces():
    math = family(ModelArch.from_name("qwen3-30b-a3b"))
    stacked = {"gate_up": torch.randn(3, 48, 16), "down": torch.randn(3, 16, 24)}
    pieces = {f"gate_up.{i}": half for i, half in enumerate(stacked["gate_up"].view(6, 24, 16))}
    pieces |= {f"down.{i}": one for i, one in enumerate(stacked["down"])}
    x_nD = torch.randn(9, 16)
    for number in range(3):
        one, same = (ExpertWeights.of(tensors).expert(number) for tensors in (stacked, pieces))
        torch.testing.assert_close(math.feed_forward(x_nD, one), math.feed_forward(x_nD, same))


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("forms", [("stacked",), ("apart",), ("stacked", "apart")], ids="-".join)
def test_single_experts_are_computed_together_however_each_lies(forms):
    math = family(ModelArch.from_name("qwen3-30b-a3b"))
    generator = torch.Generator().manual_seed(4)
    shapes = {"gate_up": (1, 48, 16), "down": (1, 16, 24)}
    stacked = [{r: 0.2 * torch.randn(shape, generator=generator) for r, shape in shapes.items()} for _ in range(4)]
    each = [
        ExpertWeights.of(tensors if forms[at % len(forms)] == "stacked" else in_pieces(tensors))
        for at, tensors in enumerate(stacked)
    ]
    x_nD = torch.randn(9, 16, generator=generator)
    together = ExpertWeights.together(each).grouped(torch.tensor([2, 3, 7, 9], dtype=torch.int32))
    alone = [math.feed_forward(x, own.expert(0)) for x, own in zip(x_nD.split([2, 1, 4, 2]), each)]
    torch.testing.assert_close(math.feed_forward(x_nD, together), torch.cat(alone))


class Launches(TorchDispatchMode):
    """Counts operations that would be kernels; views are none."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function is not torch.ops.aten.empty.memory_format
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [10, 1000])
@pytest.mark.parametrize("forms", ["stacked", "apart"])
def test_single_experts_cost_a_launch_or_two_for_each_product_and_nothing_else(forms, chunk, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setitem(expert_dispatch.EXPERT_CHUNK_TOKENS, "cpu", chunk)
    math = family(ModelArch.from_name("qwen3-30b-a3b"))
    generator = torch.Generator().manual_seed(4)
    shapes = {"gate_up": (1, 48, 16), "down": (1, 16, 24)}
    tensors = [{r: 0.2 * torch.randn(shape, generator=generator) for r, shape in shapes.items()} for _ in range(40)]
    weights = {e: ExpertWeights.of(t if forms == "stacked" else in_pieces(t)) for e, t in enumerate(tensors)}
    x_TD, y_TD, expected = torch.randn(100, 16, generator=generator), torch.zeros(100, 16), torch.zeros(100, 16)
    dispatch = ExpertDispatch(Device("cpu"), 40)
    ids_TK = torch.rand(100, 40, generator=generator).topk(2).indices
    dispatch.route(ids_TK, torch.rand(100, 2, generator=generator), torch.float32)
    for expert, own in weights.items():
        dispatch.add(expert, x_TD, expected, partial(math.feed_forward, w=own.expert(0)))
    with Launches() as launches:
        dispatch.add_some(weights, x_TD, y_TD, math)
    torch.testing.assert_close(y_TD, expected)
    products = 2 if forms == "stacked" else 3
    if chunk == 1000:  # on the host a product is one operation and a copy
        assert launches.count <= 2 * products * 40 + 12


def test_expert_without_tokens_is_not_computed():
    dispatch = ExpertDispatch(Device("cpu"), EXPERTS)
    sizes = dispatch.route(torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2), torch.float32)
    assert sizes == [2, 2, 0, 0, 0, 0]

    def never(x):
        raise AssertionError("computed an expert without tokens")

    y_TD = torch.zeros(2, WIDTH)
    dispatch.add(3, torch.ones(2, WIDTH), y_TD, never)
    assert not y_TD.any()


def test_route_on_the_cpu_waits_for_no_device():
    device = Device("cpu")
    dispatch = ExpertDispatch(device, EXPERTS)
    dispatch.route(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), torch.float32)
    assert device.host_waits == 0
