"""What prompts that begin alike are worth: whole jobs with and without `--prefix-caching`, and decode attention by itself.

    python -m scripts.runner.prefixes shared               # 512 rows of 1,024 shared tokens, 64 of their own and 32 new ones
    python -m scripts.runner.prefixes questions            # MT-Bench's lengths, three times, behind a system prompt of 400 tokens
    python -m scripts.runner.prefixes unlike               # nothing in common: what looking for it costs
    python -m scripts.runner.prefixes attention            # 256 rows that share 2,048 of 2,112 tokens

Both ways run in turn, in float32 and with one policy, 256 rows in flight, and must give the same tokens but for ties; the best of the
rounds counts.
The limit beside a job is its ratio of tokens that pass through the layers.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexmoe.kernels.paged_attention import paged_attention
from flexmoe.kernels.ragged import Ragged, SharedKeys
from flexmoe.llm import LLM
from flexmoe.models.loader import Model, load_model
from flexmoe.params import SamplingParams
from policies.policy import Policy, Workload
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.support.sized_model import add_flags, checkpoint_of
from scripts.validation.jobs import MT_BENCH

_PAGE = 16
#: Of a model with random weights a few routers or logits in a million are as good as equal, and float32 decides them by the order of sums.
_ROWS_ALIKE = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Rows, and what the ratio of their speeds has to reach.

    Args:
        what: in words.
        prompts: token ids.
        new_tokens: of each row.
        target: tokens/s with prefix caching over those without.
    """

    what: str
    prompts: list[list[int]]
    new_tokens: int
    target: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A job in one way."""

    wall_s: float
    computed_tokens: int
    tokens: list[tuple[int, ...]]


def main(argv: list[str]) -> int:
    """Run one part; the exit code is 1 where its target is missed."""
    args = _parser().parse_args(argv)
    if args.part == "attention":
        figures, raw, seconds = attention(args.rounds)
    else:
        checkpoint = checkpoint_of(args)
        model = load_model(str(checkpoint))
        figures, raw, seconds = compare(model, jobs(args.part, args.rows, model.arch.vocab_size), args.rounds)
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {"machine": machine(), "versions": versions(), "model": args.size}
        about["command"] = shlex.join(["python", "-m", "scripts.runner.prefixes", *argv])
        Record(args.out, about).add(f"prefixes: {args.part}", figures, raw, seconds)
    return 1 if any(figure.met is False for figure in figures) else 0


def jobs(part: str, rows: int | None, vocab: int) -> Job:
    """The rows of a part."""
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(count)]

    if part == "shared":
        head, count = ids(1024), rows or 512
        what = f"{count} rows of 1,024 shared + 64 own + 32 new tokens"
        return Job(what=what, prompts=[head + ids(64) for _ in range(count)], new_tokens=32, target=6.0)
    if part == "questions":
        head, count = ids(400), rows or 240
        own = [MT_BENCH[i % len(MT_BENCH)] for i in range(count)]
        what = f"{count} rows of 400 shared + {min(own)} to {max(own)} own ({sum(own) // count} on average) + 64 new tokens"
        return Job(what=what, prompts=[head + ids(each) for each in own], new_tokens=64, target=2.0)
    count = rows or 256
    what = f"{count} rows of 256 + 32 new tokens with nothing in common"
    return Job(what=what, prompts=[ids(256) for _ in range(count)], new_tokens=32, target=0.99)


def compare(model: Model, job: Job, rounds: int) -> tuple[list[Figure], dict[str, list[float]], float]:
    """The job both ways, in turn."""
    runs: dict[bool, list[Run]] = {True: [], False: []}
    for at in range(rounds):
        for caching in (True, False) if at % 2 else (False, True):
            runs[caching].append(run(model, job, caching))
    alike = min(_rows_alike(one, other) for one in runs[True] for other in runs[False])
    found, plain = (min(runs[caching], key=lambda each: each.wall_s) for caching in (True, False))
    new = job.new_tokens * len(job.prompts)
    figures = [
        Figure(
            what=job.what,
            value=f"{new / found.wall_s:.1f} tokens/s",
            beside=f"{new / plain.wall_s:.1f} with --no-prefix-caching",
            ratio=plain.wall_s / found.wall_s,
            target=job.target,
        ),
        Figure(
            what="the same, of the limit: tokens that pass through the layers",
            value=f"{found.computed_tokens}",
            beside=f"{plain.computed_tokens}",
            ratio=plain.wall_s / found.wall_s * found.computed_tokens / plain.computed_tokens,
        ),
        Figure(
            what="rows with the same tokens both ways",
            value=f"{alike}",
            beside=f"{len(job.prompts)} rows",
            ratio=alike / len(job.prompts),
            target=_ROWS_ALIKE,
        ),
    ]
    raw = {"with": [each.wall_s for each in runs[True]], "without": [each.wall_s for each in runs[False]]}
    return figures, raw, sum(map(sum, raw.values()))


def _rows_alike(one: Run, other: Run) -> int:
    return sum(tokens == others for tokens, others in zip(one.tokens, other.tokens, strict=True))


def run(model: Model, job: Job, caching: bool) -> Run:
    """The job once; the time is that of the whole call, which looks for prefixes too."""
    mean = sum(map(len, job.prompts)) // len(job.prompts)
    policy = Policy.from_percent(
        (100, 0, 100, 0, 100, 0),
        gpu_batch_size=64,
        num_gpu_batches=4,
        prompt_len=mean,
        gen_len=job.new_tokens,
        prefill_tokens=2048,
    )
    options = {"device": "cpu", "dtype": "float32", "longest_row": 2048, "prefix_caching": caching}
    workload = Workload(prompt_len=mean, gen_len=job.new_tokens)
    params = SamplingParams(max_tokens=job.new_tokens, ignore_eos=True, detokenize=False)
    with contextlib.closing(LLM(model, policy=policy, workload=workload, **options)) as llm:
        start = time.perf_counter()
        outputs = llm.generate(job.prompts, params, use_tqdm=False)
        wall_s = time.perf_counter() - start
        computed = llm.metrics()["computed_tokens"]
    return Run(wall_s=wall_s, computed_tokens=computed, tokens=[output.outputs[0].token_ids for output in outputs])


def attention(rounds: int) -> tuple[list[Figure], dict[str, list[float]], float]:
    """Decode attention of 256 rows that share 2,048 of their 2,112 tokens, beside the same rows with pages of their own."""
    figures, raw, start = [], {}, time.perf_counter()
    shapes = [
        ("8 query heads of 128 and as many KV heads", 8, 8, 128),
        ("16 query heads of 64 on 4 KV heads", 16, 4, 64),
    ]
    for name, heads, kv_heads, size in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            together, alone = _attention(heads, kv_heads, size, dtype, rounds)
            what = f"attention, {name}, {str(dtype).removeprefix('torch.')}"
            raw |= {f"{what}, shared": together, f"{what}, pages of their own": alone}
            figures.append(
                Figure(
                    what=what,
                    value=f"{1e3 * min(together):.1f} ms",
                    beside=f"{1e3 * min(alone):.1f} ms with pages of their own",
                    ratio=min(alone) / min(together),
                    target=5.0,
                )
            )
    return figures, raw, time.perf_counter() - start


def _attention(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, rounds: int
) -> tuple[list[float], list[float]]:
    rows, shared, own = 256, 2048 // _PAGE, 64 // _PAGE
    pages = shared + rows * own
    pools = torch.randn(2, pages, _PAGE, kv_heads, size).to(dtype)
    q = torch.randn(rows, heads, size).to(dtype)
    tables = [[*range(shared), *range(shared + own * row, shared + own * (row + 1))] for row in range(rows)]
    together = Ragged.of([1] * rows, [_PAGE * (shared + own)] * rows, tables)
    together.shared = (SharedKeys(0, rows, 0, _PAGE * shared),)
    copies = torch.tensor(tables)
    alone = Ragged.of(
        [1] * rows, [_PAGE * (shared + own)] * rows, torch.arange(copies.numel()).view_as(copies).tolist()
    )
    pools_alone = pools.index_select(1, copies.flatten())

    def attend(pools: torch.Tensor, ragged: Ragged) -> torch.Tensor:
        return paged_attention(q, *pools, ragged, window=None)

    torch.testing.assert_close(attend(pools, together), attend(pools_alone, alone), atol=2e-2, rtol=2e-2)
    return _timed([lambda: attend(pools, together), lambda: attend(pools_alone, alone)], rounds)


def _timed(calls: list[Callable[[], object]], rounds: int) -> tuple[list[float], list[float]]:
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, seconds in zip(calls, found):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.runner.prefixes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("shared", "questions", "unlike", "attention"))
    parser.add_argument("--rows", type=int, help="rows of the job; default: as the text above says")
    parser.add_argument("--rounds", type=int, default=1, help="default 1")
    add_flags(parser, size="phi-like")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
