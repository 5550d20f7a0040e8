"""FlexMoE against transformers with everything in memory. Both run on the same prompts, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from scripts.benchmark import loads
from scripts.benchmark.context import Bench
from scripts.benchmark.loads import Job
from scripts.benchmark.record import Figure
from scripts.benchmark.worker import Worker

EXPERTS = ("eager", "grouped_mm")
#: What is asked of equal prompts and of ragged ones, against the peer's best.
EQUAL_TARGET, RAGGED_TARGET = 1.5, 2.5
#: FLOPs / GEMM rate of a sweep's time, in sweeps of prompts and in those that decode.
PREFILL_TARGET, DECODE_TARGET = 0.85, 0.75
_PRODUCTS_S = 0.1


def resident(bench: Bench) -> tuple[list[Figure], dict]:
    """Equal prompts against one batch of the peer."""
    return _compared(bench, _equal)


def ragged(bench: Bench) -> tuple[list[Figure], dict]:
    """Ragged prompts against the peer's batches in file order and by length."""
    return _compared(bench, _ragged)


def _compared(bench: Bench, measure: Callable) -> tuple[list[Figure], dict]:
    with Worker("scripts.benchmark.processes.engine") as engine, Worker("scripts.benchmark.processes.peers") as peer:
        peer.ask("open", model=str(bench.model))
        experts = fastest_experts(bench, peer)
        figures, raw = measure(bench, engine, peer)
    return figures, {"experts": experts, **raw}


def fastest_experts(bench: Bench, peer: Worker, drop: tuple[str, ...] = ()) -> dict:
    """Try the peer's experts implementations on a few rows, and leave the fastest chosen."""
    rows = min(32, bench.scale.prompt_rows)
    job = loads.equal_job(rows=rows, prompt_len=64, new_tokens=4, vocab=bench.arch.vocab_size, seed=1)
    seconds = {}
    for name in EXPERTS:
        peer.ask("experts", implementation=name)
        _batch(peer, job, [0, 1], drop=drop, new_tokens=2)
        seconds[name] = _batch(peer, job, range(rows), drop=drop)
    best = min(seconds, key=seconds.__getitem__)
    peer.ask("experts", implementation=best)
    tried = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    bench.say(f"transformers' experts on {rows} rows of 64 + 4: {tried}; it gets {best}")
    return {"seconds": seconds, "chosen": best}


def _batch(peer: Worker, job: Job, rows, *, drop: tuple[str, ...] = (), new_tokens: int = 0) -> float:
    """Seconds of one batch, run to its longest row."""
    steps = new_tokens or loads.batch_steps(job, rows) + 1
    return peer.ask("generate", prompts=[job.prompts[i] for i in rows], new_tokens=steps, drop=drop)["wall_s"]


def _equal(bench: Bench, engine: Worker, peer: Worker) -> tuple[list[Figure], dict]:
    scale = bench.scale
    prompt_len, new = (128, 32) if scale.prompt_rows == 64 else (32, 8)
    job = loads.equal_job(
        rows=scale.prompt_rows, prompt_len=prompt_len, new_tokens=new, vocab=bench.arch.vocab_size, seed=2
    )
    what = f"resident, {job.rows} prompts of {prompt_len} + {new}"
    bench.open(engine, "resident", job, "resident")
    ours, theirs, sweeps = [], [], []
    for _ in range(scale.repeats):
        ours.append(bench.run(engine, "resident", job)["wall_s"])
        theirs.append(_batch(peer, job, range(job.rows)))
        sweeps.append(_shares_of_products(bench, engine, job))
        bench.say(
            f"{what}: FlexMoE {ours[-1]:.1f} s, transformers {theirs[-1]:.1f} s; products are {sweeps[-1]['prefill']:.1%} of "
            f"prefill and {sweeps[-1]['decode']:.1%} of decode"
        )
    engine.ask("close", name="resident")
    ours_s, theirs_s = loads.median(ours), loads.median(theirs)
    beside_peer = Figure(
        what=f"{what}: medians of {len(ours)} in turns",
        value=f"{ours_s:.1f} s, {job.new_tokens / ours_s:.1f} generated tokens/s",
        beside=f"transformers {theirs_s:.1f} s, {job.new_tokens / theirs_s:.1f} tokens/s",
        ratio=loads.median([their_s / our_s for their_s, our_s in zip(theirs, ours)]),
        target=EQUAL_TARGET,
    )
    of_products = [
        _products_figure(f"{what}, {kind}", [(one[f"{kind}_s"], one[f"{kind}_products_s"]) for one in sweeps], target)
        for kind, target in (("prefill", PREFILL_TARGET), ("decode", DECODE_TARGET))
    ]
    return [beside_peer, *of_products], {"ours_s": ours, "theirs_s": theirs, "sweeps": sweeps}


def _products_figure(what: str, times: list[tuple[float, float]], target: float) -> Figure:
    """Of (seconds of sweeps, seconds of their products by themselves) of each round."""
    sweeps_s, products_s = (loads.median(list(of_one)) for of_one in zip(*times))
    return Figure(
        what=f"{what}: FLOPs / GEMM rate at that token count",
        value=f"{sweeps_s:.1f} s",
        beside=f"products alone {products_s:.1f} s, between the sweeps",
        ratio=loads.median([alone_s / took_s for took_s, alone_s in times]),
        target=target,
    )


def _shares_of_products(bench: Bench, engine: Worker, job: Job) -> dict[str, float]:
    """Seconds of the sweeps of a job's prompts and of those that decode, and of their products by themselves.

    The head counts for tokens that sample; of the prompts' sweeps these are left out.
    """
    share = bench.arch.top_k / bench.arch.num_experts
    sweeps = bench.ask_products(engine, "resident", job, share, _PRODUCTS_S)
    found = {}
    for kind, of_kind in (
        ("prefill", [sweep for sweep in sweeps if sweep[0] > job.rows]),
        ("decode", [sweep for sweep in sweeps if sweep[0] <= job.rows]),
    ):
        seconds = sum(took_s for _, took_s, _ in of_kind)
        products_s = sum(bench.flops(tokens, tokens if kind == "decode" else 0) / rate for tokens, _, rate in of_kind)
        found |= {f"{kind}_s": seconds, f"{kind}_products_s": products_s, kind: products_s / seconds}
    return found


def ragged_load(bench: Bench) -> Job:
    """The ragged load of the comparisons: always the same prompts."""
    scale = bench.scale
    return loads.ragged_job(
        rows=scale.ragged_rows,
        vocab=bench.arch.vocab_size,
        seed=3,
        longest_prompt=scale.ragged_prompt,
        longest_new=scale.ragged_new,
    )


def _ragged(bench: Bench, engine: Worker, peer: Worker) -> tuple[list[Figure], dict]:
    job = ragged_load(bench)
    bench.open(engine, "resident", job, "resident")
    ours = [bench.run(engine, "resident", job)]
    small, middle, large = bench.scale.peer_batches
    measured = {f"{middle} in file order": _in_full(bench, peer, job, middle, by_length=False)}
    ours.append(bench.run(engine, "resident", job))
    measured[f"{middle} by length"] = _in_full(bench, peer, job, middle, by_length=True)
    ours.append(bench.run(engine, "resident", job))
    measured[f"{small} by length"] = _sampled(
        bench, peer, job, small, at_most=measured[f"{middle} by length"]["wall_s"]
    )
    measured[f"{large} by length"] = _bounded(
        bench, peer, job, large, middle, measured[f"{middle} by length"]["wall_s"]
    )
    ours.append(bench.run(engine, "resident", job))
    engine.ask("close", name="resident")
    ours_s, sweeps = loads.median([one["wall_s"] for one in ours]), ours[0]["sweeps"]
    limit_s = bench.flops(job.processed_tokens, job.new_tokens) / bench.gemm(engine, job.processed_tokens / sweeps)
    times = ", ".join(f"{one['wall_s']:.1f}" for one in ours)
    bench.say(f"ragged: FlexMoE {times} s between the peer's, in {sweeps} sweeps; FLOPs / GEMM rate {limit_s:.1f} s")
    best = min((name for name in measured if "by length" in name), key=lambda name: measured[name]["wall_s"])
    figures = [
        _ragged_figure(job, ours_s, limit_s, f"batches of {middle} in file order", measured, None),
        _ragged_figure(job, ours_s, limit_s, f"its best, batches of {best}", measured, RAGGED_TARGET),
    ]
    return figures, {"ours": ours, "limit_s": limit_s, "transformers": measured}


def _ragged_figure(job: Job, ours_s: float, limit_s: float, name: str, measured: dict, target: float | None) -> Figure:
    entry = next(value for key, value in measured.items() if name.endswith(key))
    others = "; ".join(f"{key} {value['wall_s']:.1f} s ({value['how']})" for key, value in measured.items())
    return Figure(
        what=f"resident, {job.rows} ragged prompts against {name}",
        value=f"{ours_s:.1f} s, {job.new_tokens / ours_s:.1f} useful generated tokens/s",
        beside=f"transformers {entry['wall_s']:.1f} s, {job.new_tokens / entry['wall_s']:.1f} useful tokens/s "
        f"(all: {others}); FLOPs / GEMM rate {limit_s:.1f} s",
        ratio=entry["wall_s"] / ours_s,
        target=target,
    )


def _in_full(bench: Bench, peer: Worker, job: Job, size: int, *, by_length: bool) -> dict:
    """Every batch, measured once."""
    walls = []
    for rows in loads.batches(job, size, by_length=by_length):
        walls.append(_batch(peer, job, rows))
        bench.say(f"transformers, batch of {len(rows)}{' by length' if by_length else ''}: {walls[-1]:.1f} s")
    return {"wall_s": sum(walls), "batches_s": walls, "how": "measured in full"}


def _sampled(bench: Bench, peer: Worker, job: Job, size: int, at_most: float) -> dict:
    """An even sample of the batches, scaled by padded prompt tokens; in full when that beats `at_most`."""
    cut = loads.batches(job, size, by_length=True)
    chosen = loads.spread(len(cut), 4)
    walls = [_batch(peer, job, cut[i]) for i in chosen]
    padded = [loads.padded_tokens(job, rows) for rows in cut]
    projected_s = sum(walls) * sum(padded) / sum(padded[i] for i in chosen)
    bench.say(f"transformers, batches of {size} by length: {projected_s:.0f} s projected from batches {chosen}")
    if len(chosen) == len(cut):
        return {"wall_s": sum(walls), "batches_s": walls, "how": "measured in full"}
    if projected_s < at_most or bench.full_peers:
        return _in_full(bench, peer, job, size, by_length=True)
    return {"wall_s": projected_s, "batches_s": walls, "how": f"projected from batches {chosen} of {len(cut)}"}


def _bounded(bench: Bench, peer: Worker, job: Job, size: int, smaller: int, at_most: float) -> dict:
    """A lower bound from the prefill rate and the decode step of a smaller batch; in full when that beats `at_most`."""
    length = bench.scale.ragged_prompt
    prefill = loads.equal_job(
        rows=smaller // 2, prompt_len=length // 2, new_tokens=1, vocab=bench.arch.vocab_size, seed=4
    )
    short = loads.equal_job(rows=smaller, prompt_len=8, new_tokens=9, vocab=bench.arch.vocab_size, seed=5)
    token_s = _batch(peer, prefill, range(prefill.rows)) / prefill.prompt_tokens
    step_s = (_batch(peer, short, range(short.rows)) - _batch(peer, short, range(short.rows), new_tokens=1)) / 8
    cut = loads.batches(job, size, by_length=True)
    padded, steps = (sum(f(job, rows) for rows in cut) for f in (loads.padded_tokens, loads.batch_steps))
    bound_s = padded * token_s + steps * step_s
    bench.say(
        f"transformers, batches of {size}: at least {bound_s:.0f} s for {padded} padded tokens and {steps} steps, at "
        f"{1 / token_s:.0f} tokens/s and {step_s:.3f} s a step of {smaller} rows"
    )
    if bound_s < at_most or bench.full_peers:
        return _in_full(bench, peer, job, size, by_length=True)
    return {"wall_s": bound_s, "token_s": token_s, "step_s": step_s, "how": "lower bound"}
