"""The host's work in a sweep, beside the GPU's: kernels launched in a layer, and time spent on the rows. Needs no GPU.

    python -m scripts.gpu.host_work --label after

A model with Mixtral's experts and heads, tiny in width, decodes so many rows of all ages with prompts of 64 to 960 tokens,
beside the prompts of those that enter, on the CPU. Time is that of the engine's thread on a core, without passes of Python's
garbage collector. Every operation of torch that the thread of the engine issues is counted as a launch, other than views
and allocations: on CUDA each of them is a kernel or a copy. Experts are computed one by one, as on a GPU without grouped
products; attention is counted with the kernel that a GPU would choose, which here computes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.kernels.native import library as native
from flexmoe.models.loader import load_model
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.sampling.sampler import Sampling
from policies.policy import Policy
from policies.workload import Workload
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.gpu.context import reduced_model

ROWS = (600, 3900)
BATCH_ROWS = 390
WORKLOAD = Workload(prompt_len=512, gen_len=256)
SHORTEST, LONGEST = 64, 960
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "dtype": "float32",
}
#: Where KV lives: attended by the GPU where it lives, or on the CPU.
PLACES = {"gpu": (100, 0, 100, 0, 100, 0), "cpu": (100, 0, 0, 100, 100, 0)}
COUNTED_LAYER, WARM, SWEEPS = 1, 2, 3
_NO_KERNEL = ("empty", "detach", "_unsafe_view", "lift_fresh", "is_pinned", "_local_scalar_dense", "record_stream")


class Launches(TorchDispatchMode):
    """Operations of this thread that a GPU would launch something for, by the layer that `layer` says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.by_layer, self.names = -1, Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        returns = operation._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = operation.overloadpacket.__name__
        if not is_view and not name.startswith(_NO_KERNEL):
            self.by_layer[self.layer] += 1
            if self.layer == COUNTED_LAYER:
                self.names[name] += 1
        return operation(*args, **(kwargs or {}))


class Clock:
    """Core-seconds of this thread in functions that are replaced by timed ones."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, name: str, function):
        """The function, timed under a name."""

        def call(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.thread_time() - start

        return call

    def timed_items(self, name: str, function):
        """The same of a function that gives an iterator: what is done between two items is its caller's."""

        def call(*args, **kwargs):
            items = function(*args, **kwargs)
            following = self.timed(name, lambda: next(items, None))
            return iter(following, None)

        return call


def measure(workdir: Path, rows: int, place: str) -> dict:
    """Launches of a layer, and milliseconds a sweep that the engine's thread spends on the rows."""
    policy = Policy.from_percent(
        PLACES[place],
        gpu_batch_size=min(BATCH_ROWS, rows // 2),
        num_gpu_batches=-(-rows // min(BATCH_ROWS, rows // 2)),
        prompt_len=WORKLOAD.prompt_len,
        gen_len=WORKLOAD.gen_len,
        cpu_attention_percent=100,
    )
    config = EngineConfig(
        policy=policy,
        workload=WORKLOAD,
        kv_tokens=rows * (SHORTEST + LONGEST + WORKLOAD.gen_len) * 11 // 20,
        device="cpu",
        gen_len=WORKLOAD.gen_len,
        offload_dir=workdir / "offload",
    )
    with _kernels_of_a_gpu(place):
        engine = Engine(load_model(reduced_model(workdir / "host-work", SHAPE), "dummy"), config)
        try:
            _fill(engine, rows)
            for _ in range(WARM):
                _step(engine, rows)
            clock = _timed_sweeps(engine, rows)
            launches = _counted_sweep(engine, rows)
        finally:
            engine.clear()
            engine.close()
    begin, step, run, sample, book = (
        clock.seconds[name] / SWEEPS for name in ("begin", "step", "run", "sample", "book")
    )
    return {
        "rows": rows,
        "place": place,
        "gpu_batches": policy.num_gpu_batches,
        "launches_a_layer": launches.by_layer[COUNTED_LAYER],
        "operations": dict(launches.names.most_common()),
        "bookkeeping_ms": 1e3 * (step - run - sample + begin),
        "begin_ms": 1e3 * begin,
        "sample_ms": 1e3 * sample,
        "book_ms": 1e3 * book,
    }


def _kernels_of_a_gpu(place: str):
    """No native kernel of the CPU for what a GPU computes; flash attention, where the sources know it, costs nothing."""
    patches = contextlib.ExitStack()
    if place == "cpu":
        return patches
    patches.enter_context(mock.patch.object(native, "available", lambda: False))
    try:
        from flexmoe.kernels import paged_attention, varlen_attention
    except ImportError:
        return patches
    chosen = paged_attention.Kernel("varlen", "launches are counted")
    patches.enter_context(mock.patch.object(paged_attention, "choose_kernel", lambda *about: chosen))
    patches.enter_context(
        mock.patch.object(varlen_attention, "flash", lambda q, *about, **options: (torch.zeros_like(q),))
    )
    return patches


def _fill(engine: Engine, rows: int) -> None:
    for at in reversed(range(rows)):
        age = at * WORKLOAD.gen_len // rows
        if age:
            engine.enter_aged(_request(at), [1] * age)
        else:
            engine.submit(_request(at))


def _request(number: int) -> EngineRequest:
    ids = tuple(3 + (7 * number + i) % 990 for i in range(SHORTEST + number * 193 % (LONGEST + 1 - SHORTEST)))
    params = SamplingParams(max_tokens=WORKLOAD.gen_len, ignore_eos=True)
    return EngineRequest(request_id=str(number), prompt_token_ids=ids, params=params)


def _step(engine: Engine, rows: int) -> None:
    while engine.unfinished < rows + 4 + rows // WORKLOAD.gen_len:
        engine.submit(_request(time.perf_counter_ns()))
    engine.step()


def _timed_sweeps(engine: Engine, rows: int) -> Clock:
    clock = Clock()
    executor = engine.executor
    with contextlib.ExitStack() as patches:
        for owner, attribute, name in (
            (Sampling, "__init__", "sample"),
            (Sampling, "chosen", "sample"),
            (engine.kv, "begin", "begin"),
            (engine, "_book", "book"),
            (engine, "step", "step"),
        ):
            timed = clock.timed(name, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, timed))
        patches.enter_context(mock.patch.object(executor, "run", clock.timed_items("run", executor.run)))
        gc.collect()
        gc.disable()
        try:
            for _ in range(SWEEPS):
                _step(engine, rows)
        finally:
            gc.enable()
    return clock


def _counted_sweep(engine: Engine, rows: int) -> Launches:
    launches = Launches()
    issue = engine.executor._issue

    def counted(op):
        launches.layer = op.layer
        issue(op)

    with mock.patch.object(engine.executor, "_issue", counted), launches:
        _step(engine, rows)
    return launches


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu.host_work", description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="now", help="section of the record: which state of the sources this is")
    parser.add_argument("--rows", type=int, action="append", help="rows in flight (default: 600 and 3900)")
    parser.add_argument("--workdir", type=Path, default=Path("build"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/host-work.json"), metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    begin, figures, raw = time.perf_counter(), [], {}
    for place in PLACES:
        for rows in args.rows or ROWS:
            found = raw[f"{place}, {rows}"] = measure(args.workdir.resolve(), rows, place)
            figures += _figures(found)
    print("\n".join(figure_table(figures)))
    command = shlex.join(["python", "-m", "scripts.gpu.host_work", *argv])
    about = {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "model": "tiny, Mixtral's heads and experts",
    }
    Record(args.out, about).add(args.label, figures, raw, time.perf_counter() - begin)
    return 0


def _figures(found: dict) -> list[Figure]:
    name = f"{found['rows']} rows in {found['gpu_batches']} GPU batches, KV attended on the {found['place'].upper()}"
    each = found["bookkeeping_ms"] * 1e3 / found["rows"]
    share = (found["sample_ms"] + found["book_ms"]) / (found["sample_ms"] + found["bookkeeping_ms"])
    return [
        Figure(what=f"{name}: launches a layer", value=str(found["launches_a_layer"]), beside="none"),
        Figure(
            what=f"{name}: row bookkeeping a sweep",
            value=f"{found['bookkeeping_ms']:.1f} ms, {each:.1f} µs a row (index tensors {found['begin_ms']:.1f} ms)",
            beside="50 ms a sweep of 3900 rows",
            ratio=found["bookkeeping_ms"] / 50,
            target=1.0,
            at_most=True,
        ),
        Figure(
            what=f"{name}: sampling a sweep",
            value=f"{found['sample_ms']:.1f} ms; with booking {share:.2f} of all that the host does for rows",
            beside="none",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
