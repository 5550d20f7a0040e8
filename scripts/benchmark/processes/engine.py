"""The measured side: FlexMoE in a process of its own, one `LLM` at a time or a streaming and a resident one beside."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from dataclasses import replace
from functools import cache
from itertools import accumulate

import numpy as np
import torch

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from flexmoe import LLM, SamplingParams
from policies import Policy, Workload
from policies.placement import residency_order
from scripts.benchmark.probes import DirectReader, PeakMemory, Products, Repeater, drop_pages, gemm_rate, read_rate
from scripts.benchmark.processes.turns import in_turns, with_products
from scripts.benchmark.worker import serve

#: Tokens of an expert that a plan may have computed at once, the runtime's own first.
CHUNKS = (512, 1024, 2048)
_CHUNK_S, _CHUNK_ROUNDS = 0.2, 5

_open: dict[str, LLM] = {}
_watch: list[PeakMemory] = []


def open_llm(
    name: str,
    model: str,
    weights: str | list[float] | int,
    rows: int,
    prefill_tokens: int,
    kv_tokens: int,
    lengths: list[int],
    dtype: str = "auto",
    num_gpu_batches: int = 1,
    offload_dir: str = "build/offload",
) -> dict:
    """Load a model under `name`, and run one token through it.

    Args:
        weights: "resident", "experts on disk", [gpu percent, cpu percent], or the most bytes to keep resident.
        rows: rows in flight at most.
        lengths: prompt and completion length of a usual row.
    """
    arch = ModelArch.from_dir(model)
    gpu, cpu = weight_percents(arch, weights)
    policy = Policy.from_percent(
        [gpu, cpu, 100, 0, 100, 0],
        gpu_batch_size=-(-rows // num_gpu_batches),
        num_gpu_batches=num_gpu_batches,
        prompt_len=lengths[0],
        gen_len=lengths[1],
        prefill_tokens=prefill_tokens,
    )
    policy = replace(policy, expert_chunk=_best_chunk(arch.hidden, arch.ffn))
    begin = time.perf_counter()
    llm = LLM(
        model,
        policy=policy,
        device="cpu",
        dtype=dtype,
        workload=Workload(prompt_len=lengths[0], gen_len=lengths[1]),
        kv_tokens=kv_tokens,
        offload_dir=offload_dir,
    )
    load_s = time.perf_counter() - begin
    llm.generate([[5] * 8], [SamplingParams(max_tokens=1, ignore_eos=True)])
    _open[name] = llm
    memory = llm.metrics()["memory"]
    return {
        "load_s": load_s,
        "memory": memory,
        "percents": [gpu, cpu],
        "expert_chunk": policy.expert_chunk,
        "flops_per_token": arch.flops_per_token,
    }


@cache
def _best_chunk(hidden: int, ffn: int) -> int:
    """Tokens of an expert computed at once as the planner chooses them, from products timed in turns."""
    products, tokens = Products(hidden, ffn), CHUNKS
    rounds = [[products.rate(count, _CHUNK_S) for count in tokens] for _ in range(_CHUNK_ROUNDS)]
    rates = tuple(statistics.median(of_one) for of_one in zip(*rounds))
    curve = GemmRates(tokens=tokens, weight_elements=(3 * hidden * ffn,), flops_per_s=(rates,))
    return curve.fastest(3 * hidden * ffn, tokens[0])


def weight_percents(arch: ModelArch, weights: str | list[float] | int) -> tuple[float, float]:
    """GPU and CPU percents that place exactly what `open_llm` is asked for."""
    if weights == "resident":
        return 100.0, 0.0
    if isinstance(weights, list):
        return weights[0], weights[1]
    order = residency_order(units_of(arch))
    total = sum(unit.stored_bytes for unit in order)
    if weights == "experts on disk":
        return 100.0 * sum(unit.stored_bytes for unit in order if unit.kind != "expert") / total, 0.0
    fitting = [size for size in accumulate(unit.stored_bytes for unit in order) if size <= weights]
    return 100.0 * (fitting[-1] if fitting else 0) / total, 0.0


def generate(name: str, prompts: list, max_tokens: list[int], tokens: bool = False, drop: list[str] = ()) -> dict:
    """Run a job and check that every row has the length it asked for.

    Args:
        tokens: also return the generated ids.
        drop: directories whose cached pages are dropped every 400 ms while the job runs.
    """
    llm = _open[name]
    params = [SamplingParams(max_tokens=m, ignore_eos=True) for m in max_tokens]
    before = llm.metrics()
    dropper = Repeater(lambda: drop_pages(drop), 0.4) if drop else None
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params)
    wall_s = time.perf_counter() - begin
    if dropper:
        dropper.stop()
    after = llm.metrics()
    made = [list(output.outputs[0].token_ids) for output in outputs]
    wrong = sum(len(ids) != wanted for ids, wanted in zip(made, max_tokens, strict=True))
    if wrong:
        raise ValueError(f"{wrong} rows have not the length they asked for")
    start = before["sweeps"]
    rows = after["rows_in_flight"][start:]
    disk = [m["lanes"].get("disk_read", {"bytes": 0})["bytes"] for m in (before, after)]
    return {
        "wall_s": wall_s,
        "sweeps": after["sweeps"] - start,
        "rows_in_flight": rows,
        "tokens_per_sweep": after["tokens_per_sweep"][start:],
        "disk_bytes": disk[1] - disk[0],
        "stall_s": after["weights_stall_s"] - before["weights_stall_s"],
        **({"tokens": made} if tokens else {}),
    }


def turns(
    prompts: list, max_tokens: list[int], paths: list[str], threads: int, piece_bytes: int, look_bytes: int
) -> dict:
    """`in_turns` on the models that are open as `disk` and `resident`; each look reads the next bytes of the files."""
    reader, starts = DirectReader(paths), itertools.count(0, look_bytes)

    def look() -> float:
        return read_rate(reader, threads, piece_bytes, next(starts), look_bytes)

    try:
        return in_turns(_open["disk"], _open["resident"], prompts, max_tokens, look)
    finally:
        reader.close()


def products(name: str, prompts: list, max_tokens: list[int], share: float, seconds: float) -> dict:
    """`with_products` of an open model; an expert gets `share` of a sweep's tokens, and is timed for so many seconds."""
    llm = _open[name]
    arch = llm.engine.model.arch
    found = Products(arch.hidden, arch.ffn)
    sweeps = with_products(llm, prompts, max_tokens, lambda tokens: found.rate(max(1, round(share * tokens)), seconds))
    return {"sweeps": sweeps}


def logits(name: str, token_ids: list[int], path: str) -> None:
    """Write the float32 logits after every token of one prompt to an .npy file."""
    np.save(path, _open[name].logits(token_ids).numpy())


def close_llm(name: str) -> None:
    """Close a model and forget it."""
    _open.pop(name).close()


def watch_memory() -> None:
    """Start looking at the process's memory."""
    _watch.append(PeakMemory())


def peak_memory() -> dict:
    """The peak since `watch_memory`."""
    return {"peak_bytes": _watch.pop().stop()}


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    serve(
        {
            "open": open_llm,
            "generate": generate,
            "turns": turns,
            "products": products,
            "logits": logits,
            "close": close_llm,
            "gemm": lambda **arguments: {"rate": gemm_rate(**arguments)},
            "watch_memory": watch_memory,
            "peak_memory": peak_memory,
        }
    )
