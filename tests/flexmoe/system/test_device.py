"""The compute device on a machine without one, and host memory that is exactly as large as asked."""

import mmap
import os
import subprocess
import sys

import pytest
import torch

from flexmoe.errors import InfeasibleError, UsageError
from flexmoe.system import device as device_module
from flexmoe.system.device import Device, NoEvent
from flexmoe.system.trace import Recorder
from policies.common.memory_units import SYSTEM_PAGE_BYTES as PAGE_BYTES


@pytest.fixture
def cpu():
    return Device("cpu")


def mapped_sizes(monkeypatch):
    """Sizes of the mappings made from here on."""
    sizes, real = [], device_module._map_pages
    monkeypatch.setattr(device_module, "_map_pages", lambda size, shared: sizes.append(size) or real(size, shared))
    return sizes


@pytest.mark.parametrize(
    "asked, pages", [(0, 1), (1, 1), (PAGE_BYTES, 1), (PAGE_BYTES + 1, 2), (3 * PAGE_BYTES - 1, 3)]
)
def test_host_buffer_takes_whole_pages_and_no_more(cpu, monkeypatch, asked, pages):
    sizes = mapped_sizes(monkeypatch)
    buffer = cpu.host_buffer(asked)
    assert sizes == [pages * PAGE_BYTES]
    assert buffer.dtype == torch.uint8 and buffer.shape == (asked,)


def test_host_buffer_is_not_rounded_to_a_power_of_two(cpu, monkeypatch):
    sizes = mapped_sizes(monkeypatch)
    cpu.host_buffer((5 << 20) + 1)
    assert sizes == [(5 << 20) + PAGE_BYTES]


def test_host_buffer_begins_on_a_page_and_holds_what_is_written(cpu):
    for nbytes in (1, 5000, 1 << 20):
        buffer = cpu.host_buffer(nbytes)
        assert buffer.data_ptr() % PAGE_BYTES == 0
        buffer.fill_(7)
        assert int(buffer.sum()) == 7 * nbytes


def test_buffer_lives_as_long_as_a_view_of_it(cpu):
    views = [cpu.host_buffer(1 << 16)[:100].fill_(i) for i in range(20)]
    assert [int(v[99]) for v in views] == list(range(20))


def memfd_of(buffer):
    """The descriptor whose pages ``buffer`` is."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:flexmoe"):
                with mmap.mmap(int(name), len(buffer)) as pages:
                    if bytes(pages) == bytes(buffer.numpy()):
                        return int(name)
        except OSError:
            continue
    raise LookupError("no memfd holds these bytes")


def test_another_process_maps_a_shared_buffer_and_both_see_the_same_bytes(cpu):
    buffer = cpu.host_buffer(2 * PAGE_BYTES, shared=True)
    buffer.copy_(torch.randint(0, 256, buffer.shape, dtype=torch.uint8))
    fd = memfd_of(buffer)
    code = (
        f"import mmap; p = mmap.mmap({fd}, {len(buffer)}); assert sum(p[:]) == {int(buffer.long().sum())}; "
        f"p[{PAGE_BYTES}:{PAGE_BYTES} + 5] = b'hello'"
    )
    subprocess.run([sys.executable, "-S", "-c", code], pass_fds=[fd], check=True, timeout=60)
    assert bytes(buffer[PAGE_BYTES : PAGE_BYTES + 5].numpy()) == b"hello"


def test_ordinary_buffer_is_private(cpu):
    buffer = cpu.host_buffer(PAGE_BYTES)
    buffer.copy_(torch.randint(1, 256, buffer.shape, dtype=torch.uint8))
    with pytest.raises(LookupError):
        memfd_of(buffer)


def test_memory_that_the_host_cannot_provide_is_an_infeasible_error(cpu):
    with pytest.raises(InfeasibleError, match=r"the host cannot provide 4194304.00 GiB of memory"):
        cpu.host_buffer(1 << 52)


def test_events_and_streams_of_the_cpu_do_nothing_and_never_wait(cpu):
    event = cpu.record()
    assert isinstance(event, NoEvent) and isinstance(cpu.event(timing=True), NoEvent)
    assert event.query() is True
    assert event.wait() is event.wait(object()) is event.synchronize() is event.record() is None
    assert cpu.stream() is None and not cpu.is_cuda
    with cpu.on(None):
        pass


def test_host_waits_are_counted(cpu):
    for _ in range(3):
        cpu.host_wait(cpu.record())
    assert cpu.host_waits == 3


def test_work_on_the_cpu_is_recorded_by_the_host_clock(cpu):
    recorder = Recorder()
    with cpu.timed(recorder, "gpu", "x", 12):
        pass
    assert recorder.totals()["gpu"].nbytes == 12


def test_auto_is_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Device("auto").torch.type == "cpu"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match="finds no CUDA device; use device='cpu'"):
            Device(name)


@pytest.mark.parametrize("name", ["tpu", "", "mps", "CUDA", "cpu0"])
def test_unknown_device_is_a_usage_error(name):
    with pytest.raises(UsageError, match="choose auto, cuda or cpu"):
        Device(name)


def test_cap_has_no_effect_on_the_cpu(cpu):
    assert cpu.cap_memory(0) is None
