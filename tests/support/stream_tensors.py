"""Tensors of a pretended GPU: an operation gives its result's shape at once, and its numbers when its stream gets there.

A `DeviceTensor` is a wrapper around host memory that says it is on CUDA. Operations on it, and factories that ask for CUDA,
come to `on_device` by a dispatch mode, which every thread needs for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.stream_queues import Simulator, Stream, poison

aten = torch.ops.aten
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
#: The shape of their results depends on numbers: CUDA waits for the stream.
_DATA_DEPENDENT = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}
_NOT_MASKS = {torch.int32, torch.int64}


class Memory:
    """A piece of device memory, as long as a tensor has it.

    Args:
        simulator: of the streams.
        numbers: where they are really.
        device: of the pretended machine.
    """

    def __init__(self, simulator: Simulator, numbers: torch.Tensor, device: torch.device):
        self.simulator, self.device = simulator, device
        self.stream: Stream = simulator.current(device)
        self.users: set[Stream] = set()
        self._numbers = numbers

    def __del__(self):
        self.simulator.free(self.stream, self._numbers, self.users)


class DeviceTensor(torch.Tensor):
    """``numbers`` are right when the stream that computes them has got there; ``memory`` is shared by all views."""

    numbers: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, memory: Memory):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="meta",
        )
        self.numbers, self.memory = numbers, memory
        return self

    def __repr__(self):
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def record_stream(self, stream: Stream) -> None:
        self.memory.users.add(stream)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if (special := _SPECIAL.get(func)) is not None:
            return special(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_device(_first(args, kwargs).memory.simulator, func, args, kwargs or {})


class Deferring(TorchDispatchMode):
    """Catches the factories and uploads of the thread that enters it."""

    def __init__(self, simulator: Simulator):
        super().__init__()
        self._simulator = simulator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_device(self._simulator, func, args, kwargs or {})


def on_device(simulator: Simulator, func, args, kwargs):
    """Do an operation at once if it is of the host, else issue it."""
    first = _first(args, kwargs)
    wanted = kwargs.get("device")
    if first is None and (wanted is None or wanted.type not in ("cuda", "meta")):
        return func(*args, **kwargs)
    device = simulator.device_of(wanted if first is None else first.memory.device)
    if func is aten._to_copy.default:
        return _to_copy(simulator, args[0], device, kwargs)
    if wanted is not None and wanted.type == "cpu":  # a host tensor like one of the device
        return func(*_mapped(_numbers, args), **kwargs)
    if func is aten.copy_.default:
        return _copy(simulator, *args, **kwargs)
    if func is aten._local_scalar_dense.default:
        return synced(args[0]).item()
    if func.is_view or func is aten._unsafe_view.default:
        return _mapped(lambda view: DeviceTensor(view, first.memory), func(*_mapped(_numbers, args), **kwargs))
    return _issue(simulator, func, args, kwargs, device)


def _issue(simulator, func, args, kwargs, device):
    """Issue a kernel; returns its results. What is issued holds numbers only: it keeps no tensor of the engine alive."""
    stream = simulator.current(device)
    inputs = _mapped(lambda x: _input(simulator, func, stream, x), (args, kwargs))
    masks = any(isinstance(x, DeviceTensor) and x.dtype not in _NOT_MASKS for x in _indices(func, args))
    if func in _DATA_DEPENDENT or masks:
        simulator.sync(stream, stream.issued)
    if func._schema.is_mutable:
        simulator.issue(stream, partial(_run, func, inputs))
        return kwargs["out"] if "out" in kwargs else args[0]
    if func in _DATA_DEPENDENT or masks:
        with torch._C._DisableTorchDispatch():
            outline = _mapped(_outline, _run(func, inputs))
    else:
        outline = _shapes(func, inputs)
    new = _mapped(lambda of: poison(torch.empty_strided(*of.size, dtype=of.dtype)), outline)
    if func not in _EMPTY:
        simulator.issue(stream, partial(_run_into, new, func, inputs))
    return _mapped(lambda numbers: DeviceTensor(numbers, Memory(simulator, numbers, device)), new)


def _input(simulator, func, stream, x):
    if isinstance(x, DeviceTensor):
        return x.numbers
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if not isinstance(x, torch.Tensor):
        return x
    if x.dim() and func not in (aten.index.Tensor, aten.index_put_.default):
        raise simulator.fault(f"{func} got a tensor of the host: expected all on the same device")
    if x.dim():  # indices on the host: CUDA uploads them, and waits
        simulator.sync(stream, stream.issued)
    return x.clone()


def _run(func, inputs):
    args, kwargs = inputs
    return func(*args, **kwargs)


def _run_into(new, func, inputs):
    for into, result in zip(_leaves(new), _leaves(_run(func, inputs)), strict=True):
        into.copy_(result)


def _shapes(func, inputs):
    """Of the results; remembered, because sweeps and layers repeat them."""
    key = func, _hashable(inputs)
    if (known := _shapes_of.get(key)) is None:
        with torch._C._DisableTorchDispatch():
            known = _shapes_of[key] = _mapped(_outline, _run(func, _mapped(_on_meta, inputs)))
    return known


@dataclass(frozen=True, slots=True)
class _Outline:
    """Shape and strides, and the dtype, of a result."""

    size: tuple
    dtype: torch.dtype


_shapes_of: dict = {}


def _outline(result):
    return _Outline((result.shape, result.stride()), result.dtype)


def _on_meta(x):
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def _hashable(x):
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_hashable, _parts(x))) if isinstance(x, (tuple, list, dict)) else (type(x), x)


def _parts(x):
    return x.items() if isinstance(x, dict) else x


def _mapped(change, x):
    """``x`` with every leaf of its lists, tuples and dictionaries changed."""
    if isinstance(x, (tuple, list)):
        return [_mapped(change, each) for each in x] if isinstance(x, list) else tuple(_mapped(change, e) for e in x)
    return {name: _mapped(change, each) for name, each in x.items()} if isinstance(x, dict) else change(x)


def _leaves(x):
    for each in x if isinstance(x, (tuple, list)) else x.values() if isinstance(x, dict) else ():
        yield from _leaves(each)
    if not isinstance(x, (tuple, list, dict)):
        yield x


def _first(*nested):
    return next((x for x in _leaves(nested) if isinstance(x, DeviceTensor)), None)


def _numbers(x):
    return x.numbers if isinstance(x, DeviceTensor) else x


def _indices(func, args):
    return args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()


def _to_copy(simulator, source, device, options):
    """`Tensor.to` that has to copy: on the device, up to it, or down from it."""
    wanted, non_blocking = options.get("device"), options.get("non_blocking", False)
    dtype = options.get("dtype") or source.dtype
    down = isinstance(source, DeviceTensor) and wanted is not None and wanted.type == "cpu"
    new = poison(torch.empty_like(source.numbers if isinstance(source, DeviceTensor) else source, dtype=dtype))
    if down:  # torch pins what it makes for a copy that does not block
        _download(simulator, new, source, waits=not non_blocking)
        return new
    target = DeviceTensor(new, Memory(simulator, new, device))
    return _copy(simulator, target, source, non_blocking)


def _copy(simulator, target, source, non_blocking=False):
    if not isinstance(target, DeviceTensor):
        waits = not (non_blocking and simulator.is_pinned(target))
        if not (waits or target.is_contiguous()):
            raise simulator.fault("a copy to a host tensor with gaps does not wait: torch would read it too early")
        _download(simulator, target, source, waits=waits)
        return target
    stream, into = simulator.current(target.memory.device), target.numbers
    if isinstance(source, DeviceTensor):
        numbers = source.numbers
        simulator.issue(stream, lambda: into.copy_(numbers))
        return target
    # From pinned memory the copy engine reads when it gets there; else the driver takes a copy at once.
    is_late = simulator.is_pinned(source) and source.dtype == into.dtype and source.is_contiguous()
    numbers = source if is_late else source.clone()
    simulator.issue(stream, lambda: into.copy_(numbers))
    if not non_blocking:
        simulator.sync(stream, stream.issued)
    return target


def _download(simulator, target, source, *, waits):
    stream, numbers = simulator.current(source.memory.device), source.numbers
    simulator.issue(stream, lambda: target.copy_(numbers))
    if waits:
        simulator.sync(stream, stream.issued)


def synced(tensor: DeviceTensor) -> torch.Tensor:
    """Numbers that the host reads: it waits for the current stream."""
    simulator, stream = tensor.memory.simulator, tensor.memory.simulator.current(tensor.memory.device)
    simulator.sync(stream, stream.issued)
    return tensor.numbers


def _to(tensor, *args, **kwargs):
    """`Tensor.to`: a tensor that is on the device already stays what it is."""

    def own(value):
        is_device = isinstance(value, (torch.device, str)) and torch.device(value).type == "cuda"
        return torch.device("meta") if is_device else value

    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.to(tensor, *map(own, args), **{name: own(value) for name, value in kwargs.items()})


def _attention(q, k, v, **options):
    """One kernel, as on CUDA."""
    simulator, stream = q.memory.simulator, q.memory.simulator.current(q.memory.device)
    new = poison(torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype))
    inputs, options = _mapped(_numbers, [q, k, v]), _mapped(_numbers, options)
    simulator.issue(stream, lambda: new.copy_(F.scaled_dot_product_attention(*inputs, **options)))
    return DeviceTensor(new, Memory(simulator, new, q.memory.device))


_SPECIAL = {
    torch.Tensor.tolist: lambda t: synced(t).tolist(),
    torch.Tensor.to: _to,
    torch.Tensor.data_ptr: lambda t: t.numbers.data_ptr(),
    torch.Tensor.device.__get__: lambda t: t.memory.device,
    torch.Tensor.is_cuda.__get__: lambda t: True,
    torch.Tensor.is_meta.__get__: lambda t: False,
    F.scaled_dot_product_attention: _attention,
}
