"""Small arrays on their way to the compute device, and back, through pinned memory of which every sweep uses the same.

A copy from memory that is not pinned waits until the device has it, and with it for all that the stream has to do before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from flexmoe.system.device import Device, Event

_FIRST_BYTES = 1 << 20
_ALIGNMENT = 16

#: An attribute of an object: a host tensor that is wanted on the device.
Wanted = tuple[Any, str]


class Uploads:
    """Copies on the compute stream, in the order of the calls; nobody waits for them. On device cpu there is nothing to copy.

    Args:
        device: the compute device.
    """

    def __init__(self, device: Device):
        self._device = device
        self._buffer = device.host_buffer(_FIRST_BYTES) if device.is_cuda else torch.empty(0, dtype=torch.uint8)
        self._used, self._outgrown = 0, list[torch.Tensor]()
        self._copied = device.record()

    def begin(self) -> None:
        """A sweep begins, and the memory of the last one's uploads is used again."""
        self._copied.synchronize()  # long ago: the tokens of that sweep have been read
        self._used = 0
        self._outgrown.clear()

    def __call__(self, arrays: Sequence[np.ndarray | torch.Tensor]) -> list[torch.Tensor]:
        """The arrays on the compute device, all in one copy; on device cpu themselves."""
        tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays]
        if not self._device.is_cuda:
            return tensors
        sizes = [-(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT for t in tensors]
        places = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes))]
        pinned = self._room(sum(sizes))
        for tensor, place in zip(tensors, places):
            _as(pinned[place], tensor).copy_(tensor)
        on_device = torch.empty(len(pinned), dtype=torch.uint8, device=self._device.torch)
        on_device.copy_(pinned, non_blocking=True)
        self._copied = self._device.record()
        return [_as(on_device[place], tensor) for tensor, place in zip(tensors, places)]

    def place(self, wanted: Iterable[Wanted]) -> Event:
        """Replace host tensors by the same on the compute device, all in one copy.

        Returns:
            Event: of the copy, for streams other than that of computing.
        """
        wanted = list(wanted)
        for (owner, name), tensor in zip(wanted, self([getattr(owner, name) for owner, name in wanted])):
            setattr(owner, name, tensor)
        return self._copied

    def _room(self, nbytes: int) -> torch.Tensor:
        """Pinned bytes that no other upload of the sweep has."""
        if self._used + nbytes > len(self._buffer):
            self._outgrown.append(self._buffer)  # copies from it may be under way
            self._buffer, self._used = self._device.host_buffer(2 * (len(self._buffer) + nbytes)), 0
        self._used += nbytes
        return self._buffer[self._used - nbytes : self._used]


class Downloads:
    """Copies to the host on the compute stream: whoever waits for one waits for what was issued before it, and for nothing that was
    issued later. On device cpu there is nothing to copy.

    Args:
        device: the compute device.
    """

    def __init__(self, device: Device):
        self._device, self._used = device, 0
        self._buffer = device.host_buffer(_FIRST_BYTES) if device.is_cuda else torch.empty(0, dtype=torch.uint8)

    def begin(self) -> None:
        """A sweep begins; what the last one brought has been read."""
        self._used = 0

    def bring(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to bring a tensor; what is returned waits until it has come, and gives it. It is to be read before the next sweep."""
        if not self._device.is_cuda:
            return lambda: tensor
        nbytes = -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        if self._used + nbytes > len(self._buffer):  # those who wait for parts of the old one hold it
            self._buffer, self._used = self._device.host_buffer(2 * (len(self._buffer) + nbytes)), 0
        pinned = _as(self._buffer[self._used : self._used + nbytes], tensor)
        self._used += nbytes
        pinned.copy_(tensor, non_blocking=True)
        copied = self._device.record()

        def arrived() -> torch.Tensor:
            copied.synchronize()
            return pinned

        return arrived


def _as(raw: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bytes as a tensor of another one's dtype and shape."""
    return raw[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)
