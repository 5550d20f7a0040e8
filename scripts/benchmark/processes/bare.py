"""The peer without an engine: reader threads fill a ring with O_DIRECT, GEMMs of the experts' shapes follow them.

What it reaches of max(D, C) is what the machine lets anyone reach; the engine should cost almost nothing on top.
"""

from __future__ import annotations

import os
import queue
import threading
import time

import torch
from torch.nn.functional import linear, silu

from policies.common.memory_units import align_up
from scripts.benchmark.probes import DirectReader, huge_buffer
from scripts.benchmark.worker import serve

PIECE_BYTES = 4 << 20
SLOTS = 6


class Ring:
    """Slots of one expert each, filled in order by reader threads as they become free."""

    def __init__(self, reader: DirectReader, read_bytes: int, slot_bytes: int, threads: int):
        self._reader = reader
        self._size = align_up(read_bytes)
        self._pieces: queue.SimpleQueue = queue.SimpleQueue()
        self.slots = [
            torch.frombuffer(huge_buffer(align_up(max(read_bytes, slot_bytes))), dtype=torch.uint8)
            for _ in range(SLOTS)
        ]
        self._left = [0] * SLOTS
        self._full = [threading.Event() for _ in range(SLOTS)]
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def fetch(self, number: int) -> None:
        """Start reading the `number`th expert-sized extent of the files into its slot."""
        slot, starts = number % SLOTS, range(0, self._size, PIECE_BYTES)
        self._full[slot].clear()
        self._left[slot] = len(starts)
        for start in starts:
            self._pieces.put((slot, start, number * self._size))

    def wait(self, number: int) -> torch.Tensor:
        """The slot's bytes, once they are all there."""
        self._full[number % SLOTS].wait()
        return self.slots[number % SLOTS]

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            slot, start, offset = piece
            view = memoryview(self.slots[slot].numpy())[start : start + PIECE_BYTES]
            done = 0
            while done < len(view):
                done += self._reader.read_into(view[done:], offset + start + done)
            with self._lock:
                self._left[slot] -= 1
                if self._left[slot] == 0:
                    self._full[slot].set()


def run(
    paths: list[str],
    *,
    hidden: int,
    ffn: int,
    expert_bytes: int,
    units: int,
    sweeps: int,
    threads: int,
    compute_s: float,
    calibrate_s: float,
) -> dict:
    """Read and compute `units` experts per sweep, with as many tokens per expert as make all GEMMs take `compute_s`.

    After each sweep the same GEMMs run on the slots as they are, so that both were measured on the same machine.

    Args:
        expert_bytes: to read for one expert; fewer than its 16-bit weights where it is stored packed.
        threads: that read at once.
        calibrate_s: time to spend on each guess of the tokens.

    Returns:
        dict: `wall_s` of the loop, `compute_s` of the same GEMMs on slots that are already filled, `tokens` per
        expert, `disk_bytes` read in the loop.
    """
    torch.set_num_threads(os.cpu_count())
    reader = DirectReader(paths)
    ring = Ring(reader, expert_bytes, 6 * hidden * ffn, threads)
    for number in range(SLOTS):
        ring.fetch(number)
    for number in range(SLOTS):
        ring.wait(number)
    total, tokens = units * sweeps, 64
    for _ in range(3):  # the rate depends on the tokens: approach them from both
        each_s = _resident_s(ring, tokens, hidden, ffn, SLOTS, calibrate_s)
        tokens = max(1, round(tokens * compute_s / total / each_s))
    wall_s = resident_s = 0.0
    for sweep in range(sweeps):
        wall_s += _sweep_s(ring, tokens, hidden, ffn, range(sweep * units, (sweep + 1) * units))
        resident_s += units * _resident_s(ring, tokens, hidden, ffn, units)
    ring.close()
    reader.close()
    return {"wall_s": wall_s, "compute_s": resident_s, "tokens": tokens, "disk_bytes": total * expert_bytes}


def _sweep_s(ring: Ring, tokens: int, hidden: int, ffn: int, numbers: range) -> float:
    x_TD = torch.randn(tokens, hidden).to(torch.bfloat16)
    begin = time.perf_counter()
    for number in numbers[:SLOTS]:
        ring.fetch(number)
    for number in numbers:
        _expert(x_TD, ring.wait(number), hidden, ffn)
        if number + SLOTS in numbers:
            ring.fetch(number + SLOTS)
    return time.perf_counter() - begin


def _resident_s(ring: Ring, tokens: int, hidden: int, ffn: int, calls: int, seconds: float = 0.0) -> float:
    """Seconds per expert when nothing has to be read: of so many calls, or of more that take so long."""
    x_TD = torch.randn(tokens, hidden).to(torch.bfloat16)
    _expert(x_TD, ring.slots[0], hidden, ffn)
    begin, done = time.perf_counter(), 0
    while done < calls or time.perf_counter() - begin < seconds:
        _expert(x_TD, ring.slots[done % SLOTS], hidden, ffn)
        done += 1
    return (time.perf_counter() - begin) / done


@torch.inference_mode()
def _expert(x_TD: torch.Tensor, weights: torch.Tensor, hidden: int, ffn: int) -> torch.Tensor:
    w1_FD, w3_FD, w2_DF = weights[: 6 * hidden * ffn].view(torch.bfloat16).view(3, -1)
    gate_TF = linear(x_TD, w1_FD.view(ffn, hidden))
    up_TF = linear(x_TD, w3_FD.view(ffn, hidden))
    return linear(silu(gate_TF) * up_TF, w2_DF.view(hidden, ffn))


if __name__ == "__main__":
    serve({"run": run})
