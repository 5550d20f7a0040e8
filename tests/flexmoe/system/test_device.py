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
from tests.support.pretend_cuda import Event, Stream


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


# CUDA, of which nothing is there but what the tests put in its place.

UUID = "8d6f1c2e-0b5a-4f6d-9a53-0f3c5b7d1e22"


class NVMLError(Exception):
    pass


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that CUDA calls number 0 and NVML number 3, of which 70 bytes are free before it is used and 50 afterwards."""
    state = SimpleNamespace(context=False, asked=[], mine=None, launched=[], registered=[], threads=[])

    def handle(uuid):
        state.asked.append(uuid)
        return uuid

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=50 if state.context else 70),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [state.mine] if state.mine else [],
    )
    cudart = SimpleNamespace(cudaHostRegister=lambda *args: state.registered.append(args) or 712)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: state.context, raising=False)
    monkeypatch.setattr(device_module, "_free_before", {})
    monkeypatch.setattr(torch, "set_num_threads", state.threads.append)
    for name, stands_in in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "default_stream": lambda device: Stream(),
        "Event": lambda **options: Event(),
        "get_device_properties": lambda device: SimpleNamespace(uuid=UUID),
        "mem_get_info": lambda device: (50, 100),
        "memory_reserved": lambda device: 0,
        "cudart": lambda: cudart,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stands_in)
    return state


def test_a_gpu_is_looked_up_by_its_uuid(pretended):
    device = Device("cuda")
    assert pretended.asked == [f"GPU-{UUID}"]
    pretended.mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=17)
    assert device_module.process_gpu_bytes(device.torch) == 17
    pretended.mine.pid += 1
    assert device_module.process_gpu_bytes(device.torch) is None


def test_the_context_is_what_was_free_before_it_and_is_not_afterwards(pretended):
    """In a container NVML tells other process ids, and other processes hold 30 bytes of the GPU."""
    device = Device("cuda").torch
    pretended.context = True
    Device("cuda")  # a second engine remembers what the first one found
    assert device_module._held_bytes(device) == 20
    device_module._free_before.clear()
    Device("cuda")  # somebody else has used the GPU before: what others hold cannot be told apart
    assert device_module._held_bytes(device) == 50


def test_memory_that_the_driver_does_not_lock_leaves_no_error_to_the_next_launch(pretended, monkeypatch):
    def launch(*args, **options):
        pretended.launched.append(options)
        raise RuntimeError("CUDA error: part or all of the requested memory range is already mapped")

    device = Device("cuda")
    monkeypatch.setattr(torch, "ones", launch)
    with pytest.raises(InfeasibleError, match=r"cannot lock .* \(error 712\)"):
        device.host_buffer(10)
    assert pretended.launched == [{"device": device.torch}]


@pytest.mark.parametrize("usable, asked, expected", [(16, 16, 14), (16, 4, 4), (2, 2, 1), (1, 1, 1)])
def test_operators_on_the_host_leave_two_cores_to_a_gpu(pretended, monkeypatch, usable, asked, expected):
    monkeypatch.setattr(device_module, "usable_cores", lambda: usable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked)
    Device("cuda")
    assert pretended.threads == [expected]
    Device("cpu")
    assert pretended.threads == [expected]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_lock_that_the_driver_refuses_is_no_matter_to_what_is_computed_next(monkeypatch):
    device, real = Device("cuda"), device_module._map_pages
    kept = device.host_buffer(PAGE_BYTES)
    pages = real(PAGE_BYTES, False)
    monkeypatch.setattr(device_module, "_map_pages", lambda size, shared: kept.numpy() if shared is False else pages)
    with pytest.raises(InfeasibleError):
        device.host_buffer(PAGE_BYTES)
    assert int(torch.arange(5, device=device.torch).sum()) == 10
