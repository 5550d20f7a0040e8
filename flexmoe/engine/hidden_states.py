"""Hidden states of each GPU batch between modules, at home in the tier that the policy gives the batch."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from flexmoe.system.deferred import Deferred
from flexmoe.system.device import Device, Event
from flexmoe.system.direct_io import DirectFile
from flexmoe.system.trace import Recorder
from policies.common.memory_units import align_up
from policies.schedule import is_moved_at_once


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskHome:
    """The disk tier of hidden states: a file with a place for each GPU batch, and a buffer for each direction.

    Attributes:
        batch_bytes: of a place, whole pages.
    """

    file: DirectFile
    batch_bytes: int
    write_buffer: torch.Tensor
    read_buffer: torch.Tensor

    @classmethod
    def create(cls, path: Path, device: Device, batch_bytes: int) -> DiskHome:
        """With a file that only its descriptor keeps: a killed run leaves nothing behind."""
        write_buffer, read_buffer = device.host_buffer(batch_bytes), device.host_buffer(batch_bytes)
        file = DirectFile(path, writable=True)
        os.unlink(path)
        return cls(file=file, batch_bytes=batch_bytes, write_buffer=write_buffer, read_buffer=read_buffer)


class Activations:
    """Keeps the residual stream ``[tokens, D]`` of every GPU batch in its tier.

    Args:
        device: compute device.
        recorder: gets the bytes and times of the transfers.
        tiers: home tier of each GPU batch.
        max_tokens: most tokens of a GPU batch.
        hidden: D.
        dtype: compute dtype.
        offload_dir: directory for the disk tier's file.

    Attributes:
        tiers: as given.
        disk: the disk tier; None where no batch is at home there.
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
        self._device, self._recorder, self.tiers = device, recorder, tiers
        self._on_device: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, int] = {}
        self._stores: dict[int, Future[None]] = {}  # by batch, until it is loaded
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="act")
        self._stream = device.stream()
        self._bytes = max_tokens * hidden * dtype.itemsize
        self._shape, self._dtype = (-1, hidden), dtype
        self._host = {j: device.host_buffer(self._bytes) for j, tier in enumerate(tiers) if tier == "cpu"}
        self.disk: DiskHome | None = None
        if "disk" in tiers:
            path = Path(offload_dir) / f"activations-{os.getpid()}-{id(self)}.bin"
            self.disk = DiskHome.create(path, device, align_up(self._bytes))

    def __getitem__(self, batch: int) -> torch.Tensor:
        """The hidden states of a batch that are on the device now; a load made them on a stream of its own."""
        return self._device.use_here(self._on_device[batch])

    def add(self, batch: int, y_TD: torch.Tensor) -> None:
        """Add to the hidden states of a batch that are on the device: a residual connection, in place."""
        self[batch].add_(y_TD)

    def put(self, batch: int, h_TD: torch.Tensor) -> None:
        """Replace the hidden states of a batch, on the device."""
        self._on_device[batch] = h_TD

    def forget(self, batch: int) -> None:
        """A batch's hidden states are not needed any more."""
        self._on_device.pop(batch)

    def clear(self) -> None:
        """Forget what is on the device: the sweep has failed."""
        self._on_device.clear()

    def store(self, batch: int) -> Future[None]:
        """Send a batch's hidden states home and forget them on the device. What goes wrong, the next load raises too."""
        args = batch, self._on_device.pop(batch), self._device.record()
        at_once = self._at_once(batch)
        future = Deferred(self._store, *args).do() if at_once else self._lane.submit(self._store, *args)
        self._stores[batch] = future
        return future

    def load(self, batch: int) -> Future[Event]:
        """Bring a batch's hidden states to the device. The future gives the event to wait for.

        Raises (the future):
            StorageError: they could not be stored, or not be read.
        """
        args = batch, self._stores.pop(batch)
        at_once = self._at_once(batch)
        return Deferred(self._load, *args).do() if at_once else self._lane.submit(self._load, *args)

    def close(self) -> None:
        """End the lane."""
        self._lane.shutdown(wait=True)
        if self.disk is not None:
            self.disk.file.close()

    def _at_once(self, batch: int) -> bool:
        """Whether the thread that computes moves them."""
        return is_moved_at_once(self._device.kind, self.tiers[batch])

    def _store(self, batch: int, h_TD: torch.Tensor, produced: Event) -> None:
        nbytes = h_TD.numel() * h_TD.element_size()
        disk = self.disk if self.tiers[batch] == "disk" else None
        buffer = self._host[batch] if disk is None else disk.write_buffer
        self._tokens[batch] = len(h_TD)
        with self._recorder.span("d2h/act", f"act {batch}", nbytes), self._device.on(self._stream):
            produced.wait(self._stream)
            buffer[:nbytes].view(self._dtype).view(self._shape).copy_(h_TD, non_blocking=True)
            self._device.record(self._stream).synchronize()  # on this lane's own thread
        if disk is not None:
            with self._recorder.span("disk_write/act", f"act {batch}", nbytes):
                disk.file.write_from(buffer.numpy().data[: align_up(nbytes)], batch * disk.batch_bytes)

    def _load(self, batch: int, stored: Future[None]) -> Event:
        stored.result()  # it is done, as this lane works in order; if it failed, its home has what was there before
        row_bytes = self._shape[1] * self._dtype.itemsize
        nbytes = self._tokens[batch] * row_bytes
        disk = self.disk if self.tiers[batch] == "disk" else None
        buffer = self._host[batch] if disk is None else disk.read_buffer
        if disk is not None:
            with self._recorder.span("disk_read/act", f"act {batch}", nbytes):
                disk.file.read_into(buffer.numpy().data[: align_up(nbytes)], batch * disk.batch_bytes, nbytes)
        with self._recorder.span("h2d/act", f"act {batch}", nbytes), self._device.on(self._stream):
            host = buffer[:nbytes].view(self._dtype).view(self._shape)
            h_TD = host.to(self._device.torch, non_blocking=True, copy=True)
            event = self._device.record(self._stream)
            self._device.link.small(event)
            event.synchronize()  # the buffer may be filled again; on this lane's own thread
        self._on_device[batch] = h_TD
        return event
