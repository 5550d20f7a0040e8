"""Few rows in flight and skewed routers: what the expert cache finds, beside the optimum, and what that is worth.

    python -m scripts.bench_expert_cache build/bench --tiers disk host --rows 1 4 16

A job is a few rounds of as many rows as are in flight, of a synthetic model whose routers choose by Zipf's law. `steady` stays with
one topic, `shift` changes to the other half way, and all favourites with it. Each policy runs on an `LLM` of its own, the static
one with the usage of a run of the first topic; on the trace of the default's run all policies are replayed, beside Belady's
optimum and the best static set in hindsight, which no expert has to pass through.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from cost_model.arch import ModelArch
from cost_model.expert_usage import ExpertUsage
from cost_model.on_demand import entry_bytes
from flexmoe import LLM, SamplingParams
from flexmoe.errors import FlexMoEError
from flexmoe.eviction import LFU, LRU, Static, Usage
from policies import Policy, Workload
from scripts.belady import LeastScore, Replay, belady, best_static, replay
from scripts.checkpoint_shapes import SIZES
from scripts.make_checkpoint import make_checkpoint

GIB = 1 << 30
TOPICS, PROMPT_LEN, ROUNDS = 2, 8, 4
#: Topic of each round.
JOBS = {"steady": (0, 0, 0, 0), "shift": (0, 0, 1, 1)}
_SEED = 11
#: A run without a cache is the same sweep again and again: so many tokens of each row tell its speed.
_OFF_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model, where its experts live, and how the job runs. ``share``: of all experts, those that the cache has room for."""

    model: Path
    tier: str
    job: str
    rows: int
    new_tokens: int
    share: float

    def options(self, arch: ModelArch, resident: bool = False) -> dict:
        """Of an `LLM` that has everything but the experts on the compute device."""
        sizes = [unit.stored_bytes for unit in arch.units() if unit.kind != "expert"]
        total = sum(unit.stored_bytes for unit in arch.units())
        gpu = 100.0 if resident else 100.0 * sum(sizes) / total
        host = 100.0 - gpu if self.tier == "host" else 0.0
        policy = Policy.from_percent(
            (gpu, host, 100, 0, 100, 0), gpu_batch_size=self.rows, num_gpu_batches=1, prompt_len=PROMPT_LEN,
            gen_len=self.new_tokens, prefill_tokens=self.rows * PROMPT_LEN,
        )  # fmt: skip
        workload = Workload(prompt_len=PROMPT_LEN, gen_len=self.new_tokens)
        return {"policy": policy, "workload": workload, "device": "cpu", "offload_dir": self.model.parent / "offload"}

    def prompts(self, arch: ModelArch) -> list[list[list[int]]]:
        """Those of each round, of its topic."""
        rng, half = np.random.default_rng(_SEED), arch.vocab_size // TOPICS
        return [
            (topic * half + rng.integers(3, half, (self.rows, PROMPT_LEN))).tolist() for topic in JOBS[self.job]
        ]  # fmt: skip


@dataclass(slots=True)
class Routing:
    """What was routed where in the sweeps whose experts came on demand: (layer, tokens of each expert, tokens)."""

    seen: list[tuple[int, np.ndarray, int]] = field(default_factory=list)
    trace: list[list[tuple[int, int]]] = field(default_factory=list)

    def listen(self, feed) -> None:
        """From now on, to a `WeightFeed`."""
        last, routed, request = [], feed.routed, feed._cache.request

        def on_routed(layer, counts, tokens):
            last[:] = [(layer, np.array(counts), tokens)]
            routed(layer, counts, tokens)

        def on_request(layer, experts):
            self.seen.append(last[0])
            self.trace.append([(layer, int(e)) for e in experts])
            request(layer, experts)

        feed.routed, feed._cache.request = on_routed, on_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of a job: speed, what the cache says of itself, and the ids of every row."""

    tokens_per_s: float
    sweeps: int
    cache: dict
    usage: ExpertUsage
    routing: Routing


def run(setting: Setting, kind: str, *, gpu_mem: float | None = None, usage: ExpertUsage | None = None) -> Run:
    """The job on an `LLM` of its own; ``kind`` is an `expert_cache`, or `resident` for all weights on the compute device."""
    arch, routing = ModelArch.from_dir(setting.model), Routing()
    options = setting.options(arch, resident=kind == "resident")
    llm = LLM(
        setting.model,
        **options,
        gpu_mem=gpu_mem,
        expert_usage=usage,
        expert_cache="off" if kind == "resident" else kind,
    )
    try:
        if llm.engine.feed.metrics()["experts"]:
            routing.listen(llm.engine.feed)
        params, begin = SamplingParams(max_tokens=setting.new_tokens, ignore_eos=True), time.perf_counter()
        for prompts in setting.prompts(arch):
            llm.generate(prompts, params)
        took_s, metrics = time.perf_counter() - begin, llm.metrics()
        counts = np.array([llm.router_stats(layer).counts for layer in range(arch.num_layers)], dtype=np.int64)
    finally:
        llm.close()
    tokens = int(counts[0].sum()) // arch.top_k
    return Run(
        tokens_per_s=ROUNDS * setting.rows * setting.new_tokens / took_s,
        sweeps=metrics["sweeps"],
        cache=metrics["expert_cache"],
        usage=ExpertUsage(model=arch.fingerprint(), tokens=tokens, counts=counts),
        routing=routing,
    )


def needed_gib(setting: Setting, experts: int) -> float:
    """Of device memory, what the job takes beside so many experts that the cache has room for."""
    arch = ModelArch.from_dir(setting.model)
    llm = LLM(setting.model, **setting.options(arch), expert_cache="off")
    try:
        planned = llm.metrics()["memory"]["gpu"]["planned_bytes"]
    finally:
        llm.close()
    return (planned + (experts + 0.5) * entry_bytes(arch)) / GIB


def replays(arch: ModelArch, routing: Routing, capacity: int, usage: ExpertUsage) -> dict[str, Replay]:
    """Every policy on one trace: the runtime's, beside the optimum and the best static set in hindsight."""
    streamed = np.ones((arch.num_layers, arch.num_experts), dtype=bool)

    def replayed(make) -> Replay:
        known, turn = Usage(arch), iter(routing.seen)
        policy = make(known)

        def seen(step):
            layer, counts, tokens = next(turn)
            known.add(layer, counts, tokens)
            policy.used(layer, [e for _, e in step])

        return replay(routing.trace, capacity, LeastScore(policy.scores, seen))

    return {
        "lfu": replayed(LFU),
        "lru": replayed(LRU),
        "static": replayed(lambda known: Static(known, usage.shares, streamed, capacity)),
        "best static": best_static(routing.trace, capacity),
        "optimum": belady(routing.trace, capacity),
    }


def measure(setting: Setting) -> dict:
    """All policies on one setting."""
    arch = ModelArch.from_dir(setting.model)
    gpu_mem = needed_gib(setting, round(setting.share * arch.num_layers * arch.num_experts))
    resident = run(replace(setting, job="steady"), "resident")
    few = replace(setting, new_tokens=min(setting.new_tokens, _OFF_TOKENS))
    runs = {"off": run(few, "off")}
    for kind in ("lfu", "lru", "static"):
        runs[kind] = run(setting, kind, gpu_mem=gpu_mem, usage=resident.usage if kind == "static" else None)
    default = runs["lfu"]
    on_trace = replays(arch, default.routing, default.cache["experts"], resident.usage) if default.routing.trace else {}
    return {
        "setting": {**asdict(setting), "model": setting.model.name},
        "resident_tokens_per_s": resident.tokens_per_s,
        "policies": {kind: {"tokens_per_s": r.tokens_per_s, "sweeps": r.sweeps, **r.cache} for kind, r in runs.items()},
        "on_the_trace": {name: asdict(found) | {"hit_rate": found.hit_rate} for name, found in on_trace.items()},
    }


def told(result: dict) -> list[str]:
    """The lines of a result."""
    s, policies, trace = result["setting"], result["policies"], result["on_the_trace"]
    room = f"{policies['lfu']['experts']} experts ({100 * s['share']:.0f} %)"
    job = f"{s['job']}, {s['rows']} rows of {s['new_tokens']} tokens, {ROUNDS} rounds"
    resident = f"all resident {result['resident_tokens_per_s']:.1f} tokens/s"
    lines = [f"{s['model']}, experts in {s['tier']}, {job}, room for {room}; {resident}"]
    for kind, p in policies.items():
        line = f"  {kind:<7} {p['tokens_per_s']:7.1f} tokens/s, {p['tokens_per_s'] / policies['off']['tokens_per_s']:5.2f}x off"
        if p["lookups"]:
            on_demand = f"{p['on_demand_sweeps']} of {p['sweeps']} sweeps on demand"
            line += f"; {on_demand}, hits {100 * p['hit_rate']:.1f} % of {p['lookups']}, a load {1e3 * p['mean_load_s']:.2f} ms"
        lines.append(line)
    if trace:
        hits = ", ".join(f"{name} {100 * found['hit_rate']:.1f} %" for name, found in trace.items())
        against = trace["lfu"]["hits"] / max(1, trace["best static"]["hits"])
        lines.append(f"  on the trace of lfu: {hits}; lfu has {100 * against:.1f} % of the hits of the best static set")
    return lines


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m scripts.bench_expert_cache", description=__doc__.split("\n")[0])
    p.add_argument("workdir", type=Path, help="where the checkpoint is made, unless it is there")
    p.add_argument("--size", choices=sorted(SIZES), default="qwen3-like", help="of the model; default qwen3-like")
    p.add_argument("--skew", type=float, default=1.0, help="exponent of Zipf's law; default 1")
    p.add_argument(
        "--tiers", nargs="+", choices=("disk", "host"), default=["disk", "host"], help="homes of the experts"
    )
    p.add_argument("--jobs", nargs="+", choices=sorted(JOBS), default=sorted(JOBS), help="default both")
    p.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16], help="rows in flight; default 1 4 16")
    p.add_argument("--round-tokens", type=int, default=256, help="new tokens of all rows of a round; default 256")
    p.add_argument(
        "--share", type=float, default=0.25, help="of all experts, those that the cache has room for; default 0.25"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON lines, added to the file")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    args = _parser().parse_args(argv)
    model = args.workdir / f"{args.size}-zipf-{args.skew:g}"
    try:
        if not model.exists():
            make_checkpoint(model, SIZES[args.size], router_skew=args.skew, router_topics=TOPICS)
        for tier, job, rows in itertools.product(args.tiers, args.jobs, args.rows):
            tokens = -(-args.round_tokens // rows)
            result = measure(Setting(model=model, tier=tier, job=job, rows=rows, new_tokens=tokens, share=args.share))
            print("\n".join(told(result)), flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    except FlexMoEError as error:
        print(f"bench_expert_cache: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
