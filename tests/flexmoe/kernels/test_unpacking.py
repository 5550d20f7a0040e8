"""Packed matrices in native code: the values are the codecs' bit for bit, and products are those of the unpacked matrix."""

import itertools
import sys

import pytest
import torch

from cost_model.model.arch import ModelArch
from flexmoe.formats.packed_matrix import PackedMatrix
from flexmoe.kernels import grouped_product, linear
from flexmoe.kernels.expert_dispatch import ExpertDispatch
from flexmoe.kernels.expert_weights import ExpertWeights
from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.products import grouped_products
from flexmoe.kernels.native.unpacking import packed_products, unpack
from flexmoe.models.registry import family
from flexmoe.system.device import Device
from tests.support.packed_matrices import CASES, FLOATS, MXFP4, every_number, packed_matrix, same, seeded

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


#: Formats of which a product is taken.
PRODUCTS = ("int4-128", "int4-32-zeros", "int8-0", "fp8-128x128", "mxfp4", "gptq4-128-v1", "awq-128")


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_codec_bit_for_bit(case, two_threads):
    packed, shapes = CASES[case]
    for (rows, columns), scale_dtype in itertools.product(shapes, FLOATS):
        matrix = packed_matrix(packed, rows, columns, seeded(columns), scale_dtype)
        for dtype in FLOATS:
            wanted = matrix.unpack(torch.empty(rows, columns, dtype=dtype))
            assert same(unpack(matrix, torch.full_like(wanted, 7)), wanted), (rows, columns, scale_dtype, dtype)
            first, last = rows // 3, rows - rows // 5
            part = unpack(matrix, torch.full((last - first, columns), 7, dtype=dtype), first)
            assert same(part, wanted[first:last]), (rows, columns, scale_dtype, dtype)


@needs_compiler
@pytest.mark.parametrize("case", ["int4-32", "int8-32", "int8-0-zeros", "fp8-3x5", "mxfp4", "gptq4-12-v1", "awq-12"])
def test_scales_at_the_ends_of_their_range_are_rounded_as_by_torch(case):
    """Values too small for normal numbers, too large for any, scales of 0 and of infinity, NaN among the numbers."""
    packed, shapes = CASES[case]
    rows, columns = shapes[-1]
    for scale_dtype, dtype in itertools.product(FLOATS, FLOATS):
        matrix = packed_matrix(packed, rows, columns, seeded(), scale_dtype, spread=70)
        wanted = matrix.unpack(torch.empty(rows, columns, dtype=dtype))
        assert same(unpack(matrix, torch.empty_like(wanted)), wanted), (scale_dtype, dtype)


@needs_compiler
def test_every_number_and_every_power_of_two_is_that_of_the_codec():
    for dtype in FLOATS:
        for matrix in every_number(dtype):
            wanted = matrix.unpack(torch.empty(matrix.shape, dtype=dtype))
            assert same(unpack(matrix, torch.empty_like(wanted)), wanted)


@needs_compiler
@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_product_is_that_of_the_unpacked_matrix(case, dtype, two_threads):
    packed, shapes = CASES[case]
    rows, columns = shapes[-1]
    matrices = [packed_matrix(packed, rows, columns, seeded(seed)) for seed in range(3)]
    for matrix in matrices:
        if packed.codec == "fp8":
            numbers = matrix.fields["packed"].view(torch.uint8)
            numbers[(numbers & 127) == 127] = 0  # NaN
    whole = [matrix.unpack(torch.empty(rows, columns, dtype=dtype)) for matrix in matrices]
    for counts in ([1, 0, 0], [0, 5, 7], [3, 2, 40], [0, 70, 130]):
        x = torch.randn(sum(counts), columns, generator=seeded()).to(dtype)
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        found = packed_products(x, matrices, ends)
        if max(counts) < 8:
            assert torch.equal(found, grouped_products(x, whole, ends)), "the same products, in the same order"
        for number, (tokens, part) in enumerate(zip(x.split(counts), found.split(counts))):
            exact = tokens.double() @ whole[number].double().T
            size = tokens.double().abs() @ whole[number].double().abs().T
            bound = torch.finfo(dtype).eps * exact.abs() + columns * torch.finfo(torch.float32).eps * size
            assert bool(((part.double() - exact).abs() <= bound + 1e-30).all())


@needs_compiler
@pytest.mark.parametrize("case", ["int4-32-zeros", "mxfp4"])
def test_experts_of_a_unit_are_served_together_where_they_have_few_tokens(case, monkeypatch):
    monkeypatch.setattr(grouped_product, "few_packed_tokens", lambda dtype: 10)
    packed = CASES[case][0]
    matrices = {
        role: [packed_matrix(packed, rows, columns, seeded(seed), spread=0) for seed in range(count)]
        for role, rows, columns, count in (("gate_up", 96, 64, 6), ("down", 64, 96, 3))
    }
    weights = ExpertWeights((matrices["gate_up"][::2], matrices["gate_up"][1::2]), matrices["down"])
    math_of = family(ModelArch.from_name("mixtral-8x7b"))
    assert weights.can_group()
    for counts in ([2, 0, 5], [60, 0, 3]):
        x = torch.randn(sum(counts), 64, generator=seeded())
        found = math_of.feed_forward(x, weights.grouped(torch.tensor(counts).cumsum(0).to(torch.int32)))
        wanted = [math_of.feed_forward(part, weights.expert(e)) for e, part in enumerate(x.split(counts))]
        assert torch.allclose(found, torch.cat(wanted), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_experts_on_demand_are_served_together(monkeypatch):
    math_of, dispatch = family(ModelArch.from_name("mixtral-8x7b")), ExpertDispatch(Device("cpu"), 8)
    own = {
        e: ExpertWeights(
            (
                [packed_matrix(MXFP4, 96, 64, seeded(e), spread=0)],
                [packed_matrix(MXFP4, 96, 64, seeded(e + 50), spread=0)],
            ),
            [packed_matrix(MXFP4, 64, 96, seeded(e + 90), spread=0)],
        )
        for e in (1, 4, 6)
    }
    ids = torch.tensor([[1, 4], [4, 6], [6, 1], [1, 6]])
    x = torch.randn(4, 64, generator=seeded())
    results = []
    for available in (True, False):
        monkeypatch.setattr(native, "available", lambda: available)
        y = torch.zeros_like(x)
        dispatch.route(ids, torch.full(ids.shape, 0.5), torch.float32)
        dispatch.add_some(own, x, y, math_of)
        results.append(y)
    assert torch.isfinite(results[0]).all() and torch.allclose(*results, rtol=1e-4, atol=1e-5 * results[1].abs().max())


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_without_a_compiler_the_product_is_torchs(tokens, biased, monkeypatch):
    matrix = packed_matrix(CASES["int4-32-zeros"][0], 130, 256, seeded())
    x, bias = torch.randn(tokens, 256, generator=seeded(1)), torch.randn(130, generator=seeded(2)) if biased else None
    wanted = torch.nn.functional.linear(x, matrix.unpack(torch.empty(130, 256)), bias)
    monkeypatch.setattr(linear, "few_packed_tokens", lambda dtype: 12)
    for available in (True, False):
        if not available or native.load():
            monkeypatch.setattr(native, "available", lambda: available)
            found = linear.linear(x, matrix, bias)
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())
            values = linear.unpack(matrix, torch.empty(130, 256))
            assert same(values, matrix.unpack(torch.empty(130, 256)))


@pytest.mark.parametrize(
    ("flags", "tiles", "bf16", "fp32"),
    [
        ("avx2", False, 12, 12),
        ("avx2 avx512bw", False, 512, 512),
        ("avx512bw amx_bf16", False, 16, 512),
        ("avx512bw amx_bf16", True, sys.maxsize, 512),
    ],
)
def test_tokens_that_native_code_multiplies_follow_from_the_cpu(flags, tiles, bf16, fp32, monkeypatch):
    monkeypatch.setattr(linear, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(native, "has_tiles", lambda: tiles)
    count = linear.few_packed_tokens.__wrapped__
    assert (count(torch.bfloat16), count(torch.float32)) == (bf16, fp32)


def _without(matrix, name):
    return {other: field for other, field in matrix.fields.items() if other != name}


@needs_compiler
def test_what_does_not_fit_together_is_refused():
    packed = CASES["int4-32-zeros"][0]
    matrix = packed_matrix(packed, 40, 96, seeded())
    out = torch.empty(40, 96)
    bad = {
        "no zero points": _without(matrix, "zero"),
        "no scales": _without(matrix, "scale"),
        "fewer words": matrix.fields | {"packed": matrix.fields["packed"][:, :-1]},
        "fewer outputs": matrix.fields | {"packed": matrix.fields["packed"][:-1]},
        "fewer groups": matrix.fields | {"scale": matrix.fields["scale"][:, :1].contiguous()},
        "other numbers": matrix.fields | {"scale": matrix.fields["scale"].double()},
        "words apart": matrix.fields | {"packed": matrix.fields["packed"].repeat_interleave(2, 1)[:, ::2]},
    }
    for name, fields in bad.items():
        with pytest.raises((ValueError, KeyError)):
            unpack(PackedMatrix(packed, fields, (40, 96)), out), name
    for wrong, first in ((torch.empty(41, 96), 0), (torch.empty(40, 96), 1), (torch.empty(40, 95), 0), (out, -1)):
        with pytest.raises(ValueError, match="no stretch"):
            unpack(matrix, wrong, first)
    for wrong in (torch.empty(40, 96, dtype=torch.float64), torch.empty(96, 40).T):
        with pytest.raises(ValueError, match="contiguous"):
            unpack(matrix, wrong)
    huge = PackedMatrix(packed, matrix.fields, (2**20, 2**20))
    with pytest.raises(ValueError, match="too large"):
        unpack(huge, torch.empty(0, 2**20))


@needs_compiler
def test_products_that_do_not_fit_are_refused():
    matrix, other = (packed_matrix(CASES["int4-32"][0], rows, 96, seeded()) for rows in (40, 48))
    ends, x = torch.tensor([1, 3], dtype=torch.int32), torch.randn(3, 96)
    with pytest.raises(ValueError, match="one format"):
        packed_products(x, [matrix, other], ends)
    with pytest.raises(ValueError, match="do not rise"):
        packed_products(x, [matrix, matrix], torch.tensor([1, 2], dtype=torch.int32))
    for wrong in (x.double(), x[:, :95], x.T.contiguous().T):
        with pytest.raises(ValueError):
            packed_products(wrong, [matrix, matrix], ends)


@needs_compiler
def test_rows_that_lie_apart_are_read_where_they_lie():
    whole = packed_matrix(MXFP4, 64, 96, seeded())
    apart = PackedMatrix(MXFP4, {name: field[1::2] for name, field in whole.fields.items()}, (32, 96))
    wanted = whole.unpack(torch.empty(64, 96))[1::2]
    assert same(unpack(apart, torch.empty(32, 96)), wanted)


@needs_compiler
def test_a_matrix_without_outputs_or_inputs_is_empty():
    for rows, columns in ((0, 32), (4, 0)):
        fields = {"packed": torch.empty(rows, columns // 2, dtype=torch.uint8)}
        fields["scale"] = torch.empty(rows, columns // 32, dtype=torch.uint8)
        matrix = PackedMatrix(MXFP4, fields, (rows, columns))
        assert unpack(matrix, torch.empty(rows, columns)).shape == (rows, columns)
        found = packed_products(torch.ones(2, columns), [matrix], torch.tensor([2], dtype=torch.int32))
        assert torch.equal(found, torch.zeros(2, rows))


@needs_compiler
@pytest.mark.parametrize("tokens", [0, 1, 5, 600])
def test_products_with_several_weights_are_those_with_each(tokens, monkeypatch, two_threads):
    calls = []
    monkeypatch.setattr(linear, "packed_products", lambda *args: calls.append(args) or packed_products(*args))
    pair = [packed_matrix(CASES["int4-128"][0], 130, 256, seeded(seed)) for seed in range(2)]
    x = torch.randn(tokens, 256, generator=seeded()).to(torch.bfloat16)
    found = linear.linears(x, pair)
    if tokens:
        assert len(calls) == (tokens <= linear.few_packed_tokens(x.dtype))
    wanted = [linear.linear(x, matrix) for matrix in pair]
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))
    other_shape = packed_matrix(CASES["int4-128"][0], 37, 256, seeded())
    assert [each.shape[1] for each in linear.linears(x, [pair[0], other_shape])] == [130, 37]
