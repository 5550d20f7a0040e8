"""Own products of 16-bit and of packed weights beside torch's, by tokens of an expert: where `flexmoe.kernels.linear` changes over.

    python -m scripts.packed.own_products                           # about two minutes
    python -m scripts.packed.own_products --out benchmarks/own-products.json

Both are measured in turns, with weights from more than a cache holds, and their outputs are compared before. A ratio is that of
the medians, torch's time over ours; torch's products of packed weights unpack them in native code before. The limit beside a
product of few tokens is the rate at which torch.sum reads memory.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from flexmoe.formats.packed_matrix import PackedMatrix
from flexmoe.kernels.linear import padded_tokens, unpacked_pieces
from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.products import grouped_products
from flexmoe.kernels.native.unpacking import packed_products
from flexmoe.system.machine import instruction_set
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record
from scripts.packed.products import noise, read_rate, repeated, ring

#: [R, C] of a weight: of a small expert and of a large one.
SHAPES = ((3584, 1024), (7168, 2048))
TOKENS = (2, 4, 8, 16, 32, 48, 64, 96, 128, 256, 512, 1024)
FORMATS = ("int4", "int8", "mxfp4")
_RING_BYTES = 160 << 20
_TOLERANCE = 2e-2  # of the largest output


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    args = _parser().parse_args(argv)
    if not native.available():
        raise SystemExit("native code is not available on this machine; see the warning above")
    begin = time.perf_counter()
    figures, raw = measure(args.seconds, args.tokens)
    if args.out:
        about = {
            "machine": machine(),
            "versions": versions(),
            "model": f"{torch.get_num_threads()} threads, {instruction_set()}, drawn weights",
            "command": shlex.join(["python", "-m", "scripts.packed.own_products", *argv]),
        }
        Record(args.out, about).add("own products", figures, raw, time.perf_counter() - begin)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.packed.own_products", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="seconds of each measurement (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N", help="tokens of an expert")
    parser.add_argument("--out", type=Path, help="JSON record; a table is written beside it")
    return parser


@torch.inference_mode()
def measure(seconds: float, all_tokens: list[int]) -> tuple[list[Figure], dict]:
    """All figures, and seconds of every repetition."""
    read = read_rate(seconds)
    raw: dict = {"read_bytes_per_s": read}
    figures = []
    for rows, columns in SHAPES:
        plain = [noise(rows, columns) for _ in range(max(2, _RING_BYTES // (2 * rows * columns)))]
        rings: dict[str, list] = {"bf16": plain, **{name: ring(name, rows, columns) for name in FORMATS}}
        for tokens in all_tokens:
            x = noise(tokens, columns)
            for name, weights in rings.items():
                times = repeated(_runs(x, weights), seconds)
                raw[f"{name} [{rows}, {columns}], {tokens} tokens"] = times
                figures.append(_figure(name, (tokens, rows, columns), times, read))
                print(" | ".join(figures[-1].cells()[:4]), flush=True)
    return figures, raw


def _runs(x: torch.Tensor, weights: list) -> dict[str, Callable[[], object]]:
    """Ours and torch's, each with the next weight every time; their outputs are compared first."""
    end = torch.tensor([len(x)], dtype=torch.int32)

    def ours(weight: torch.Tensor | PackedMatrix) -> torch.Tensor:
        product = packed_products if isinstance(weight, PackedMatrix) else grouped_products
        return product(x, [weight], end)

    def of_torch(weight: torch.Tensor | PackedMatrix) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 0, padded_tokens(len(x)) - len(x)))
        if isinstance(weight, torch.Tensor):
            return F.linear(padded, weight)[: len(x)]
        out = x.new_empty(len(x), weight.shape[0])
        for rows, piece in unpacked_pieces(weight, x.dtype):
            out[:, rows] = F.linear(padded, piece)[: len(x)]
        return out

    found, wanted = ours(weights[0]).float(), of_torch(weights[0]).float()
    if not (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
        raise SystemExit(f"outputs of {len(x)} tokens differ")
    each = itertools.cycle(weights)
    return {"own": lambda: ours(next(each)), "torch": lambda: of_torch(next(each))}


def _figure(name: str, sizes: tuple[int, int, int], times: dict[str, list[float]], read: float) -> Figure:
    tokens, rows, columns = sizes
    own, peer = (statistics.median(times[which]) for which in ("own", "torch"))
    flops, read_s = 2 * tokens * rows * columns, 2 * rows * columns / read
    return Figure(
        what=f"{name} [{rows}, {columns}], {tokens} tokens",
        value=f"{own * 1e3:.3g} ms, {flops / own / 1e9:.0f} GFLOP/s",
        beside=f"torch {peer * 1e3:.3g} ms; 16 bits are read in {read_s * 1e3:.3g} ms",
        ratio=peer / own,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
