"""The compute device on a machine without one, and host memory that is exactly as large as asked."""

import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexmoe.errors import InfeasibleError, UsageError
from flexmoe.system import cuda_features
from flexmoe.system import device as device_module
from flexmoe.system.device import Device, NoEvent
from flexmoe.system.trace import Recorder
from policies.common.memory_units import GIB, MIB
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


@pytest.fixture
def gpu(cpu, monkeypatch):
    """A device of 24 GiB whose context takes 500 MiB; returns it and the shares that torch was capped to."""
    shares = []
    monkeypatch.setattr(device_module, "_context_bytes", lambda device: 500 * MIB)
    monkeypatch.setattr(device_module, "_LATER_KERNELS_BYTES", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    cpu.is_cuda = True
    return cpu, shares


@pytest.mark.parametrize(
    "budget, kept", [(4 * GIB, 256 * MIB), (12 * GIB, 256 * MIB), (24 * GIB, int(0.02 * 24 * GIB))]
)
def test_planned_tensors_leave_room_for_the_context_and_the_allocator(gpu, budget, kept):
    assert gpu[0].room(budget) == budget - 500 * MIB - kept


def test_a_budget_that_context_and_allocator_use_up_is_refused(gpu):
    with pytest.raises(
        InfeasibleError, match="0.49 GiB of the CUDA context and its kernels and the 0.25 GiB that are kept"
    ):
        gpu[0].room(756 * MIB)


def test_the_allocator_may_use_what_is_kept_for_it_and_no_more(gpu):
    device, shares = gpu
    device.cap_memory(12 * GIB)
    assert shares == [(12 * GIB - 500 * MIB) / (24 * GIB)]


def test_the_cap_of_an_engine_does_not_hold_the_next_one(gpu):
    device, shares = gpu
    device.cap_memory(12 * GIB)
    device.cap_memory(None)
    assert shares[-1] == 1.0


@pytest.mark.parametrize("capability, grouped, flash", [((7, 5), 0, 0), ((8, 6), 0, 4), ((9, 0), 1, 4)], ids=str)
def test_warming_uses_each_kernel_that_the_device_has(capability, grouped, flash, monkeypatch):
    used = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            used.append(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with Counts():
        cuda_features.warm_kernels(torch.device("meta"))
    assert used.count("_grouped_mm") == grouped and used.count("_flash_attention_forward") == flash
    assert used.count("index_select") == (2 if capability < (8, 0) else 3)


def test_masked_attention_does_without_cudnn_on_a_cuda_device(monkeypatch):
    said = []
    event = SimpleNamespace(record=lambda stream=None: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", said.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: event)
    assert Device("cuda").is_cuda and said == [False]


@pytest.mark.parametrize(
    "given, found",
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "x:1"}, {"PYTORCH_ALLOC_CONF": "x:1"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "y:2"}, {"PYTORCH_CUDA_ALLOC_CONF": "y:2"}),
    ],
)
def test_segments_grow_in_place_unless_the_user_says_otherwise(given, found):
    code = "import os, flexmoe; print({k: v for k, v in os.environ.items() if 'ALLOC_CONF' in k})"
    clean = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    run = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(found)
