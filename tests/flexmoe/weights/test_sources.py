"""Sources of weights: a checkpoint's own bytes, and dummy numbers that are the same whatever the tier."""

import os
import threading

import pytest
import torch

from flexmoe.checkpoint.unit_layout import Part, views
from flexmoe.errors import DataError, StorageError
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DiskPool
from flexmoe.system.trace import Recorder
from flexmoe.weights.sources import DummySource
from policies.units import EMBEDDING, UnitId
from tests.support.tiny_units import UNITS, tiny_units

pytestmark = pytest.mark.usefixtures("small_pattern")
A0, E0, E1 = UnitId("attention", 0), UnitId("expert", 0, 0), UnitId("expert", 0, 1)
PARTS = {
    EMBEDDING: [Part(role="embed", tensor="t", shape=(50, 64))],
    A0: [
        Part(role="norm", tensor="n", shape=(64,)),
        Part(role="q", tensor="q", shape=(64, 64)),
        Part(role="router", tensor="r", shape=(8, 64)),
    ],
    E0: [Part(role="up", tensor="u", shape=(300, 64)), Part(role="down", tensor="d", shape=(64, 300))],
    E1: [Part(role="up", tensor="u1", shape=(300, 64)), Part(role="down", tensor="d1", shape=(64, 300))],
}


@pytest.fixture
def pool():
    before = set(threading.enumerate())
    pool = DiskPool(Recorder())
    yield pool
    pool.close()
    assert set(threading.enumerate()) == before


@pytest.fixture
def small_pattern(monkeypatch):
    monkeypatch.setattr(DummySource, "_PATTERN_BYTES", 1 << 20)


def read(source, unit, pool):
    layout = source.layout(unit)
    buffer = Device("cpu").host_buffer(layout.host_bytes)
    source.read(unit, buffer, pool).wait()
    return {role: t.clone() for role, t in views(buffer, layout.host).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_units_are_the_saved_tensors(tmp_path, pool, dtype):
    source, expected = tiny_units(tmp_path, dtype)
    for unit in UNITS:
        tensors = read(source, unit, pool)
        assert set(tensors) == set(expected[unit])
        assert all(torch.equal(tensors[role], t) for role, t in expected[unit].items())


def test_rows_of_a_table_are_the_saved_rows(tmp_path):
    source, expected = tiny_units(tmp_path)
    rows = [300, 0, 7, 7, 150]
    data = torch.frombuffer(source.read_rows(UNITS[-1], rows, 33 * 4), dtype=torch.float32).view(-1, 33)
    assert torch.equal(data, expected[UNITS[-1]]["head"][rows])


def test_shard_that_was_cut_after_the_check_is_an_error_not_garbage(tmp_path, pool):
    source, _ = tiny_units(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(DataError, match=r"model.safetensors ends at byte 5000"):
        for unit in UNITS:
            read(source, unit, pool)
    with pytest.raises(StorageError, match="ended inside row 300"):
        source.read_rows(UNITS[-1], [300], 33 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_numbers_are_the_same_read_from_disk_or_filled(tmp_path, pool, dtype):
    on_disk, filled = (DummySource(PARTS, dtype, tmp_path) for _ in range(2))
    on_disk.prepare(list(PARTS))
    for unit in PARTS:
        a, b = read(on_disk, unit, pool), read(filled, unit, pool)
        assert a.keys() == b.keys() and all(torch.equal(a[role], b[role]) for role in a)


def test_dummy_rows_equal_the_rows_of_the_table(tmp_path, pool):
    source = DummySource(PARTS, torch.bfloat16, tmp_path)
    table = read(source, EMBEDDING, pool)["embed"]
    rows = torch.frombuffer(source.read_rows(EMBEDDING, [0, 49, 7], 128), dtype=torch.bfloat16).view(3, 64)
    assert torch.equal(rows, table[[0, 49, 7]])


def test_units_of_one_shape_have_different_numbers(tmp_path, pool):
    source = DummySource(PARTS, torch.float32, tmp_path)
    assert not torch.equal(read(source, E0, pool)["up"], read(source, E1, pool)["up"])


def test_dummy_disk_units_are_distinct_written_extents_without_holes(tmp_path, monkeypatch):
    opened, real = [], os.unlink

    def unlink(path):
        opened.append(os.open(path, os.O_RDONLY))
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    source = DummySource(PARTS, torch.bfloat16, tmp_path)
    source.prepare(list(PARTS))
    (fd,) = opened
    try:
        size = os.fstat(fd).st_size
        extents = sorted((e.offset, e.length) for unit in PARTS for e in source.layout(unit).extents)
        assert all(a + length <= b for (a, length), (b, _) in zip(extents, extents[1:]))
        assert size == sum(length for _, length in extents)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == size, "the file has a hole"
        assert os.fstat(fd).st_blocks * 512 >= size
    finally:
        os.close(fd)
    assert list(tmp_path.iterdir()) == [], "a killed run would leave the file behind"


def test_dummy_weights_have_the_asked_scale_and_norms_are_one(tmp_path, pool):
    source = DummySource(PARTS, torch.float32, tmp_path, scale=0.05)
    up = read(source, E0, pool)["up"]
    assert abs(float(up.std()) - 0.05) < 0.005 and abs(float(up.mean())) < 0.005
    assert torch.equal(read(source, A0, pool)["norm"], torch.ones(64))


def test_dummy_routers_are_nearly_balanced(tmp_path, pool):
    router = read(DummySource(PARTS, torch.float32, tmp_path), A0, pool)["router"]
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(3))
    counts = torch.bincount((x @ router.T).topk(2).indices.flatten(), minlength=8)
    assert counts.min() > 0.6 * counts.float().mean() and counts.max() < 1.5 * counts.float().mean()


def test_missing_offload_directory_is_a_storage_error(tmp_path):
    source = DummySource(PARTS, torch.float32, tmp_path / "none")
    with pytest.raises(StorageError, match="cannot open"):
        source.prepare([E0])
