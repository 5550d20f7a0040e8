"""Hidden states of each GPU batch between modules, at home in the tier that the policy gives the batch."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from flexmoe.system.device import Device
from flexmoe.system.direct_io import DirectFile
from flexmoe.system.trace import Recorder
from policies.common.memory_units import align_up


class Activations:
    """Keeps the residual stream ``[tokens, D]`` of every GPU batch in its tier.

    Args:
        device, recorder: as everywhere.
        tiers: home tier of each GPU batch.
        max_tokens: most tokens of a GPU batch.
        hidden: D.
        dtype: compute dtype.
        offload_dir: directory for the disk tier's file.
    """

    def __init__(
        self,
        device: Device,
        recorder: Recorder,
        tiers: tuple[str, ...],
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype,
        offload_dir: Path,
    ):
        self._device, self._recorder, self._tiers = device, recorder, tiers
        self._on_device: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, int] = {}
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="act")
        self._stream = device.stream()
        self._bytes = max_tokens * hidden * dtype.itemsize
        self._shape, self._dtype = (-1, hidden), dtype
        self._host = {j: device.host_buffer(self._bytes) for j, tier in enumerate(tiers) if tier == "cpu"}
        self._file: DirectFile | None = None
        if "disk" in tiers:
            self._buffers = device.host_buffer(align_up(self._bytes)), device.host_buffer(align_up(self._bytes))
            path = Path(offload_dir) / f"activations-{os.getpid()}-{id(self)}.bin"
            self._file = DirectFile(path, writable=True)
            os.unlink(path)  # the descriptor keeps it; a killed run leaves nothing behind

    def __getitem__(self, batch: int) -> torch.Tensor:
        """The hidden states of a batch that are on the device now; a load made them on a stream of its own."""
        return self._device.use_here(self._on_device[batch])

    def add(self, batch: int, y_TD: torch.Tensor) -> None:
        """Add to the hidden states of a batch that are on the device: a residual connection, in place."""
        self[batch].add_(y_TD)

    def put(self, batch: int, h_TD: torch.Tensor) -> None:
        """Replace the hidden states of a batch, on the device."""
        self._on_device[batch] = h_TD

    def clear(self) -> None:
        """Forget what is on the device: the sweep is over."""
        self._on_device.clear()

    def store(self, batch: int) -> Future:
        """Send a batch's hidden states home and forget them on the device."""
        return self._lane.submit(self._store, batch, self._on_device.pop(batch), self._device.record())

    def load(self, batch: int) -> Future:
        """Bring a batch's hidden states to the device. The future gives the event to wait for."""
        return self._lane.submit(self._load, batch)

    def close(self) -> None:
        """End the lane."""
        self._lane.shutdown(wait=True)
        if self._file is not None:
            self._file.close()

    def _store(self, batch: int, h_TD: torch.Tensor, produced) -> None:
        nbytes = h_TD.numel() * h_TD.element_size()
        buffer = self._host[batch] if self._tiers[batch] == "cpu" else self._buffers[0]
        self._tokens[batch] = len(h_TD)
        with self._recorder.span("d2h/act", f"act {batch}", nbytes):
            with self._device.on(self._stream):
                produced.wait()
                buffer[:nbytes].view(self._dtype).view(self._shape).copy_(h_TD, non_blocking=True)
                self._device.record().synchronize()  # on this lane's own thread
        if self._tiers[batch] == "disk":
            size = align_up(nbytes)
            with self._recorder.span("disk_write/act", f"act {batch}", nbytes):
                self._file.write_from(memoryview(buffer.numpy())[:size], batch * align_up(self._bytes))

    def _load(self, batch: int):
        row_bytes = self._shape[1] * self._dtype.itemsize
        nbytes = self._tokens[batch] * row_bytes
        if self._tiers[batch] == "disk":
            buffer = self._buffers[1]
            with self._recorder.span("disk_read/act", f"act {batch}", nbytes):
                self._file.read_into(
                    memoryview(buffer.numpy())[: align_up(nbytes)], batch * align_up(self._bytes), nbytes
                )
        else:
            buffer = self._host[batch]
        with self._recorder.span("h2d/act", f"act {batch}", nbytes), self._device.on(self._stream):
            host = buffer[:nbytes].view(self._dtype).view(self._shape)
            h_TD = host.to(self._device.torch, non_blocking=True, copy=True)
            event = self._device.record()
            event.synchronize()  # the buffer may be filled again; on this lane's own thread
        self._on_device[batch] = h_TD
        return event
