"""Work between the products in native code gives what torch gives, with one rounding."""

import pytest
import torch

from flexmoe.formats.packed_kv import WORD, head_words, unpack
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
    q, k, v, rope = projected(70, size, turned, dtype)
    exact = in_torch(elementwise.rotate, q, k, v, rope, interleaved=interleaved)
    found = elementwise.rotate(q, k, v, rope, interleaved=interleaved)
    for each, right in zip(found, exact):
        assert_rounded(each, right, dtype, steps=1.1, atol=1e-6)


def projected(tokens, size, turned, dtype):
    """Queries of 6 heads, keys and values of 3, with gaps between tokens; cosine and sine."""
    q, k, v = (
        numbers(tokens, heads * size + 2, dtype=dtype, seed=seed)[:, : heads * size].unflatten(1, (heads, size))
        for seed, heads in enumerate((6, 3, 3))
    )
    half = torch.linspace(-3, 3, tokens * turned // 2).view(tokens, 1, -1)
    angles = torch.cat([half, half], dim=-1)
    return q, k, v, (angles.cos().to(dtype), angles.sin().to(dtype))


def in_pages(pages, page_tokens, size, start, stop, dtype, compressed):
    """Where tokens [start, stop) go: three rows, which begin and end inside pages, one of them in a single page."""
    width, stored = (head_words(size), WORD) if compressed else (size, dtype)
    pool = numbers(2, pages, page_tokens, 3, width, dtype=torch.float32, seed=9).mul_(9).to(stored)
    order, lengths = torch.randperm(pages, generator=torch.Generator().manual_seed(4)), (1, page_tokens + 2)
    lengths = (*lengths, stop - start - sum(lengths))
    slots, taken = [], 0
    for begin, length in zip((page_tokens - 1, 3, page_tokens - 2), lengths):
        places = torch.arange(begin, begin + length)
        slots.append(order[taken + places // page_tokens] * page_tokens + places % page_tokens)
        taken += -(-(begin + length) // page_tokens)
    return elementwise.NewKV(pool[0], pool[1], torch.cat(slots), start, stop), pool


@DTYPES
@pytest.mark.parametrize("size, turned", [(64, 64), (64, 32), (9, 6), (128, 128), (33, 32)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("part", [False, True], ids=["all", "part"])
def test_keys_are_turned_into_their_pages(dtype, size, turned, interleaved, compressed, part, in_torch, two_threads):
    start, stop = (7, 61) if part else (0, 70)
    q, k, v, rope = projected(70, size, turned, dtype)
    apart_q, apart_k = elementwise.rotate(q.clone(), k.clone(), v, rope, interleaved=interleaved)
    right, wanted = in_pages(9, 16, size, start, stop, dtype, compressed)
    in_torch(lambda: right.put(apart_k, v))
    new, pool = in_pages(9, 16, size, start, stop, dtype, compressed)
    found_q, found_k = elementwise.rotate(q, k, v, rope, new, interleaved=interleaved)
    assert torch.equal(found_q, apart_q)
    assert torch.equal(pool, wanted), "what is turned and put at once is what is put after it has been turned"
    elsewhere = torch.cat([torch.arange(start), torch.arange(stop, 70)])
    assert torch.equal(found_k[elsewhere], apart_k[elsewhere]), "keys that go nowhere are turned where they are"


def test_without_the_library_keys_are_turned_into_their_pages_too(in_torch):
    q, k, v, rope = projected(70, 64, 64, torch.float32)
    (right, wanted), (new, pool) = (in_pages(9, 16, 64, 0, 70, torch.float32, False) for _ in range(2))
    elementwise.rotate(q.clone(), k.clone(), v, rope, right)
    in_torch(lambda: elementwise.rotate(q, k, v, rope, new))
    torch.testing.assert_close(pool, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", [2, 64])
def test_a_head_with_a_number_that_is_not_finite_is_compressed_to_nan(bad, place):
    q, k, v, rope = projected(70, 65, 64, torch.bfloat16)
    v[5, 1, place] = bad
    new, pool = in_pages(9, 16, 65, 0, 70, torch.bfloat16, True)
    elementwise.rotate(q, k, v, rope, new)
    values = unpack(pool[1].flatten(0, 1)[new.slots], torch.empty(70, 3, 65))
    is_bad = values.isnan().all(-1)
    assert is_bad.sum() == 1 and is_bad[5, 1] and values.isnan().sum() == 65


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 3e38])
def test_heads_of_tiny_and_of_large_numbers_are_compressed_as_torch_does(scale, in_torch):
    q, k, v, rope = projected(70, 40, 40, torch.float32)
    v.div_(4).mul_(scale)
    (right, wanted), (new, pool) = (in_pages(9, 16, 40, 0, 70, torch.float32, True) for _ in range(2))
    elementwise.rotate(q, k, v, rope, new)
    in_torch(lambda: right.put(k, v))
    assert torch.equal(pool[1], wanted[1])


def test_slots_that_a_pool_does_not_have_are_refused():
    q, k, v, rope = projected(70, 64, 64, torch.bfloat16)
    new, pool = in_pages(9, 16, 64, 0, 70, torch.bfloat16, False)
    before = pool.clone()
    for wrong in (-1, 9 * 16):
        new.slots[3] = wrong
        with pytest.raises(IndexError, match="slots"):
            elementwise.rotate(q, k, v, rope, new)
    assert torch.equal(pool, before)


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
