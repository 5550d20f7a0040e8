"""What the expert cache is worth with few rows in flight and skewed routing, beside Belady's optimum on the same trace.

    python -m scripts.bench_cache                                   # about ten minutes on 2 cores
    python -m scripts.bench_cache --out benchmarks/expert-cache.json

Models whose routers follow Zipf's law run with 1, 4 and 16 rows, all experts in host memory or on disk (O_DIRECT), and room at
hand for a quarter of them. Hit rates are of the first policy's own requests: Belady's optimum and the best static set with hindsight
see the very same ones; the runs with the other policies route alike, but for rounding. Without a cache every sweep moves all
experts. Speeds are medians, the policies in turns. A *shift*: the second half of the rows is about another topic, with other favourites in every layer.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cost_model.routing.expert_usage import ExpertUsage
from cost_model.routing.on_demand import OnDemand, borrowed_experts, entry_bytes
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.llm import LLM
from flexmoe.models.loader import Model, load_model
from flexmoe.params import EngineRequest, SamplingParams
from policies.common.memory_units import GIB
from policies.policy import Policy, Workload
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.make_checkpoint import SIZES, make_checkpoint
from scripts.support.belady import Replay, belady, best_static, replay

MODELS = ("qwen3-like", "demo")
TIERS = {"disk": (0, 0), "host": (0, 100)}
ROWS = (1, 4, 16)
_PROMPT, _PART = 16, 0.25
#: New tokens of a row, by rows in flight; without a cache fewer, because nothing changes from sweep to sweep.
_NEW, _NEW_WITHOUT = {1: 192, 4: 96, 16: 32, 192: 16}, 12
_SKEW = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A model's rows: ``topics`` 2 means that the second half of them is about another one."""

    model: Model
    tier: str
    rows: int
    topics: int = 1

    def requests(self, new: int, seed: int = 0) -> list[EngineRequest]:
        """Rows that run in this order, ``rows`` at a time."""
        rng, vocab = random.Random(seed), self.model.arch.vocab_size // self.topics
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        return [
            EngineRequest(
                request_id=str(row),
                prompt_token_ids=tuple(rng.randrange(3, vocab) + vocab * (row // self.rows) for _ in range(_PROMPT)),
                params=params,
            )
            for row in range(self.rows * self.topics)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One policy on a scene."""

    tokens_per_s: float
    cache: dict
    trace: list[list[tuple[int, int]]]
    usage: ExpertUsage


def run(scene: Scene, kind: str, *, usage: ExpertUsage | None = None, new: int = 0, seed: int = 0) -> Run:
    """Run all rows with a cache of one kind."""
    new = new or _NEW[scene.rows]
    shape = {"prompt_len": _PROMPT, "gen_len": new}
    percent = (*TIERS[scene.tier], 100, 0, 100, 0)
    policy = Policy.from_percent(percent, gpu_batch_size=scene.rows, num_gpu_batches=1, **shape, schedule="static")
    with tempfile.TemporaryDirectory() as directory:
        options = {"workload": Workload(**shape), "device": "cpu", "expert_cache": kind, "expert_usage": usage}
        options["router_stats"] = True
        options["offload_dir"] = Path(directory)
        options["gpu_mem"] = _budget(scene.model, EngineConfig(policy=policy, **options))
        with contextlib.closing(LLM(scene.model, policy=policy, **options)) as llm:
            llm.engine.feed.trace = trace = []
            for _ in llm.stream(scene.requests(new, seed)):
                pass
            metrics, counted = llm.metrics(), llm.engine.router_counter.stats().usage()
    steps = [[(layer, e) for e in experts] for layer, experts in trace]
    rate = metrics["generated_tokens"] / metrics["wall_s"]
    return Run(tokens_per_s=rate, cache=metrics["expert_cache"], trace=steps, usage=counted)


def _budget(model: Model, config: EngineConfig) -> float:
    """GiB with which a part of all streamed experts is cached."""
    plan = EnginePlan.of(model, config)
    streamed = int(OnDemand.of(model.arch, plan.allocation.placement.tier_of, 0).streamed.sum())
    beyond = max(0, round(_PART * streamed) - borrowed_experts(model.arch, plan.allocation))
    return (plan.memory.total("gpu") + (beyond + 0.5) * entry_bytes(model.arch)) / GIB


class _Recent:
    """LRU on paper, for a trace of another policy's run."""

    def __init__(self) -> None:
        self._at: dict = {}
        self._clock = 0

    def touch(self, step) -> None:
        self._clock += 1
        self._at |= dict.fromkeys(step, self._clock)

    def victim(self, candidates):
        return min(candidates, key=self._at.__getitem__)


def _in_turns(
    scene: Scene, kinds: tuple[str, ...], repeats: int, usage: ExpertUsage | None = None
) -> dict[str, list[Run]]:
    """Runs of every kind, in another order every time, because machines drift."""
    runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for turn in range(repeats):
        first = turn % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            new = _NEW_WITHOUT if kind == "off" and scene.rows in ROWS else 0
            runs[kind].append(run(scene, kind, usage=usage if kind == "static" else None, new=new))
    return runs


def _speed(runs: list[Run]) -> float:
    return statistics.median(each.tokens_per_s for each in runs)


def stationary(scene: Scene, name: str, repeats: int) -> tuple[list[Figure], dict]:
    """All policies on rows of one topic."""
    usage = run(scene, "lfu", new=max(32, 256 // scene.rows), seed=1).usage  # of other prompts
    runs = _in_turns(scene, ("lfu", "lru", "static", "off"), repeats, usage)
    raw = {kind: [[each.tokens_per_s for each in found], found[-1].cache] for kind, found in runs.items()}
    speed = {kind: _speed(found) for kind, found in runs.items()}
    figures = [
        Figure(
            what=f"{name}: tokens/s, lfu",
            value=f"{speed['lfu']:.1f}",
            beside=f"without a cache {speed['off']:.1f} (lru {speed['lru']:.1f}, static {speed['static']:.1f})",
            ratio=speed["lfu"] / speed["off"],
            target=1.0,
        )
    ]
    lfu = runs["lfu"][-1]
    if lfu.trace:
        capacity = lfu.cache["experts"]
        best, optimum = best_static(lfu.trace, capacity), belady(lfu.trace, capacity)
        raw |= {"best static": best.hit_rate, "belady": optimum.hit_rate}
        others = ", ".join(f"{kind} {runs[kind][-1].cache['hit_rate']:.3f}" for kind in ("lru", "static"))
        said = f"best static set {best.hit_rate:.3f}, Belady {optimum.hit_rate:.3f} ({others})"
        figures.append(_hits(name, lfu, best, said, 0.9))
    return figures, raw


def shifting(scene: Scene, name: str) -> tuple[list[Figure], dict]:
    """The default on rows whose topic changes, beside static with hindsight and LRU on the same trace."""
    lfu = run(scene, "lfu")
    if not lfu.trace:
        return [Figure(what=f"{name}: hits, lfu", value="none: all experts are streamed", beside="")], {
            "lfu": lfu.cache
        }
    capacity = lfu.cache["experts"]
    best, recent = best_static(lfu.trace, capacity), replay(lfu.trace, capacity, _Recent())
    optimum = belady(lfu.trace, capacity)
    said = f"best static set {best.hit_rate:.3f}, LRU {recent.hit_rate:.3f}, Belady {optimum.hit_rate:.3f}"
    better = max(best, recent, key=lambda each: each.hits)
    raw = {"lfu": lfu.cache, "best static": best.hit_rate, "lru": recent.hit_rate, "belady": optimum.hit_rate}
    return [_hits(name, lfu, better, said, 1.0)], raw


def _hits(name: str, run: Run, peer: Replay, said: str, target: float) -> Figure:
    hits = run.cache["hits"]
    value = f"{run.cache['hit_rate']:.3f} of {run.cache['lookups']}, {1e3 * run.cache['mean_load_s']:.1f} ms a load"
    return Figure(what=f"{name}: hits, lfu", value=value, beside=said, ratio=hits / peer.hits, target=target)


def many_rows(scene: Scene, repeats: int) -> tuple[list[Figure], dict]:
    """What the cache costs where all experts are needed: the same job with it and without, in turns."""
    runs = _in_turns(scene, ("lfu", "off"), 2 * repeats)
    lfu, off = (_speed(found) for found in runs.values())
    figure = Figure(
        what=f"{scene.rows} rows, {scene.tier}: tokens/s, median of {2 * repeats}",
        value=f"{lfu:.1f}",
        beside=f"without a cache {off:.1f}",
        ratio=lfu / off,
        target=0.97,
    )
    return [figure], {kind: [each.tokens_per_s for each in found] for kind, found in runs.items()}


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code is 1 where a target is missed."""
    args = _parser().parse_args(argv)
    args.workdir.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "versions": versions()}
    about["command"] = shlex.join(["python", "-m", "scripts.bench_cache", *argv])
    missed = False
    for size in args.models:
        for section, measure in (("stationary", _stationary), ("shift", _shift), ("many rows", _many)):
            if section not in args.sections:
                continue
            start = time.perf_counter()
            figures, raw = measure(args, size)
            print(f"\n{size}, {section}", *figure_table(figures), sep="\n", flush=True)
            missed |= any(figure.met is False for figure in figures)
            if args.out:
                record = Record(args.out, about | {"model": f"{size}, Zipf exponent {_SKEW:g}"})
                record.add(f"{size}, {section}", figures, raw, time.perf_counter() - start)
    return int(missed)


def _stationary(args: argparse.Namespace, size: str) -> tuple[list[Figure], dict]:
    model = _model(args.workdir, size, topics=1)
    figures, raw = [], {}
    for tier in TIERS:
        for rows in args.rows:
            name = f"{tier}, {rows} rows"
            found, raw[name] = stationary(Scene(model=model, tier=tier, rows=rows), name, args.repeats)
            figures += found
    return figures, raw


def _shift(args: argparse.Namespace, size: str) -> tuple[list[Figure], dict]:
    model = _model(args.workdir, size, topics=2)
    figures, raw = [], {}
    for rows in args.rows:
        name = f"host, {rows} rows"
        found, raw[name] = shifting(Scene(model=model, tier="host", rows=rows, topics=2), name)
        figures += found
    return figures, raw


def _many(args: argparse.Namespace, size: str) -> tuple[list[Figure], dict]:
    return many_rows(Scene(model=_model(args.workdir, size, topics=1), tier="host", rows=192), args.repeats)


def _model(workdir: Path, size: str, topics: int) -> Model:
    checkpoint = workdir / f"checkpoint-{size}-skew-{topics}"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint, SIZES[size], tokenizer=False, router_skew=_SKEW, router_topics=topics)
    return load_model(str(checkpoint))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sections = ("stationary", "shift", "many rows")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(MODELS), help="default: %(default)s")
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections), help="default: all")
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, default=list(ROWS), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of every timing; default: %(default)s")
    parser.add_argument("--workdir", type=Path, default=Path("build"), metavar="DIR", help="of the checkpoints")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON record, with a table beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
