"""Packed matrices by Triton: the values are the codecs' bit for bit. On a machine without a GPU Triton's interpreter runs the kernels.

Triton is a large package that nothing else here needs: `pip install triton`, or these tests are skipped.
"""

import importlib
import itertools

import pytest
import torch

from flexmoe.formats.packed_matrix import PackedMatrix
from flexmoe.kernels import linear
from tests.support.packed_matrices import CASES, FLOATS, every_number, packed_matrix, same, seeded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def triton_unpacking():
    """The kernels, interpreted where they cannot be compiled: the decorator looks at the environment once."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("flexmoe.kernels.triton_unpacking")


def moved(matrix):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return PackedMatrix(matrix.packed, {name: field.to(device) for name, field in matrix.fields.items()}, matrix.shape)


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_codec_bit_for_bit(case, triton_unpacking):
    packed, shapes = CASES[case]
    for (rows, columns), scale_dtype in itertools.product(shapes, FLOATS):
        matrix = packed_matrix(packed, rows, columns, seeded(columns), scale_dtype)
        for dtype in FLOATS:
            wanted = matrix.unpack(torch.empty(rows, columns, dtype=dtype))
            first, last = rows // 3, rows - rows // 5
            mine = moved(matrix)
            found = torch.full((last - first, columns), 7, dtype=dtype, device=mine.device)
            assert same(triton_unpacking.unpack(mine, found, first).cpu(), wanted[first:last]), (
                rows,
                scale_dtype,
                dtype,
            )


def test_every_number_and_every_power_of_two_is_that_of_the_codec(triton_unpacking):
    for dtype in FLOATS:
        for matrix in every_number(dtype):
            wanted, mine = matrix.unpack(torch.empty(matrix.shape, dtype=dtype)), moved(matrix)
            found = triton_unpacking.unpack(mine, torch.empty(matrix.shape, dtype=dtype, device=mine.device))
            assert same(found.cpu(), wanted)


@pytest.mark.gpu
def test_a_matrix_on_cuda_is_unpacked_by_triton(triton_unpacking, monkeypatch):
    matrix = moved(packed_matrix(CASES["int4-128"][0], 130, 256, seeded()))
    monkeypatch.setattr(PackedMatrix, "unpack", lambda *args: pytest.fail("by torch"))
    assert linear.unpack(matrix, torch.empty(130, 256, dtype=torch.bfloat16, device="cuda")).isfinite().all()
