"""Products of 16-bit numbers on a CPU that has no instructions for them."""

import sys

import pytest
import torch

from flexmoe.kernels import grouped_product as grouped
from flexmoe.kernels import linear as products
from flexmoe.kernels.linear import linear
from flexmoe.kernels.native import library as native
from flexmoe.system import machine

ROWS, COLUMNS = 200, 96


@pytest.fixture
def without_instructions(monkeypatch):
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(products, "own_tokens", lambda dtype: sys.maxsize)
    monkeypatch.setattr(products, "_PIECE", 50 * COLUMNS)  # several pieces, the last one smaller


def numbers(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 13, 70])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("in_native_code", [False, True])
def test_a_product_is_rounded_once(dtype, tokens, biased, in_native_code, monkeypatch):
    if in_native_code and not native.available():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(native, "available", lambda: in_native_code)
    x, weight = numbers(tokens, COLUMNS, dtype=dtype), numbers(ROWS, COLUMNS, dtype=dtype, seed=1)
    bias = numbers(ROWS, dtype=dtype, seed=2) if biased else None
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    found = linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == (tokens, ROWS)
    half_a_step = torch.finfo(dtype).eps / 2 * exact.abs()
    assert bool(((found.double() - exact).abs() <= 1.01 * half_a_step + 1e-5).all())


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("counts", [[40, 0, 60], [100, 200, 1]])
def test_the_grouped_product_of_many_tokens_is_taken_expert_by_expert(counts):
    x, stack = numbers(sum(counts), COLUMNS), numbers(len(counts), ROWS, COLUMNS, seed=1)
    found = grouped.grouped_product(x, stack, torch.tensor(counts).cumsum(0).to(torch.int32))
    wanted = [linear(part, weight) for part, weight in zip(x.split(counts), stack)]
    assert torch.equal(found, torch.cat(wanted))


@pytest.fixture
def multiplied(monkeypatch):
    """Tokens of every product that torch takes on a CPU with instructions for 16-bit numbers."""
    sizes, product = [], torch.nn.functional.linear
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    monkeypatch.setattr(products, "own_tokens", lambda dtype: 0)
    monkeypatch.setattr(grouped, "own_tokens", lambda dtype: 0)

    def recorded(x, *others):
        sizes.append(len(x))
        return product(x, *others)

    monkeypatch.setattr(products.F, "linear", recorded)
    return sizes


def test_products_of_16_bit_numbers_have_few_sizes(multiplied):
    weight = numbers(8, 16, seed=1)
    for tokens in range(1, 513):
        assert linear(numbers(tokens, 16), weight).shape == (tokens, 8)
    assert len(set(multiplied)) == 32  # each is a primitive that oneDNN keeps
    assert all(0 <= size - n < max(8, n / 8) for n, size in zip(range(1, 513), multiplied))


def test_sizes_of_grouped_products_are_as_few(multiplied):
    stack = numbers(3, 8, 16, seed=1)
    for first in range(90, 200, 3):
        counts = [first, 2, 130]
        grouped.grouped_product(numbers(sum(counts), 16), stack, torch.tensor(counts).cumsum(0).to(torch.int32))
    assert set(multiplied) <= {products.padded_tokens(n) for n in range(200)}


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("tokens", [0, 1, 9, 64, 75])
@pytest.mark.parametrize("biased", [False, True])
def test_padding_changes_no_result(tokens, biased):
    x, weight = numbers(tokens, COLUMNS), numbers(ROWS, COLUMNS, seed=1)
    bias = numbers(ROWS, seed=2) if biased else None
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    found = linear(x, weight, bias)
    assert found.dtype == x.dtype and found.is_contiguous()
    assert torch.allclose(found.double(), exact, rtol=torch.finfo(x.dtype).eps, atol=1e-2)


def test_products_in_float32_are_not_padded(multiplied):
    x, weight = numbers(13, COLUMNS, dtype=torch.float32), numbers(ROWS, COLUMNS, dtype=torch.float32, seed=1)
    assert torch.equal(linear(x, weight), x @ weight.T)
    assert multiplied == [13]


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("stacked", [False, True])
def test_own_products_are_taken_of_few_tokens_however_weights_lie(stacked, monkeypatch):
    taken = []
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)
    for module in (products, grouped):
        monkeypatch.setattr(module, "own_tokens", lambda dtype: 32)
        own = module.grouped_products
        monkeypatch.setattr(module, "grouped_products", lambda x, *a, own=own: (taken.append(len(x)), own(x, *a))[1])
    weights = numbers(2, ROWS, COLUMNS, seed=1)
    for counts in ([30, 34], [33, 33], [20, 80]):
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        grouped.grouped_product(numbers(sum(counts), COLUMNS), weights if stacked else list(weights), ends)
    assert taken == [64, 20], "both experts at once up to 32 tokens on the average, else each by itself"


@pytest.mark.parametrize(
    ("flags", "tiles", "own"),
    [
        ("avx2", False, (32, sys.maxsize, sys.maxsize)),
        ("avx2 avx512bw", False, (32, 64, sys.maxsize)),
        ("avx512bw amx_bf16 avx512_fp16", False, (32, 32, 64)),
        ("avx512bw amx_bf16 avx512_fp16", True, (32, 256, 64)),
        ("asimd asimdhp bf16", False, (32, 12, 12)),
    ],
)
def test_how_many_tokens_take_our_own_product_follows_from_the_cpu(monkeypatch, flags, tiles, own):
    monkeypatch.setattr(native, "has_tiles", lambda: tiles)
    monkeypatch.setattr(products, "cpu_flags", lambda: frozenset(flags.split()))
    known = products.multiplies, products.own_tokens
    for function in known:
        function.cache_clear()
    try:
        assert tuple(map(products.own_tokens, (torch.float32, torch.bfloat16, torch.float16))) == own
    finally:
        for function in known:
            function.cache_clear()


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("fma avx avx2 f16c", set()),
        ("avx2 avx512bw", {torch.bfloat16}),
        ("avx2 avx512bw amx_bf16 avx512_fp16", {torch.bfloat16, torch.float16}),
        ("asimd asimdhp", {torch.float16}),
    ],
)
def test_what_a_cpu_multiplies_follows_from_its_features(monkeypatch, flags, fast):
    monkeypatch.setattr(products, "cpu_flags", lambda: frozenset(flags.split()))
    products.multiplies.cache_clear()
    try:
        assert {d for d in (torch.bfloat16, torch.float16) if products.multiplies(d)} == fast
        assert products.multiplies(torch.float32)
    finally:
        products.multiplies.cache_clear()


def test_features_are_read_from_the_kernels_list(monkeypatch):
    monkeypatch.setattr(machine, "lines_of", lambda _: ["model name : x", "flags\t\t: fpu avx2", "bugs : none"])
    assert machine.cpu_flags() == {"fpu", "avx2"}
