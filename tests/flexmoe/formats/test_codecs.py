"""Packed matrices become the numbers that the formats' own libraries make of them, bit for bit."""

import itertools

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

from cost_model.model.packed_format import PackedFormat
from flexmoe.errors import DataError
from flexmoe.formats.bits import packed_words, unpacked
from flexmoe.formats.columns import AWQ_ORDER
from flexmoe.formats.mxfp4 import VALUES
from flexmoe.formats.packed_matrix import CODECS, PackedMatrix

DTYPES = (torch.bfloat16, torch.float32)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def unpack(packed, stored, rows, columns, dtype):
    """The whole matrix of tensors by their names in the checkpoint; the fields are those that the codec asks for."""
    fields = {}
    for field in CODECS[packed.codec].fields(packed, rows, columns):
        fields[field.name] = stored[field.suffix]
        assert stored[field.suffix].shape == field.shape, field
        assert stored[field.suffix].dtype in field.dtypes, field
    matrix = PackedMatrix(packed, fields, (rows, columns))
    whole = matrix.unpack(torch.full((rows, columns), torch.nan, dtype=dtype))
    first = rows // 3
    part = matrix.unpack(torch.full((rows - first, columns), torch.nan, dtype=dtype), first)
    assert torch.equal(part, whole[first:]), "a stretch of outputs is that of the whole"
    return whole


def same(found, expected):
    assert found.dtype == expected.dtype and torch.equal(found, expected)


SHAPES = ((8, 32), (24, 96), (40, 64), (33, 160))
GROUPS = (32, 16, None)


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_packed_integers_are_those_of_compressed_tensors(bits, symmetric, scale_dtype):
    for (rows, columns), group in itertools.product(SHAPES, GROUPS):
        strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
        groups = columns // group if group else 1
        scale = normal(rows, groups, seed=1).abs().add(0.01).to(scale_dtype)
        half = 1 << (bits - 1)
        zero = None if symmetric else (integers(1 << bits, rows, groups, seed=2).to(torch.int16) - half).to(torch.int8)
        weight = normal(rows, columns, dtype=scale_dtype)
        numbers = quantize(x=weight, scale=scale, zero_point=zero, args=args, dtype=torch.int8)
        expected = dequantize(x_q=numbers, scale=scale, zero_point=zero, args=args)
        stored = {"weight_packed": pack_to_int32(numbers, bits), "weight_scale": scale}
        if zero is not None:  # by its own means, as `pack_to_int32` fails along the outputs for some of these shapes
            stored["weight_zero_point"] = by_words((zero.to(torch.int16) + half).to(torch.uint8), bits, 0)
        packed = PackedFormat(
            method="compressed-tensors", codec="integer", bits=bits, columns=group or 0, zeros=not symmetric
        )
        for dtype in DTYPES:
            same(unpack(packed, stored, rows, columns, dtype), expected.to(scale_dtype).to(dtype))


@pytest.mark.parametrize("rows, columns", [(8, 32), (40, 96), (16, 160)])
def test_mxfp4_is_that_of_compressed_tensors(rows, columns):
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    exponents = integers(12, rows, columns // 32, seed=1).float() - 6
    stored = compressor.compress(
        {"weight": normal(rows, columns, dtype=torch.bfloat16), "weight_scale": exponents.exp2().to(torch.bfloat16)},
        scheme,
    )
    expected = compressor.decompress(stored, scheme)["weight"]
    packed = PackedFormat(method="compressed-tensors", codec="mxfp4", bits=4, columns=32, scale_bytes=1)
    for dtype in DTYPES:
        same(unpack(packed, stored, rows, columns, dtype), expected.to(dtype))


def test_mxfp4_values_are_those_of_its_specification():
    """All codes and the ends of the exponents, by the definition: (-1)^sign, 2^(exponent - 1), one bit of mantissa."""
    packed = PackedFormat(method="mxfp4", codec="mxfp4", bits=4, columns=32, scale_bytes=1)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    pairs = (codes[::2] | codes[1::2] << 4)[None].repeat(3, 1)
    scale = torch.tensor([[1], [127], [254]], dtype=torch.uint8)
    found = unpack(packed, {"weight_packed": pairs, "weight_scale": scale}, 3, 32, torch.float32)
    for row, exponent in enumerate((-126, 0, 127)):
        for at, code in enumerate(codes.tolist()):
            bits, half = code >> 1 & 3, code & 1
            value = half / 2 if bits == 0 else 2.0 ** (bits - 1) * (1 + half / 2)
            assert found[row, at].item() == torch.tensor((-1.0) ** (code >> 3) * value * 2.0**exponent).item()
    assert VALUES[7] == 6.0 and VALUES[15] == -6.0


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (32, 16), (0, 0), (1, 0)], ids=str)
def test_float8_is_the_number_times_the_scale_of_its_block(block, scale_dtype):
    for rows, columns in ((8, 32), (130, 96), (257, 300)):
        packed = PackedFormat(method="fp8", codec="fp8", bits=8, rows=block[0], columns=block[1])
        (field,) = (f for f in CODECS["fp8"].fields(packed, rows, columns) if f.name == "scale")
        weight = normal(rows, columns).to(torch.float8_e4m3fn)
        scale = normal(*field.shape, seed=1).abs().to(scale_dtype)
        expected = torch.empty(rows, columns, dtype=scale_dtype)
        for row, column in itertools.product(range(rows), range(0, columns, block[1] or columns)):
            last = column + (block[1] or columns)
            own = scale.view(-1, field.shape[-1])[row // block[0] if block[0] else 0, column // (block[1] or columns)]
            expected[row, column:last] = weight[row, column:last].to(scale_dtype) * own
        found = unpack(packed, {"weight": weight, "weight_scale_inv": scale}, rows, columns, torch.float32)
        same(found, expected.float())


@pytest.mark.parametrize("version, bits", [("gptq", 4), ("gptq", 8), ("gptq_v2", 4), ("gptq_v2", 8)])
def test_gptq_is_what_its_definition_says(version, bits):
    """Words along the inputs, zero points along the outputs; the first version stores them less one."""
    for (rows, columns), group in itertools.product(((8, 32), (24, 96)), (32, 16, None)):
        groups = columns // group if group else 1
        numbers, zeros = integers(1 << bits, columns, rows), integers((1 << bits) - 1, groups, rows, seed=1)
        shift = 1 if version == "gptq" else 0
        scale = normal(groups, rows, seed=2).abs().half()
        stored = {
            "qweight": by_words(numbers, bits, 0),
            "qzeros": by_words(zeros, bits, 1),
            "scales": scale,
        }
        expected = torch.empty(rows, columns, dtype=torch.float16)
        for row, column in itertools.product(range(rows), range(columns)):
            at = column // (group or columns)
            value = int(numbers[column, row]) - int(zeros[at, row]) - shift
            expected[row, column] = torch.tensor(value, dtype=torch.float16) * scale[at, row]
        packed = PackedFormat(method="gptq", codec="gptq", bits=bits, columns=group or 0, zeros=True, zero_shift=shift)
        for dtype in DTYPES:
            same(unpack(packed, stored, rows, columns, dtype), expected.to(dtype))


def test_awq_is_what_its_definition_says():
    """A word has the outputs 0, 2, 4, 6, 1, 3, 5, 7, from its lowest bits on."""
    assert [AWQ_ORDER.index(place) for place in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]
    for (rows, columns), group in itertools.product(((8, 32), (40, 96)), (32, None)):
        groups = columns // group if group else 1
        numbers, zeros = integers(16, columns, rows), integers(16, groups, rows, seed=1)
        scale = normal(groups, rows, seed=2).abs().half()
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

        def words(values, order=order):
            return by_words(values.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4, 1)

        stored = {"qweight": words(numbers), "qzeros": words(zeros), "scales": scale}
        spread = (each.repeat_interleave(columns // groups, 0) for each in (zeros.half(), scale))
        zero, own = spread
        expected = ((numbers.half() - zero) * own).T
        packed = PackedFormat(method="awq", codec="awq", bits=4, columns=group or 0, zeros=True)
        for dtype in DTYPES:
            same(unpack(packed, stored, rows, columns, dtype), expected.to(dtype))


def by_words(numbers, bits, dim):
    """Words built number by number; what is missing in the last is 0."""
    per_word = 32 // bits
    moved = numbers.movedim(dim, -1).to(torch.int64)
    moved = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % per_word))
    joined = sum(moved[..., at::per_word] << (bits * at) for at in range(per_word))
    return torch.where(joined >= 1 << 31, joined - (1 << 32), joined).to(torch.int32).movedim(-1, dim).contiguous()


@pytest.mark.parametrize("bits, dim, count", list(itertools.product((4, 8), (0, 1), (16, 21))))
def test_words_hold_numbers_and_give_them_back(bits, dim, count):
    shape = (count, 3) if dim == 0 else (3, count)
    numbers = integers(1 << bits, *shape)
    found = packed_words(numbers, bits, dim)
    assert found.dtype == torch.int32 and torch.equal(unpacked(found, bits, dim, count), numbers)
    if count == 16:
        assert torch.equal(found, by_words(numbers, bits, dim))


@pytest.mark.parametrize("codec, rows, columns", [("mxfp4", 8, 48), ("gptq", 12, 32), ("awq", 8, 36)])
def test_matrices_that_a_format_cannot_hold_are_refused(codec, rows, columns):
    packed = PackedFormat(method=codec, codec=codec, bits=4, columns=32, zeros=True)
    with pytest.raises(DataError, match=f"{columns} inputs"):
        CODECS[codec].fields(packed, rows, columns)


def test_bytes_are_those_of_the_fields():
    formats = [
        PackedFormat(method="fp8", codec="fp8", bits=8, rows=128, columns=128, scale_bytes=4),
        PackedFormat(method="compressed-tensors", codec="fp8", bits=8, rows=1),
        PackedFormat(method="compressed-tensors", codec="integer", bits=4, columns=32),
        PackedFormat(method="compressed-tensors", codec="integer", bits=4, columns=32, zeros=True),
        PackedFormat(method="compressed-tensors", codec="integer", bits=8),
        PackedFormat(method="compressed-tensors", codec="mxfp4", bits=4, columns=32, scale_bytes=1),
        PackedFormat(method="gptq", codec="gptq", bits=4, columns=128, zeros=True),
        PackedFormat(method="awq", codec="awq", bits=4, columns=64, zeros=True),
    ]
    for packed, (rows, columns) in itertools.product(formats, ((256, 512), (512, 384))):
        fields = CODECS[packed.codec].fields(packed, rows, columns)
        total = 0
        for field in fields:
            size = packed.scale_bytes if field.name == "scale" else field.dtypes[0].itemsize
            total += torch.Size(field.shape).numel() * size
        assert packed.matrix_bytes(rows, columns) == total, packed
