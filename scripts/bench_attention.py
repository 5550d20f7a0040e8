"""Native paged attention beside its limits: memory for decode, matrix products for prefill; torch SDPA is the peer.

Decode moves every row's keys and values once, so its limit is the rate at which torch.sum reads as many bytes on as many threads, in
turn with it; 70 % of it is the aim where heads share KV heads 4:1 to 8:1. Prefill counts the products that the causal mask leaves;
its limit is torch's faster product, in fp32 or in the dtype. Outputs of the two are compared before anything is printed. With --kv int8 the
pages are compressed, and torch attends to what they stand for, unpacked ahead; "of 16 bits" is the native call's speed beside
the same call over plain pages, measured in turn with it.

    python -m scripts.bench_attention [--dtype bf16] [--kv int8] [--threads N ...] [--rounds 20] [--out FILE]
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cost_model.model.kv_bytes import kv_head_bytes  # noqa: E402
from flexmoe.formats.packed_kv import pack, unpack  # noqa: E402
from flexmoe.kernels.native import library as native  # noqa: E402
from flexmoe.kernels.native.attention import paged_attention  # noqa: E402
from flexmoe.system.machine import cpu_name, instruction_set  # noqa: E402
from scripts.benchmark.probes import machine, versions  # noqa: E402
from scripts.benchmark.record import Figure, Record  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
PAGE_TOKENS = 16
READ_TARGET = 0.7  # of the read rate, where heads share KV heads
PACKED_TARGET = 1.7  # times the speed over plain pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    name: str
    rows: int
    context: int  # tokens per row
    queries: int  # new tokens per row, the last of the context
    heads: int
    kv_heads: int
    size: int

    def kv_bytes(self, dtype: torch.dtype, compressed: bool) -> int:
        head = kv_head_bytes(self.size, dtype.itemsize, compressed=compressed)
        return 2 * self.rows * self.context * self.kv_heads * head

    @property
    def flops(self) -> int:
        past = self.context - self.queries
        pairs = self.queries * past + self.queries * (self.queries + 1) // 2
        return 4 * self.rows * self.heads * self.size * pairs


SHAPES = [
    Shape(name="decode", rows=256, context=320, queries=1, heads=16, kv_heads=4, size=64),
    Shape(name="decode, Mixtral heads", rows=64, context=640, queries=1, heads=32, kv_heads=8, size=128),
    Shape(name="decode, 8 to 1", rows=128, context=640, queries=1, heads=32, kv_heads=4, size=128),
    Shape(name="prefill 128", rows=4, context=128, queries=128, heads=16, kv_heads=4, size=64),
    Shape(name="prefill 512", rows=1, context=512, queries=512, heads=16, kv_heads=4, size=64),
    Shape(name="prefill 2048", rows=1, context=2048, queries=2048, heads=16, kv_heads=4, size=64),
    Shape(name="prefill 512, Mixtral heads", rows=1, context=512, queries=512, heads=32, kv_heads=8, size=128),
]


def best_s(run: Callable[[], object], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def gemm_flops_per_s(dtype: torch.dtype, rounds: int) -> float:
    """The faster of torch's products in fp32 and in the dtype."""
    seconds = []
    for each in {torch.float32, dtype}:
        a, b = torch.randn(1536, 1536).to(each), torch.randn(1536, 1536).to(each)
        seconds.append(best_s(lambda a=a, b=b: a @ b, rounds))
    return 2 * 1536**3 / min(seconds)


def make_inputs(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return q, pool [N, 2, tokens, G, D], page tables (permuted), q starts, context lengths."""
    per_row = -(-shape.context // PAGE_TOKENS)
    pool = torch.randn(shape.rows * per_row, 2, PAGE_TOKENS, shape.kv_heads, shape.size).to(dtype)
    tables = torch.randperm(len(pool)).int().view(shape.rows, per_row)
    starts = torch.arange(shape.rows + 1, dtype=torch.int32) * shape.queries
    q = torch.randn(shape.rows * shape.queries, shape.heads, shape.size).to(dtype)
    return q, pool, tables, starts, torch.full((shape.rows,), shape.context, dtype=torch.int32)


def torch_attention(shape: Shape, q: torch.Tensor, pool: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """The peer: gather the pages of all (here equally long) rows, then SDPA."""
    k, v = (
        pool[:, i][tables.long()].view(shape.rows, -1, shape.kv_heads, shape.size)[:, : shape.context].transpose(1, 2)
        for i in (0, 1)
    )
    q = q.view(shape.rows, shape.queries, shape.heads, shape.size).transpose(1, 2)
    causal = shape.queries > 1
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).reshape(-1, shape.heads, shape.size)


@dataclass(frozen=True, slots=True)
class Times:
    """Best seconds of the native call, of the same over plain pages, of torch, and of torch.sum over as many bytes."""

    native: float
    plain: float
    torch: float
    read: float


def measure(shape: Shape, dtype_name: str, compressed: bool, threads: int, rounds: int) -> Times:
    """Times of a shape, all but torch's in turn; raises when outputs differ."""
    q, pool, tables, starts, lengths = make_inputs(shape, DTYPES[dtype_name])
    out, pages = torch.empty_like(q), pool
    if compressed:
        pages = pack(pool)
        unpack(pages, pool)
    values = torch.ones(shape.kv_bytes(DTYPES[dtype_name], compressed) // 4)

    def run_over(pages: torch.Tensor) -> torch.Tensor:
        return paged_attention(
            q, pages[:, 0], pages[:, 1], tables, starts, lengths, out=out, scale=shape.size**-0.5, num_threads=threads
        )

    def run_torch() -> torch.Tensor:
        return torch_attention(shape, q, pool, tables)

    difference = (run_over(pages).float() - run_torch().float()).abs().max().item()
    if not difference < TOLERANCE[dtype_name]:
        raise SystemExit(f"{shape.name}: native and torch outputs differ by {difference:.3g}")
    runs = (lambda: run_over(pages)), (lambda: run_over(pool)), values.sum
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        best = [min(before, best_s(run, 1)) for before, run in zip(best, runs)]
    native_s, plain_s, read_s = best
    return Times(native_s, plain_s, best_s(run_torch, max(2, rounds // 4)), read_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--kv", choices=("plain", "int8"), default="plain", help="how keys and values are stored")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], metavar="N")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON record; a table is written beside it")
    options = parser.parse_args()
    if not native.available():
        raise SystemExit("native attention is not available on this machine; see the warning above")
    print(f"{options.dtype}, {options.kv} KV, best of {options.rounds}, outputs equal to torch's within rounding")
    print(f"{cpu_name()}, {instruction_set()}")
    for threads in options.threads:
        begin = time.perf_counter()
        figures, raw = report(threads, options)
        if options.out:
            about = {"machine": machine(), "versions": versions(), "model": f"{instruction_set()}, {threads} threads"}
            about["command"] = shlex.join(["python", "-m", "scripts.bench_attention", *sys.argv[1:]])
            name = f"attention in {options.dtype}, {options.kv} KV, {threads} threads"
            Record(options.out, about).add(name, figures, raw, time.perf_counter() - begin)


def beside_plain(shape: Shape, times: Times) -> Figure:
    """Decode over compressed pages beside the same call over plain ones, which have twice the bytes or nearly so."""
    return Figure(
        what=f"{shape.name}, beside plain pages",
        value=f"{times.native * 1e3:.2f} ms",
        beside=f"{times.plain * 1e3:.2f} ms over plain pages",
        ratio=times.plain / times.native,
        target=PACKED_TARGET,
    )


def report(threads: int, options: argparse.Namespace) -> tuple[list[Figure], dict]:
    """Measure and print all shapes on so many threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    gemm = gemm_flops_per_s(dtype, options.rounds)
    print(f"{threads} threads: torch's product {gemm / 1e9:.0f} GFLOP/s")
    print(
        f"{'shape':<28}{'native ms':>10}{'torch ms':>10}{'native':>14}{'torch':>14}{'limit':>14}{'of limit':>10}{'of 16 bits':>12}"
    )
    figures, raw = [], {"gemm_flops_per_s": gemm}
    for shape in SHAPES:
        compressed, decodes = options.kv == "int8", shape.queries == 1
        times = measure(shape, options.dtype, compressed, threads, options.rounds)
        raw[shape.name] = {name: getattr(times, name) for name in Times.__slots__}
        work = shape.kv_bytes(dtype, compressed) if decodes else shape.flops
        limit, unit = (work / times.read, "GB/s") if decodes else (gemm, "GFLOP/s")
        rates = [f"{rate / 1e9:.1f} {unit}" for rate in (work / times.native, work / times.torch, limit)]
        ratio = work / times.native / limit
        print(
            f"{shape.name:<28}{times.native * 1e3:>10.2f}{times.torch * 1e3:>10.2f}"
            f"{''.join(f'{rate:>14}' for rate in rates)}{ratio:>10.0%}{times.plain / times.native:>11.2f}x"
        )
        figures.append(
            Figure(
                what=shape.name,
                value=f"{times.native * 1e3:.2f} ms, {rates[0]}",
                beside=f"limit {rates[2]}; torch's attention {times.torch * 1e3:.2f} ms, {rates[1]}",
                ratio=ratio,
                target=READ_TARGET if decodes else None,
            )
        )
        if compressed and decodes:
            figures.append(beside_plain(shape, times))
    return figures, raw


if __name__ == "__main__":
    main()
