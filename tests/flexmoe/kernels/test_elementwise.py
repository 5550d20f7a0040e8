"""Work between the products in native code gives what torch gives, with one rounding."""

import pytest
import torch

from flexmoe.kernels import elementwise
from flexmoe.kernels.native import library as native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library on this machine")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def in_torch(monkeypatch):
    """A call with the library out of reach, and its operands in float32 unless told otherwise."""

    def call(function, *operands, wide=True, **options):
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            clone = [widened(x, wide) for x in operands]
            return function(*clone, **options)

    return call


def widened(x, wide):
    if isinstance(x, tuple):
        return tuple(widened(one, wide) for one in x)
    if not isinstance(x, torch.Tensor):
        return x
    return x.float().clone() if wide and x.is_floating_point() else x.clone()


def numbers(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded(found, exact, dtype, steps=1.0, atol=2e-6):
    """Within so many halves of the distance of two numbers of the dtype."""
    bound = steps * torch.finfo(dtype).eps / 2 * exact.abs() + atol
    assert found.dtype == dtype
    assert bool(((found.double() - exact.double()).abs() <= bound).all())


@DTYPES
@pytest.mark.parametrize("size", [1, 7, 8, 64, 131])
@pytest.mark.parametrize("weight_first", [False, True])
def test_a_norm_is_that_of_torch(dtype, size, weight_first, in_torch, two_threads):
    x, weight = numbers(300, 3, size, dtype=dtype), numbers(size, dtype=dtype, seed=1)
    found = elementwise.rms_norm(x, weight, 1e-5, weight_first=weight_first)
    exact = in_torch(elementwise.rms_norm, x, weight, 1e-5)
    assert_rounded(found, exact, dtype, steps=4 if dtype == torch.float32 else 2.2)
    assert torch.equal(found[17:19], elementwise.rms_norm(x[17:19], weight, 1e-5, weight_first=weight_first))


@DTYPES
@pytest.mark.parametrize("size", [5, 96])
def test_the_sum_before_a_norm_is_rounded_before_it_is_normed(dtype, size, in_torch):
    h, added, weight = (numbers(40, size, dtype=dtype, seed=i) for i in range(3))
    weight, before = weight[0], h.clone()
    exact = h.double() + 0.22 * added.double()
    got_sum, got = elementwise.add_and_norm(h, added, 0.22, weight, 1e-5)
    assert_rounded(got_sum, exact, dtype, steps=1.1)
    assert torch.equal(h, before), "the residual stream that is handed over stays as it is"
    want = in_torch(elementwise.rms_norm, got_sum, weight, 1e-5, wide=False)
    assert_rounded(got, want.float(), dtype, steps=4)


@DTYPES
@pytest.mark.parametrize("size, turned", [(64, 64), (64, 32), (10, 6), (128, 128)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_are_turned_as_torch_turns_them(dtype, size, turned, interleaved, in_torch, two_threads):
    x = numbers(70, 3 * size + 2, dtype=dtype)[:, : 3 * size].unflatten(1, (3, size))
    half = torch.linspace(-3, 3, 70 * turned // 2).view(70, 1, -1)
    angles = torch.cat([half, half], dim=-1)
    rope = angles.cos().to(dtype), angles.sin().to(dtype)
    exact = in_torch(elementwise.rotate, x, rope, interleaved=interleaved)
    found = elementwise.rotate(x, rope, interleaved=interleaved)
    assert_rounded(found, exact, dtype, steps=1.1, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("width", [1, 9, 160])
@pytest.mark.parametrize("together", [False, True])
def test_a_gate_is_that_of_torch(dtype, width, together, in_torch, two_threads):
    both = numbers(200, 2 * width, dtype=dtype).mul_(6)
    gate, up = both.chunk(2, dim=1) if together else (both[:, :width].clone(), both[:, width:].clone())
    exact = in_torch(elementwise.silu_gate, gate, up)
    assert_rounded(elementwise.silu_gate(gate, up), exact, dtype, steps=5 if dtype == torch.float32 else 1.1)


@DTYPES
@pytest.mark.parametrize("width", [1, 9, 160])
@pytest.mark.parametrize("alternate", [False, True])
def test_a_clamped_gate_is_that_of_torch(dtype, width, alternate, in_torch):
    both = numbers(50, 2 * width, dtype=dtype).mul_(8)
    gate, up = both.unflatten(-1, (-1, 2)).unbind(-1) if alternate else both.chunk(2, dim=1)
    exact = in_torch(elementwise.clamped_gate, gate, up, 7.0, 1.702)
    found = elementwise.clamped_gate(gate, up, 7.0, 1.702)
    assert_rounded(found, exact, dtype, steps=6 if dtype == torch.float32 else 1.1)


def test_a_gate_of_extreme_numbers_is_that_of_torch():
    gate = torch.tensor([[-1e30, -200.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 1e30, torch.inf, torch.nan]])
    found = elementwise.silu_gate(gate.clone(), torch.ones_like(gate))
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-30, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("size", [1, 130, 1000])
def test_rows_are_added_to_others_in_order_though_places_repeat(dtype, size, in_torch, two_threads):
    generator = torch.Generator().manual_seed(2)
    places = torch.randint(0, 20, (300,), generator=generator)
    y, rows = numbers(20, size, dtype=dtype), numbers(300, size, dtype=dtype, seed=1)
    factors, exact = numbers(300, 1, dtype=dtype, seed=2), y.double()
    exact.index_add_(0, places, rows.double() * factors.double())
    before = rows.clone()
    elementwise.add_rows(y, places, rows, factors)
    assert torch.equal(rows, before)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol={4: 1e-4, 2: 0.5}[dtype.itemsize])
    with pytest.raises(IndexError):
        elementwise.add_rows(y, places + 1, rows, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16], ids=str)
def test_rows_of_two_are_put_to_their_places(dtype, two_threads):
    pool = torch.zeros(2, 50, 4, 2, 33, dtype=dtype)
    places = torch.randperm(200)[:90]
    rows = torch.arange(2 * 100 * 2 * 33).view(2, 100, 2, 33).to(dtype)[:, 5:95]
    elementwise.put_rows((pool[0].flatten(0, 1), pool[1].flatten(0, 1)), places, (rows[0], rows[1]))
    expected = torch.zeros(2, 200, 2, 33, dtype=dtype)
    for which in range(2):
        expected[which].index_copy_(0, places, rows[which])
    assert torch.equal(pool.flatten(1, 2), expected)
    with pytest.raises(IndexError):
        elementwise.put_rows((pool[0].flatten(0, 1), pool[1].flatten(0, 1)), places - 200, (rows[0], rows[1]))


def test_numbers_that_the_library_does_not_know_are_left_to_torch():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert elementwise.rms_norm(x, weight, 1e-5).dtype == torch.float64
    y = torch.zeros(4, 8, dtype=torch.float64)
    elementwise.add_rows(y, torch.tensor([1, 1, 3]), x, torch.ones(3, 1, dtype=torch.float64))
    assert torch.equal(y[3], x[2])
