"""The stages of the GPU benchmark; each gives figures for the table and raw numbers for the record."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import numpy as np

from cost_model.model.arch import ModelArch
from cost_model.simulation.simulate import simulate
from policies.policy import Workload
from scripts.benchmark.record import Figure
from scripts.benchmark.worker import Worker, WorkerError
from scripts.gpu.capped import REHEARSAL_CAP_BYTES, engine_arguments, tokens_figure
from scripts.gpu.context import PACKED_TOKENS, Context, rates_of, reduced_model
from scripts.gpu.plan import Budget, plan

PEER_LAYERS, PEER_GPU_BYTES, PEER_SPARE_BYTES, PEER_HOST_BYTES = 8, int(8e9), int(2e9), int(32e9)
PEER_WORKLOAD = Workload(prompt_len=512, gen_len=32)
PEER_BATCHES = (8, 32, 64, 128)
LOGITS_BOUND = 0.1
#: Of the speed of a product of bf16 weights.
PACKED_TARGET = 0.9


def probe(run: Context) -> tuple[list[Figure], dict]:
    """What the machine gives."""
    found = run.measure()
    copies, host, disk, curve = found["copies"], found["host"], found["disk"], found["gemm"]["curve"]
    hbm = found["hbm"]["read"]
    figures = [
        _rate("pinned copies, host to GPU", copies["h2d"], "PCIe 5.0 x16: 63 GB/s", 63e9),
        _rate("pinned copies, GPU to host", copies["d2h"], "PCIe 5.0 x16: 63 GB/s", 63e9),
        _rate("host to GPU while the other way runs", copies["h2d_of_both"], "alone", copies["h2d"]),
        _rate("GPU to host while the other way runs", copies["d2h_of_both"], "alone", copies["d2h"]),
        _rate("HBM reads (sum)", hbm, "data sheet: 4.8 TB/s", 4.8e12),
    ]
    for tokens, rate in curve:
        most = min(989e12, tokens * hbm)  # an expert's 2 bytes a weight are read once and give 2 FLOPs a token
        figures.append(
            Figure(
                what=f"bf16 expert, {tokens} tokens",
                value=f"{rate / 1e12:.1f} TFLOP/s",
                beside=f"min(989, tokens · HBM) = {most / 1e12:.1f} TFLOP/s",
                ratio=rate / most,
            )
        )
    for name, own in found["packed"].items():
        figures += [
            _rate(f"unpack {name} to bf16, read and written", own["bytes_per_s"], "HBM reads", hbm),
            Figure(
                what=f"expert in {name}, {PACKED_TOKENS} tokens",
                value=f"{own['of_bf16']:.2f} of bf16's speed",
                beside="bf16, the same matrix on the GPU",
                ratio=own["of_bf16"],
                target=PACKED_TARGET,
            ),
        ]
    attention = f"host reads, best of {', '.join(host['reads'])}: {host['read'] / 1e9:.0f} GB/s"
    figures += [
        _rate(
            f"CPU attention, {host['threads']} threads, Mixtral's KV heads",
            host["attention"],
            attention,
            host["read"],
            0.5,
        ),
        _rate("CPU attention under copies to the GPU", host["attention_under_copies"], "alone", host["attention"]),
        _rate("copies to the GPU under CPU attention", host["copies_under_attention"], "alone", copies["h2d"]),
        _rate("disk reads, flexmoe.system.direct_io", disk["read"], "best plain O_DIRECT loop", disk["plain"]["best"]),
        _rate("disk writes, flexmoe.system.direct_io, synced", disk["write"], "its reads", disk["read"]),
    ]
    return figures, {"units": "bytes/s and FLOP/s", **found}


def peer(run: Context) -> tuple[list[Figure], dict]:
    """transformers + accelerate's CPU offload and FlexMoE, the same dummy weights, the same cap on the GPU."""
    model = (
        run.model
        if run.rehearse
        else reduced_model(run.workdir / "mixtral-8-layers", {"num_hidden_layers": PEER_LAYERS})
    )
    arch, workload = ModelArch.from_dir(model), run.workloads[0] if run.rehearse else PEER_WORKLOAD
    cap, host_bytes = (REHEARSAL_CAP_BYTES, run.host_bytes) if run.rehearse else (PEER_GPU_BYTES, PEER_HOST_BYTES)
    rng = random.Random(1)
    prompt = [rng.randrange(3, arch.vocab_size) for _ in range(64)]
    files = {side: run.workdir / f"gpu-logits-{side}.npy" for side in ("ours", "theirs")}
    theirs = _accelerate(run, model, workload, cap, prompt, str(files["theirs"]))
    rates, hardware = rates_of(run.measure()), run.hardware()
    with Worker("scripts.gpu.steady") as worker:
        room = worker.ask("room", device=run.device, gpu_bytes=cap, host_bytes=host_bytes)
        choice = plan(arch, workload, hardware, Budget(**room, disk_bytes=0), rates)
        rows = choice.policy.block_size * (2 if run.left_s() > 200 else 1)
        ours = worker.ask(
            "job",
            **engine_arguments(run, model, choice.policy, workload, cap, host_bytes),
            rows=rows,
            probe=prompt,
            path=str(files["ours"]),
        )
    predicted = simulate(arch, hardware, replace(workload, num_requests=rows), choice.policy)
    a, b = (np.load(file) for file in files.values())
    difference = float(np.median(np.abs(a - b).max(axis=1)) / np.sqrt(np.mean(b**2)))
    our_rate, their_rate = ours["generated"] / ours["wall_s"], theirs["rows"] * workload.gen_len / theirs["wall_s"]
    scale = f"{arch.num_layers} of 32 layers, all widths, cap {cap / 1e9:g} GB"
    name = f"{workload.prompt_len}/{workload.gen_len}"
    return [
        Figure(
            what=f"logits of one prompt, median over positions of the largest difference ({scale})",
            value=f"{difference:.4f} of their rms",
            beside="transformers, bf16",
            ratio=difference,
            target=LOGITS_BOUND,
            at_most=True,
        ),
        tokens_figure(
            f"{name}, whole job of {rows} rows, generated e2e ({scale})",
            our_rate,
            f"transformers + accelerate, {theirs['rows']} rows (its largest batch): {their_rate:.2f} tok/s",
            their_rate,
        ),
        tokens_figure(
            f"{name}: the same", our_rate, f"predicted: {predicted.tokens_per_s:.2f} tok/s", predicted.tokens_per_s
        ),
        tokens_figure(
            f"{name}: the same",
            our_rate,
            f"limit of the policy's own bytes, steady state: {choice.limit.tokens_per_s:.1f} tok/s",
            choice.limit.tokens_per_s,
        ),
    ], {
        "ours": ours,
        "theirs": theirs,
        "policy": asdict(choice.policy),
        "predicted": choice.prediction.to_json(),
        "own_limit": choice.limit.to_json(),
        "hardware": hardware.to_json(),
        "scaling": "time and bytes of a sweep are proportional to the layers",
    }


def _accelerate(run: Context, model: str, workload: Workload, cap: int, prompt: list[int], path: str) -> dict:
    """The peer at the largest batch that its memory admits: a pass moves the same weights for any batch."""
    options = {
        "model": model,
        "device": run.device,
        "gpu_bytes": cap,
        "spare_bytes": PEER_SPARE_BYTES,
        "offload_dir": str(run.workdir / "offload"),
    }
    sizes = (2,) if run.rehearse else PEER_BATCHES
    tried, short = {}, {"prompt_len": workload.prompt_len, "new_tokens": 2}
    with Worker("scripts.gpu.peer") as worker:
        opened = worker.ask("open", **options)
        worker.ask("logits", token_ids=prompt, path=path)
        for implementation in ("eager", "grouped_mm"):
            worker.ask("experts", implementation=implementation)
            worker.ask("generate", rows=sizes[0], **short)
            tried[implementation] = worker.ask("generate", rows=sizes[0], **short)
        best = min(tried, key=lambda name: tried[name]["wall_s"] or float("inf"))
        worker.ask("experts", implementation=best)
        fitting = []
        for rows in sizes:
            tried[rows] = worker.ask("generate", rows=rows, **short)
            if tried[rows]["wall_s"] is None:
                break
            fitting.append(rows)
    for rows in reversed(fitting):  # in a fresh process: a failed pass leaves weights on the GPU
        with Worker("scripts.gpu.peer") as worker:
            worker.ask("open", **options)
            worker.ask("experts", implementation=best)
            done = worker.ask("generate", rows=rows, prompt_len=workload.prompt_len, new_tokens=workload.gen_len)
        run.say(f"accelerate: {opened}, {tried}, {rows} rows: {done}")
        if done["wall_s"] is not None:
            return {**opened, "tried": tried, "experts": best, "rows": rows, **done}
    raise WorkerError(f"accelerate ran at no batch of {sizes} rows: {tried}")


def _rate(what: str, value: float, beside: str, against: float, target: float | None = None) -> Figure:
    unit, scale = ("TB/s", 1e12) if value > 1e12 else ("GB/s", 1e9)
    text = beside if "B/s" in beside else f"{beside}: {against / scale:.2f} {unit}"
    return Figure(
        what=what, value=f"{value / scale:.2f} {unit}", beside=text, ratio=value / max(1.0, against), target=target
    )
