"""The weight stream delivers every unit's own numbers, in order, within its slots, and ends when asked."""

import errno
import os
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from flexmoe.errors import DataError, StorageError
from flexmoe.system import link
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder
from flexmoe.weights.store import EmbeddingTable, WeightStore, as_compute
from flexmoe.weights.stream import WeightStream
from policies.units import EMBEDDING
from tests.support.tiny_units import UNITS, tiny_units, within

PLACEMENTS = {
    "gpu": dict.fromkeys(UNITS, "gpu"),
    "cpu": dict.fromkeys(UNITS, "cpu"),
    "disk": dict.fromkeys(UNITS, "disk"),
    "mixed": dict(zip(UNITS, ["cpu", "gpu", "disk", "disk", "cpu", "disk", "gpu"])),
}
A0, E0, E1, _, _, E3, HEAD = UNITS
SETTLE_S = 0.1


@contextmanager
def streamed(source, tiers, slots=2, *, dtype=torch.float32, overlap=True, staged=False, staging_slots=2, pin=True):
    """A store and its stream; asserts that closing them leaves no thread."""
    before = set(threading.enumerate())
    store = WeightStore(Device("cpu"), Recorder(), source, tiers, dtype, pin)
    store.load()
    order = [u for u in UNITS if tiers[u] != "gpu"]
    stream = WeightStream(store, order, slots, staging_slots, overlap=overlap, staged=staged)
    stream.start(order)
    try:
        yield store, stream
    finally:
        within(10, stream.close)
        within(10, store.close)
        assert set(threading.enumerate()) == before, "a thread is left"


def check_sweeps(stream, expected, dtype, sweeps=3):
    for _ in range(sweeps):
        for unit in UNITS:
            tensors = stream.get(unit)
            assert stream.get(unit) is tensors, "asking again gives the same tensors"
            assert set(tensors) == set(expected[unit])
            for role, t in expected[unit].items():
                assert tensors[role].dtype == dtype
                assert torch.equal(tensors[role], t.to(dtype)), (unit, role)
            stream.release(unit)


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "serial"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_unit_equals_the_checkpoint_over_several_sweeps(tmp_path, placement, overlap, staged):
    source, expected = tiny_units(tmp_path)
    for slots in (1, 2, 3, len(UNITS)):
        with streamed(source, PLACEMENTS[placement], slots, overlap=overlap, staged=staged) as (_, stream):
            within(20, lambda: check_sweeps(stream, expected, torch.float32))


@pytest.mark.parametrize("stored, compute", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_units_are_cast_to_the_compute_dtype_on_every_tier(tmp_path, stored, compute, staged):
    source, expected = tiny_units(tmp_path, stored)
    for placement in PLACEMENTS.values():
        with streamed(source, placement, dtype=compute, staged=staged) as (_, stream):
            within(20, lambda: check_sweeps(stream, expected, compute, sweeps=2))


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "serial"])
def test_units_that_are_copied_in_pieces_arrive_whole_and_few_pieces_are_ahead(tmp_path, monkeypatch, overlap):
    source, expected = tiny_units(tmp_path)
    monkeypatch.setattr(link, "PIECE_BYTES", 1000)
    given_way, most, real = [], [], link.Link.give_way

    def give_way(self):
        given_way.append(self)
        real(self)
        most.append(len(self._pieces))

    monkeypatch.setattr(link.Link, "give_way", give_way)
    with streamed(source, PLACEMENTS["cpu"], 3, overlap=overlap, staged=True) as (_, stream):
        within(20, lambda: check_sweeps(stream, expected, torch.float32))
    nbytes = sum(t.nbytes for unit, tensors in expected.items() if unit.kind != "embed" for t in tensors.values())
    assert len(given_way) > nbytes / 1000 and max(most) == 1


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "serial"])
def test_unpinned_homes_pass_through_staging(tmp_path, overlap):
    source, expected = tiny_units(tmp_path)
    for placement in ("cpu", "mixed"):
        for staging_slots in (1, 3):
            options = dict(pin=False, staged=True, staging_slots=staging_slots, overlap=overlap)
            with streamed(source, PLACEMENTS[placement], **options) as (_, stream):
                within(20, lambda: check_sweeps(stream, expected, torch.float32))


def test_resident_unit_needs_no_order_and_no_slot(tmp_path):
    source, expected = tiny_units(tmp_path)
    with streamed(source, PLACEMENTS["mixed"], 1) as (store, stream):
        assert torch.equal(stream.get(HEAD)["head"], expected[HEAD]["head"])
        assert torch.equal(stream.get(E0)["up"], expected[E0]["up"])
        stream.release(HEAD)
        assert within(5, lambda: stream.get(A0)) is not None


def test_cast_leaves_tensors_of_the_compute_dtype_alone():
    tensor = torch.ones(3)
    assert as_compute({"x": tensor}, torch.float32)["x"] is tensor


def counted_reads(monkeypatch, store_class=WeightStore):
    """Names of the units whose read has been started by any store."""
    started, real = [], store_class.read

    def read(self, unit, buffer, on_done=None):
        started.append(unit)
        return real(self, unit, buffer, on_done)

    monkeypatch.setattr(store_class, "read", read)
    return started


def settle(started, count):
    """Waits until ``count`` reads have been started, and asserts that there are no more."""
    deadline = time.monotonic() + 10
    while len(started) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(SETTLE_S / 5)
    assert len(started) == count


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_look_ahead_fills_the_slots_and_goes_no_further(tmp_path, monkeypatch, slots):
    source, _ = tiny_units(tmp_path)
    started = counted_reads(monkeypatch)
    with streamed(source, PLACEMENTS["disk"], slots) as (_, stream):
        for used in range(2 * len(UNITS)):
            settle(started, used + slots)
            unit = UNITS[used % len(UNITS)]
            within(5, lambda u=unit: stream.get(u))
            settle(started, used + slots)
            stream.release(unit)
        assert started[: 2 * len(UNITS)] == UNITS * 2, "look-ahead wraps from the last unit to the first"


def test_staged_look_ahead_reads_no_more_than_slots_and_staging_hold(tmp_path, monkeypatch):
    source, _ = tiny_units(tmp_path)
    started = counted_reads(monkeypatch)
    with streamed(source, PLACEMENTS["disk"], 2, staged=True, staging_slots=2) as (_, stream):
        settle(started, 4)
        within(5, lambda: stream.get(A0))
        stream.release(A0)
        settle(started, 5)


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_serial_stream_starts_nothing_before_it_is_asked(tmp_path, monkeypatch, staged):
    source, _ = tiny_units(tmp_path)
    started = counted_reads(monkeypatch)
    with streamed(source, PLACEMENTS["disk"], 3, overlap=False, staged=staged) as (_, stream):
        time.sleep(SETTLE_S)
        assert started == []
        within(5, lambda: stream.get(A0))
        time.sleep(SETTLE_S)
        assert started == [A0]
        stream.release(A0)


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_slot_keeps_its_numbers_until_it_is_released(tmp_path, staged):
    source, expected = tiny_units(tmp_path)
    with streamed(source, PLACEMENTS["disk"], 2, staged=staged) as (_, stream):
        held = within(5, lambda: stream.get(A0))
        within(5, lambda: stream.get(E0))
        stream.release(E0)
        time.sleep(SETTLE_S)
        assert all(torch.equal(held[role], t) for role, t in expected[A0].items())


def failing_preadv(fd, buffers, offset):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "serial"])
@pytest.mark.parametrize("slots", [1, 4])
def test_read_error_reaches_whoever_asks_first_and_again(tmp_path, monkeypatch, slots, overlap, staged):
    source, _ = tiny_units(tmp_path)
    monkeypatch.setattr(os, "preadv", failing_preadv)
    with streamed(source, PLACEMENTS["disk"], slots, overlap=overlap, staged=staged) as (_, stream):
        for unit in (A0, A0, E0):
            with pytest.raises(StorageError, match="Input/output error"):
                within(5, lambda u=unit: stream.get(u))


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_read_error_of_a_later_sweep_surfaces_at_its_unit(tmp_path, monkeypatch, staged):
    source, expected = tiny_units(tmp_path)
    with streamed(source, PLACEMENTS["disk"], 1, staged=staged, staging_slots=1) as (_, stream):
        within(10, lambda: check_sweeps(stream, expected, torch.float32, sweeps=1))
        monkeypatch.setattr(os, "preadv", failing_preadv)
        with pytest.raises(StorageError):
            within(10, lambda: check_sweeps(stream, expected, torch.float32, sweeps=2))
        with pytest.raises(StorageError):
            within(5, lambda: stream.get(E3))


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_shard_that_can_no_longer_be_opened_is_an_error_not_a_hang(tmp_path, staged):
    source, _ = tiny_units(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    with streamed(source, PLACEMENTS["disk"], 2, staged=staged) as (_, stream):
        for _ in range(2):
            with pytest.raises(StorageError, match="cannot open .*model.safetensors"):
                within(5, lambda: stream.get(A0))


def test_wrong_order_is_refused(tmp_path):
    source, _ = tiny_units(tmp_path)
    with (
        streamed(source, PLACEMENTS["disk"]) as (_, stream),
        pytest.raises(RuntimeError, match="at layers.0.attention, but layers.0.expert.1 was asked for: wrong order"),
    ):
        within(5, lambda: stream.get(E1))


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_close_with_transfers_under_way_ends_the_threads(tmp_path, monkeypatch, staged):
    source, _ = tiny_units(tmp_path)
    real = os.preadv

    def slow(fd, buffers, offset):
        time.sleep(0.02)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    for placement in ("disk", "mixed", "cpu"):
        with streamed(source, PLACEMENTS[placement], 3, staged=staged):
            pass  # the context asserts that no thread is left


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_stream_of_which_a_thread_cannot_be_started_leaves_none(tmp_path, monkeypatch, staged):
    source, expected = tiny_units(tmp_path)
    with streamed(source, PLACEMENTS["cpu"], staged=staged, pin=False) as (_, stream):
        stream.close()
        before, real, left = set(threading.enumerate()), threading.Thread.start, [1]

        def start(thread):
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
            real(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start"):
                stream.start(UNITS)
        assert set(threading.enumerate()) == before
        stream.start(UNITS)
        within(10, lambda: check_sweeps(stream, expected, torch.float32, sweeps=1))


def test_store_that_cannot_be_loaded_leaves_no_thread_once_it_is_closed(tmp_path):
    source, _ = tiny_units(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 5000)
    before = set(threading.enumerate())
    store = WeightStore(Device("cpu"), Recorder(), source, PLACEMENTS["cpu"], torch.float32)
    assert set(threading.enumerate()) == before, "nothing runs before it is loaded"
    with pytest.raises(DataError, match="ends at byte 5000"):
        store.load()
    store.close()
    assert set(threading.enumerate()) == before


def test_bytes_are_counted_once_per_lane(tmp_path):
    source, expected = tiny_units(tmp_path)
    with streamed(source, PLACEMENTS["cpu"], 1, overlap=False) as (store, stream):
        loaded = store.recorder.totals()["disk_read"].nbytes
        within(10, lambda: check_sweeps(stream, expected, torch.float32, sweeps=2))
        totals = store.recorder.totals()
        assert totals["h2d"].nbytes == 2 * sum(store.layouts[u].stored_bytes for u in UNITS)
        assert totals["disk_read"].nbytes == loaded == sum(store.layouts[u].host_bytes for u in UNITS)


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_embedding_rows_are_the_tables_whatever_its_home(tmp_path, tier, compute):
    source, expected = tiny_units(tmp_path)
    table = expected[EMBEDDING]["embed"]
    store = WeightStore(Device("cpu"), Recorder(), source, {EMBEDDING: tier}, compute)
    store.load()
    embed = EmbeddingTable(store, source, EMBEDDING, max_tokens=8)
    ids = torch.tensor([3, 0, 39, 3, 17])
    first = embed(ids)
    second = embed(ids.flip(0))
    assert torch.equal(first, table[ids].to(compute)) and first.dtype == compute
    assert torch.equal(second, table[ids.flip(0)].to(compute)), "a later call does not change an earlier result"
    if tier != "gpu":  # on CUDA the first batch's rows may still be on their way when the second's are gathered
        kept = embed._rows.clone()
        embed(torch.tensor([5, 6]), first=5)
        changed = (embed._rows != kept).nonzero()[:, 0]
        assert changed.min() >= 5 * 24 * 4 and changed.max() < 7 * 24 * 4, "GPU batches share no host bytes"
    store.close()


@pytest.mark.parametrize("staged, lowered", [(False, {"copy_into_slots"}), (True, set())], ids=["direct", "staged"])
def test_thread_that_copies_beside_products_lets_these_run_first(tmp_path, staged, lowered):
    source, expected = tiny_units(tmp_path)
    here, niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), {}
    with streamed(source, PLACEMENTS["mixed"], staged=staged) as (_, stream):
        within(20, lambda: check_sweeps(stream, expected, torch.float32))
        for thread in threading.enumerate():
            niceness[thread.name] = os.getpriority(os.PRIO_PROCESS, thread.native_id)
    assert "copy_into_slots" in niceness
    assert {name for name, value in niceness.items() if value > here} == lowered
