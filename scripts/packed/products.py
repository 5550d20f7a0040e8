"""Packed weights on the CPU: the rate of unpacking beside that of reading memory, and products beside those of bf16 weights.

    python -m scripts.packed.products                                   # about a minute
    python -m scripts.packed.products --out benchmarks/packed-products.json

Weights are taken in turn from more than a cache holds, as a sweep takes them. Packed and plain are measured in turns, and
a ratio is that of the medians. Before anything is measured, values are compared with those of the codecs in torch.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.packed_matrix import CODECS, PackedMatrix
from flexmoe.kernels.linear import linear, unpacked_pieces
from flexmoe.kernels.native import library as native
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table

#: [R, C] of a weight: of a small expert and of a large one.
SHAPES = ((3584, 1024), (14336, 4096))
TOKENS = (1, 4, 16, 64, 256)
#: Of bf16's speed, and from how many tokens on.
TARGET, TARGET_TOKENS = 0.9, 64
FORMATS = {
    "int4": PackedFormat(method="compressed-tensors", codec="integer", bits=4, columns=128),
    "int4, zero points": PackedFormat(method="compressed-tensors", codec="integer", bits=4, columns=128, zeros=True),
    "int8": PackedFormat(method="compressed-tensors", codec="integer", bits=8, columns=128),
    "fp8": PackedFormat(method="fp8", codec="fp8", bits=8, rows=128, columns=128, scale_bytes=4),
    "mxfp4": PackedFormat(method="mxfp4", codec="mxfp4", bits=4, columns=32, scale_bytes=1),
    "gptq": PackedFormat(method="gptq", codec="gptq", bits=4, columns=128, zeros=True, zero_shift=1),
    "awq": PackedFormat(method="awq", codec="awq", bits=4, columns=128, zeros=True),
}
#: Scales of fp8 blocks are float32, of GPTQ and AWQ float16.
SCALES = {"fp8": torch.float32, "gptq": torch.float16, "awq": torch.float16}
_RING_BYTES = 160 << 20


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code is 1 where a target is missed."""
    args = _parser().parse_args(argv)
    if not native.available():
        raise SystemExit("native code is not available on this machine; see the warning above")
    begin = time.perf_counter()
    figures, raw = measure(args.seconds)
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {
            "machine": machine(),
            "versions": versions(),
            "model": f"{torch.get_num_threads()} threads, drawn weights",
        }
        about["command"] = shlex.join(["python", "-m", "scripts.packed.products", *argv])
        Record(args.out, about).add("packed products", figures, raw, time.perf_counter() - begin)
    return 1 if any(figure.met is False for figure in figures) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.packed.products", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=0.25, help="seconds of each measurement (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON record; a table is written beside it")
    return parser


@torch.inference_mode()
def measure(seconds: float) -> tuple[list[Figure], dict]:
    """All figures, and seconds of every repetition."""
    raw: dict = {"read_bytes_per_s": read_rate(seconds)}
    figures = []
    for rows, columns in SHAPES:
        plain = [noise(rows, columns) for _ in range(max(1, _RING_BYTES // (2 * rows * columns)))]
        rings = {name: ring(name, rows, columns) for name in FORMATS}
        for name, matrices in rings.items():
            times = repeated({"unpack": in_turn(matrices, _unpack)}, seconds)
            raw[f"unpack {name} [{rows}, {columns}]"] = times
            figures.append(_unpacking(name, matrices[0], times["unpack"], raw["read_bytes_per_s"]))
        for tokens in TOKENS:
            x = noise(tokens, columns)
            runs: dict[str, Callable[[], object]] = {"bf16": in_turn(plain, partial(linear, x))}
            runs |= {name: in_turn(matrices, partial(linear, x)) for name, matrices in rings.items()}
            times = repeated(runs, seconds * len(runs))
            raw[f"products [{rows}, {columns}], {tokens} tokens"] = times
            figures += _products(rows, columns, tokens, times)
    return figures, raw


def noise(*shape: int) -> torch.Tensor:
    """Weights or tokens in bf16."""
    return torch.randn(*shape).to(torch.bfloat16)


def ring(name: str, rows: int, columns: int) -> list[PackedMatrix]:
    """Matrices of a format that are as many bytes as a cache does not hold; the first is compared with torch's values."""
    packed = FORMATS[name]
    count = max(1, _RING_BYTES // packed.matrix_bytes(rows, columns) // 2)
    matrices = [drawn(packed, rows, columns, SCALES.get(name, torch.bfloat16)) for _ in range(count)]
    wanted = matrices[0].unpack(torch.empty(rows, columns, dtype=torch.bfloat16))
    found = torch.cat([piece.clone() for _, piece in unpacked_pieces(matrices[0], torch.bfloat16)])
    if not torch.equal(found.view(torch.int16), wanted.view(torch.int16)):
        raise SystemExit(f"{name}: values differ from those of the codec")
    return matrices


def drawn(packed: PackedFormat, rows: int, columns: int, scale: torch.dtype, device: str = "cpu") -> PackedMatrix:
    """A matrix of drawn numbers and scales."""
    fields = {}
    for field in CODECS[packed.codec].fields(packed, rows, columns):
        dtype = scale if scale in field.dtypes else field.dtypes[0]
        if dtype in (torch.bfloat16, torch.float16, torch.float32):
            fields[field.name] = torch.rand(field.shape).to(dtype)
        else:  # any bits but those of NaN in e4m3, and exponents near 2^0
            low, high = (120, 130) if field.name == "scale" else (0, 127)
            bits = torch.randint(low, high, (*field.shape, dtype.itemsize), dtype=torch.uint8)
            fields[field.name] = bits.view(dtype).view(field.shape)
    return PackedMatrix(packed, {name: field.to(device) for name, field in fields.items()}, (rows, columns))


def read_rate(seconds: float) -> float:
    """Bytes/s at which torch.sum reads memory, the best of some seconds."""
    values = torch.ones(64 << 20)
    times = repeated({"sum": values.sum}, seconds * 4)["sum"]
    return values.nbytes / min(times)


def in_turn(values: list, run: Callable) -> Callable[[], object]:
    """Each call takes the next."""
    each = itertools.cycle(values)
    return lambda: run(next(each))


def _unpack(matrix: PackedMatrix) -> None:
    for _ in unpacked_pieces(matrix, torch.bfloat16):
        pass


def repeated(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, in turns, five at least; the first ones are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while min(map(len, times.values())) < 5 or time.perf_counter() < end:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def _unpacking(name: str, matrix: PackedMatrix, times: list[float], read: float) -> Figure:
    rows, columns = matrix.shape
    stored, each_s = matrix.packed.matrix_bytes(rows, columns), statistics.median(times)
    written = 2 * rows * columns
    return Figure(
        what=f"unpack {name} [{rows}, {columns}] to bf16",
        value=f"{stored / each_s / 1e9:.1f} GB/s packed, {written / each_s / 1e9:.1f} GB/s written",
        beside=f"torch.sum reads {read / 1e9:.1f} GB/s",
        ratio=(stored + written) / each_s / read,
    )


def _products(rows: int, columns: int, tokens: int, times: dict[str, list[float]]) -> list[Figure]:
    medians = {name: statistics.median(each) for name, each in times.items()}
    plain_s = medians.pop("bf16")
    return [
        Figure(
            what=f"{name}, [{rows}, {columns}], {tokens} tokens",
            value=f"{each_s * 1e3:.3g} ms",
            beside=f"bf16: {plain_s * 1e3:.3g} ms, {2 * tokens * rows * columns / plain_s / 1e9:.0f} GFLOP/s",
            ratio=plain_s / each_s,
            target=TARGET if tokens >= TARGET_TOKENS else None,
        )
        for name, each_s in medians.items()
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
