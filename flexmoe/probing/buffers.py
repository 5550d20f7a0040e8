"""Buffers that look like the runtime's: noise in every page, weights cut from slots."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from flexmoe.checkpoint.unit_layout import pack, views
from flexmoe.system.device import Device


def fill_with_noise(flat: torch.Tensor, chunk: int = 1 << 24) -> None:
    """Numbers of a normal distribution, repeated: no page is the kernel's shared zero page."""
    pattern = torch.randn(min(chunk, flat.numel()), generator=torch.Generator().manual_seed(0)).to(flat)
    for start in range(0, flat.numel(), len(pattern)):
        piece = flat[start : start + len(pattern)]
        piece.copy_(pattern[: len(piece)])


def noise(device: Device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of noise on the compute device."""
    tensor = torch.empty(shape, dtype=dtype, device=device.torch)
    fill_with_noise(tensor.view(-1), 1 << 20)
    return tensor


class WeightArena:
    """Compute slots full of random weights, in memory like that of the runtime's slots.

    Args:
        device: the compute device.
        dtype: of the weights.
        nbytes: size.
        scale: standard deviation.
    """

    def __init__(self, device: Device, dtype: torch.dtype, nbytes: int, scale: float = 0.02):
        self._dtype = dtype
        self.nbytes = nbytes // 256 * 256
        if device.is_cuda:
            self._bytes = torch.empty(self.nbytes, dtype=torch.uint8, device=device.torch)
        else:
            self._bytes = device.host_buffer(self.nbytes, pinned=False)
        numbers = self._bytes.view(dtype)
        fill_with_noise(numbers, 1 << 22)
        numbers.mul_(scale)

    def sets(self, parts, cycle_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """The weights of one unit after another, for ever, from the first ``cycle_bytes``; at least one fits.

        Args:
            parts: the unit's `flexmoe.checkpoint.unit_layout.Part`s.
        """
        places, size = pack({part.role: (self._dtype, part.of or part.shape) for part in parts})
        count = max(1, min(self.nbytes, cycle_bytes) // size)
        return itertools.cycle([views(self._bytes[i * size : (i + 1) * size], places) for i in range(count)])
