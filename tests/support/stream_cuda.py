"""A machine with pretended GPUs: what the engine asks of `torch.cuda`, over simulated streams.

The engine's own `Device` runs on it unchanged, and takes the paths of CUDA.
"""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from flexmoe.engine.engine import Engine
from tests.support.stream_queues import Event, Simulator
from tests.support.stream_tensors import Deferring

#: Compute capability of the pretended GPUs: bfloat16 and grouped products are there.
_CAPABILITY = (9, 0)
_TOTAL_BYTES = 1 << 40


@contextlib.contextmanager
def simulated(seed: int, devices: int = 1, free_bytes: int = _TOTAL_BYTES):
    """Pretend that the machine has GPUs, whose streams run in the order of a seed; gives the `Simulator`."""
    simulator = Simulator(seed, devices)
    with pytest.MonkeyPatch.context() as patch:
        for name, stands_in in _torch_cuda(simulator, free_bytes).items():
            patch.setattr(torch.cuda, name, stands_in)
        _patch_torch(patch, simulator)
        _watch_sweeps(patch, simulator)
        with Deferring(simulator):
            yield simulator


def _torch_cuda(simulator, free_bytes):
    def stream(device=None, priority=0, **_):
        return simulator.new_stream(device)

    def set_device(device):
        simulator.device = device

    def register(pointer, nbytes, flags):
        simulator.pinned[pointer] = pointer + nbytes
        return 0

    def unregister(pointer):
        simulator.pinned.pop(pointer, None)
        return 0

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: len(simulator.devices),
        "current_device": lambda: simulator.device.index,
        "set_device": set_device,
        "device": lambda device: _use_device(simulator, device),
        "Stream": stream,
        "Event": lambda enable_timing=False, blocking=False, **_: Event(simulator),
        "stream": lambda stream: _use_stream(simulator, stream),
        "current_stream": simulator.current,
        "default_stream": simulator.default,
        "mem_get_info": lambda device=None: (free_bytes, _TOTAL_BYTES),
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: _CAPABILITY,
        "get_device_name": lambda device=None: "pretended GPU",
        "cudart": lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister),
        "synchronize": _refuse_sync,
    }


def _refuse_sync(device=None):
    raise AssertionError("the whole device is waited for")


@contextlib.contextmanager
def _use_device(simulator, device):
    before, simulator.device = simulator.device, device
    try:
        yield
    finally:
        simulator.device = before


@contextlib.contextmanager
def _use_stream(simulator, stream):
    if stream is None:
        yield
        return
    device, simulator.device = simulator.device, stream.device
    before = simulator.set_current(stream)
    try:
        yield
    finally:
        simulator.set_current(before)
        simulator.device = device


def _patch_torch(patch, simulator):
    run, tensor, no_grad = threading.Thread.run, torch.tensor, torch.no_grad

    def run_deferring(thread):
        with Deferring(simulator):
            run(thread)

    def tensor_on(data, *, device=None, **options):
        """`torch.tensor` makes its tensor on the host, and waits for the upload."""
        made = tensor(data, **options)
        return made if device is None or torch.device(device).type == "cpu" else made.to(torch.device(device))

    # Views of tensors made outside of inference mode are refused inside, if they are wrappers.
    mode = torch.inference_mode
    patch.setattr(mode, "__enter__", lambda self: setattr(self, "_instead", no_grad()) or self._instead.__enter__())
    patch.setattr(mode, "__exit__", lambda self, *error: self._instead.__exit__(*error))
    patch.setattr(threading.Thread, "run", run_deferring)
    patch.setattr(torch, "tensor", tensor_on)


def _watch_sweeps(patch, simulator):
    step = Engine.step

    def watched(engine):
        simulator.in_sweep(True)
        try:
            return step(engine)
        finally:
            simulator.in_sweep(False)

    patch.setattr(Engine, "step", watched)
