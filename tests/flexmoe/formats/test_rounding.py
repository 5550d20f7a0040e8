"""Weights become numbers that compressed-tensors reads back as we do, with scales that are better than those of the largest weight."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.packed_matrix import PackedMatrix
from flexmoe.formats.rounding import packed_fields

FORMATS = {
    "int4": ({"codec": "integer", "bits": 4, "columns": 32}, {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4-channel": ({"codec": "integer", "bits": 4}, {"num_bits": 4, "strategy": "channel"}),
    "int8": ({"codec": "integer", "bits": 8, "columns": 16}, {"num_bits": 8, "strategy": "group", "group_size": 16}),
    "fp8": ({"codec": "fp8", "bits": 8}, {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-block": (
        {"codec": "fp8", "bits": 8, "rows": 16, "columns": 16},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    ),
    "mxfp4": (
        {"codec": "mxfp4", "bits": 4, "columns": 32, "scale_bytes": 1},
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}
LAYOUTS = {"integer": "pack-quantized", "fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized"}


def weights(rows=40, columns=96, seed=0):
    """Some groups are large, some tiny, one is zero, one has a weight far from the others."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 3, rows)[:, None]
    values[3], values[5, 7] = 0, 50 * values[5].abs().max()
    return values


def packed_and_read(name, values, dtype=torch.bfloat16):
    packed = PackedFormat(method="compressed-tensors", **FORMATS[name][0])
    fields = packed_fields(packed, values, dtype)
    return fields, PackedMatrix(packed, fields, tuple(values.shape)).unpack(torch.empty(values.shape))


def args(name):
    return QuantizationArgs(symmetric=True, **FORMATS[name][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_compressed_tensors_reads_the_same_values(name, dtype):
    codec = FORMATS[name][0]["codec"]
    values = weights() if dtype == torch.bfloat16 else weights() / 100
    fields, read = packed_and_read(name, values, dtype)
    stored = {
        "weight_packed": fields["packed"],
        "weight_scale": fields["scale"],
        "weight_shape": torch.tensor(values.shape),
    }
    if codec == "fp8":
        stored["weight"] = stored.pop("weight_packed")
    scheme = QuantizationScheme(targets=["Linear"], weights=args(name))
    expected = BaseCompressor.get_value_from_registry(LAYOUTS[codec]).decompress(stored, scheme)["weight"]
    assert torch.equal(read, expected.float())


#: Largest root mean square of the errors of a row relative to its weights.
ERRORS = {"int4": 0.11, "int4-channel": 0.13, "int8": 0.01, "fp8": 0.04, "fp8-block": 0.04, "mxfp4": 0.14}


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_as_small_as_the_format_allows(name):
    values = weights() if name != "fp8-block" else torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    _, read = packed_and_read(name, values)
    rows = [row for row in range(40) if row not in (3, 5)]  # of zeros, and of one weight far from the others
    assert ((read - values).norm(dim=1) / values.norm(dim=1))[rows].max() < ERRORS[name]
    assert name == "fp8-block" or not read[3].any()


@pytest.mark.parametrize("name", ["int4", "int4-channel", "int8", "mxfp4"])
def test_the_error_is_no_larger_than_with_scales_of_the_largest_weight(name):
    values, group = weights(64, 96, seed=1), FORMATS[name][0].get("columns", 0) or 96
    _, read = packed_and_read(name, values)
    groups = values.unflatten(1, (-1, group))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args(name))
    plain = nearest(name, groups, scale.bfloat16().float()[..., None]).flatten(1)
    own, theirs = (
        ((each - values).square().sum(1) / values.square().sum(1).clamp(min=1e-30)) for each in (read, plain)
    )
    assert own.sum() < theirs.sum()


def nearest(name, groups, scale):
    if name == "mxfp4":
        numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        near = (groups[..., None].abs() / scale[..., None] - numbers).abs().argmin(-1)
        return numbers[near] * groups.sign() * scale
    half = 1 << (FORMATS[name][0]["bits"] - 1)
    return (groups / scale).round().clamp(-half, half - 1) * scale


def test_numbers_of_a_format_are_kept_exactly():
    numbers = torch.randint(-7, 8, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    numbers[:, ::32] = 7
    _, read = packed_and_read("int4", numbers * 0.125)
    assert torch.equal(read, numbers * 0.125)
    numbers[:, ::32] = 8  # of four bits the lowest is -8, so only a negative scale holds it
    fields, read = packed_and_read("int4", numbers * 0.125)
    assert torch.equal(read, numbers * 0.125) and bool((fields["scale"] < 0).all())
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 6] * 4).repeat(8, 1)
    _, read = packed_and_read("mxfp4", codes * 2.0**-9)
    assert torch.equal(read, codes * 2.0**-9)
    _, read = packed_and_read("fp8", torch.linspace(-448, 448, 96).repeat(4, 1).to(torch.float8_e4m3fn).float())
    assert torch.equal(read[0, 0], torch.tensor(-448.0))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e-38, 3e38])
def test_the_smallest_and_the_largest_weights_stay_finite(name, size):
    fields, read = packed_and_read(name, torch.full((16, 32), size))
    assert torch.isfinite(read).all()
    assert not fields["scale"].is_floating_point() or torch.isfinite(fields["scale"]).all()
