"""Disk transfers: aligned reads equal plain ones, faults become sentences, the pool keeps order and ends its threads."""

import errno
import fcntl
import os
import random
import threading

import pytest
import torch

from flexmoe.errors import DataError, StorageError
from flexmoe.system.device import Device
from flexmoe.system.direct_io import PIECE_BYTES, DirectFile, DiskPool, Pending, Transfer
from flexmoe.system.trace import Recorder
from policies.common.memory_units import SYSTEM_PAGE_BYTES as PAGE_BYTES
from policies.common.memory_units import align_down, align_up

REAL = {name: getattr(os, name) for name in ("open", "preadv", "pwritev", "fsync")}


def page_buffer(nbytes):
    return memoryview(Device("cpu").host_buffer(max(1, align_up(nbytes))).numpy())


@pytest.fixture
def content():
    return random.Random(1).randbytes(5 * PAGE_BYTES + 1234)


@pytest.fixture
def path(tmp_path, content):
    (tmp_path / "data.bin").write_bytes(content)
    return tmp_path / "data.bin"


def read_superset(file, start, end):
    first = align_down(start)
    buffer = page_buffer(align_up(end) - first)
    file.read_into(buffer, first, end - first)
    return bytes(buffer[start - first : end - first])


def check_random_extents(file, content, count=40):
    rng = random.Random(2)
    extents = [sorted(rng.sample(range(len(content) + 1), 2)) for _ in range(count)]
    for start, end in [*extents, [0, len(content)], [len(content) - 1, len(content)], [PAGE_BYTES, 2 * PAGE_BYTES]]:
        assert read_superset(file, start, end) == content[start:end], (start, end)


def test_alignment_goes_to_page_boundaries():
    assert [align_down(v) for v in (0, 1, PAGE_BYTES, PAGE_BYTES + 1)] == [0, 0, PAGE_BYTES, PAGE_BYTES]
    assert [align_up(v) for v in (0, 1, PAGE_BYTES, PAGE_BYTES + 1)] == [0, PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES]


def test_aligned_supersets_equal_plain_reads_up_to_the_end_of_the_file(path, content):
    file = DirectFile(path)
    check_random_extents(file, content)
    file.close()


def test_file_system_that_refuses_o_direct_at_open_is_read_through_the_cache(path, content, monkeypatch):
    def refuse(name, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return REAL["open"](name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    file = DirectFile(path)
    assert not file.direct
    check_random_extents(file, content)
    file.close()


def test_file_system_that_refuses_o_direct_at_the_first_read_is_read_through_the_cache(path, content, monkeypatch):
    def refuse(fd, buffers, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return REAL["preadv"](fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    file = DirectFile(path)
    if not file.direct:
        pytest.skip("this file system takes no O_DIRECT at all")
    check_random_extents(file, content)
    assert not file.direct
    file.close()


def test_einval_through_the_cache_is_an_error_and_not_a_loop(path, monkeypatch):
    def refuse(fd, buffers, offset):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(StorageError, match="Invalid argument"):
        DirectFile(path).read_into(page_buffer(10), 0, 10)


@pytest.mark.parametrize("most", [PAGE_BYTES, PAGE_BYTES + 100, 2 * PAGE_BYTES - 1])
def test_short_reads_are_continued(path, content, monkeypatch, most):
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: min(most, REAL["preadv"](fd, buffers, at)))
    file = DirectFile(path)
    check_random_extents(file, content)
    file.close()


def test_truncated_file_is_a_data_error_that_says_how_much_is_missing(path, content):
    file = DirectFile(path)
    os.truncate(path, 2 * PAGE_BYTES + 10)
    with pytest.raises(DataError, match=rf"data\.bin ends at byte {2 * PAGE_BYTES + 10}, 990 bytes early.*truncated"):
        read_superset(file, PAGE_BYTES, 2 * PAGE_BYTES + 1000)
    with pytest.raises(DataError, match="ends at byte"):
        read_superset(file, 4 * PAGE_BYTES, len(content))
    assert read_superset(file, 0, 2 * PAGE_BYTES + 10) == content[: 2 * PAGE_BYTES + 10]
    file.close()


def test_device_error_while_reading_is_a_storage_error(path, monkeypatch):
    def fail(fd, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match=r"reading .*data\.bin at byte 4096 failed: Input/output error"):
        DirectFile(path).read_into(page_buffer(10), 4096, 10)


def test_file_that_cannot_be_opened_is_a_storage_error(tmp_path, path, monkeypatch):
    with pytest.raises(StorageError, match="cannot open .*none.bin: No such file"):
        DirectFile(tmp_path / "none.bin")

    def refuse(name, flags, *rest):
        raise OSError(errno.EINVAL if flags & os.O_DIRECT else errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Too many open files"):
        DirectFile(path)


def test_written_bytes_are_read_back(tmp_path, content):
    file = DirectFile(tmp_path / "new.bin", writable=True)
    buffer = page_buffer(len(content))
    buffer[: len(content)] = content
    file.write_from(buffer, PAGE_BYTES)
    file.sync()
    assert read_superset(file, PAGE_BYTES, PAGE_BYTES + len(content)) == content
    file.close()
    assert (tmp_path / "new.bin").stat().st_mode & 0o777 == 0o600


def test_short_writes_are_continued(tmp_path, content, monkeypatch):
    def short(fd, buffers, offset):
        return REAL["pwritev"](fd, [buffers[0][:PAGE_BYTES]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    file = DirectFile(tmp_path / "new.bin", writable=True)
    buffer = page_buffer(len(content))
    buffer[: len(content)] = content
    file.write_from(buffer, 0)
    assert read_superset(file, 0, len(content)) == content
    file.close()


@pytest.mark.parametrize("call, message", [("pwritev", "writing"), ("fsync", "flushing")])
def test_full_disk_is_a_storage_error(tmp_path, monkeypatch, call, message):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    file = DirectFile(tmp_path / "new.bin", writable=True)
    with pytest.raises(StorageError, match=rf"{message} .*new\.bin.* failed: No space left on device"):
        file.write_from(page_buffer(100), 0)
        file.sync()
    file.close()


class SlowFile:
    """Stands for a `DirectFile`: notes the order of reads; fails at one offset."""

    path = "slow"

    def __init__(self, fails_at=None):
        self.offsets, self._fails_at = [], fails_at

    def read_into(self, buffer, offset, needed):
        self.offsets.append(offset)
        if offset == self._fails_at:
            raise StorageError("broken")

    write_from = None


@pytest.fixture
def threads_before():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before, "a thread is left"


def test_one_thread_serves_in_the_order_of_submission(threads_before):
    pool, file = DiskPool(Recorder(), threads=1), SlowFile()
    wanted = list(range(0, 50 * PAGE_BYTES, PAGE_BYTES))
    pending = [pool.submit([Transfer(file, o, page_buffer(1), 1)], "x") for o in wanted]
    for p in pending:
        p.wait()
    assert file.offsets == wanted
    pool.close()


def test_urgent_transfers_overtake_those_that_wait(threads_before):
    begun, submitted = threading.Event(), threading.Event()

    class HeldFile(SlowFile):
        def read_into(self, buffer, offset, needed):
            begun.set()
            submitted.wait(5)
            super().read_into(buffer, offset, needed)

    pool, file = DiskPool(Recorder(), threads=1), HeldFile()
    waiting = [pool.submit([Transfer(file, i, page_buffer(1), 1)], "ahead") for i in range(4)]
    begun.wait(5)
    urgent = [pool.urgent().submit([Transfer(file, i, page_buffer(1), 1)], "now") for i in (10, 11)]
    submitted.set()
    for pending in (*urgent, *waiting):
        pending.wait()
    assert file.offsets == [0, 10, 11, 1, 2, 3], "what has been begun is finished first"
    pool.close()


def test_large_transfer_is_cut_into_pieces_that_tile_it(tmp_path, threads_before):
    size = 2 * PIECE_BYTES + 3 * PAGE_BYTES + 17
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    (tmp_path / "big.bin").write_bytes(data.numpy().tobytes())
    recorder = Recorder()
    pool, buffer = DiskPool(recorder), page_buffer(size)
    file = DirectFile(tmp_path / "big.bin")
    pool.submit([Transfer(file, 0, buffer, size)], "big").wait()
    assert bytes(buffer[:size]) == data.numpy().tobytes()
    assert recorder.totals()["disk_read"].nbytes == align_up(size)
    pool.close()
    file.close()


def test_pieces_have_the_size_that_a_pool_was_asked_for(tmp_path, threads_before):
    (tmp_path / "big.bin").write_bytes(bytes(8 * PAGE_BYTES))
    file, pool, buffer = SlowFile(), DiskPool(Recorder(), piece_bytes=2 * PAGE_BYTES), page_buffer(8 * PAGE_BYTES)
    pool.submit([Transfer(file, 0, buffer, 8 * PAGE_BYTES)], "big").wait()
    assert sorted(file.offsets) == [at * PAGE_BYTES for at in (0, 2, 4, 6)]
    pool.close()


def test_first_error_reaches_the_callback_and_wait_while_other_pieces_complete(threads_before):
    pool, file, seen = DiskPool(Recorder(), threads=2), SlowFile(fails_at=PAGE_BYTES), []
    transfers = [Transfer(file, i * PAGE_BYTES, page_buffer(1), 1) for i in range(5)]
    pending = pool.submit(transfers, "x", seen.append)
    with pytest.raises(StorageError, match="broken"):
        pending.wait()
    assert len(seen) == 1 and isinstance(seen[0], StorageError)
    assert len(file.offsets) == 5
    pool.submit(transfers[2:], "x").wait()  # the threads live on
    pool.close()


def test_close_finishes_what_is_queued_and_ends_the_threads(threads_before):
    pool, file = DiskPool(Recorder(), threads=3), SlowFile()
    pending = [pool.submit([Transfer(file, i, page_buffer(1), 1)], "x") for i in range(30)]
    pool.close()
    for p in pending:
        p.wait()
    assert len(file.offsets) == 30


def test_group_without_pieces_is_complete_at_once():
    seen = []
    Pending(0, seen.append).wait()
    assert seen == [None]
