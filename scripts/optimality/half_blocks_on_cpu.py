"""What two half-blocks cost where they gain nothing: runs on the CPU with `half_blocks` forced to 2, beside the same with 1.

    python -m scripts.optimality.half_blocks_on_cpu [--model DIR] [--cases resident …] [--rounds N] [--output benchmarks/half-blocks-cpu]

The model is a synthetic one of 0.3 GB (made below `build/` if it is not there). In each round both run, one after the other, in
turns who is first; the cost is the median of the rounds' ratios, as the speed of a shared machine changes from round to round. Asked
for is at most 3 %. The planner takes 1 on such a machine. Where nothing moves beside the computation, the runtime marches as
one anyhow. Cases that are not run stay in the record as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flexmoe import LLM, SamplingParams
from policies import Policy, Workload
from scripts.checkpoints.shapes import SIZES
from scripts.make_checkpoint import make_checkpoint

_RESIDENT, _STREAMED, _ATTENDED = (100, 0, 100, 0, 100, 0), (30, 70, 100, 0, 100, 0), (100, 0, 0, 100, 100, 0)
#: FlexLLMGen's six numbers, and rows.
CASES = {
    "resident": (_RESIDENT, 64),
    "streamed from host memory": (_STREAMED, 64),
    "attended on the other tier": (_ATTENDED, 64),
    "streamed from host memory, 512 rows": (_STREAMED, 512),
    "attended on the other tier, 512 rows": (_ATTENDED, 512),
}
BATCHES, PROMPT_LEN, GEN_LEN = 4, 64, 32
ROUNDS = 15
_LEAST_ID, _SOME_IDS = 5, 4000
MOST = 0.03
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case: generated tokens/s of every round, by half-blocks, and the part of the token ids that agree."""

    case: str
    tokens_per_s: dict[int, list[float]]
    same_ids: float

    @property
    def cost(self) -> float:
        """Of two half-blocks, as a part of the speed of one."""
        return 1 - statistics.median(self._ratios)

    @property
    def _ratios(self) -> list[float]:
        return [two / one for one, two in zip(self.tokens_per_s[1], self.tokens_per_s[2], strict=True)]

    def line(self) -> str:
        """A row of the table."""
        one, two = (f"{statistics.median(self.tokens_per_s[halves]):.1f}" for halves in (1, 2))
        low, _, high = statistics.quantiles(self._ratios, n=4)
        return (
            f"| {self.case} | {len(self._ratios)} | {one} | {two} | {100 * self.cost:+.1f} % | "
            f"{100 * (1 - high):+.1f} to {100 * (1 - low):+.1f} % | {100 * self.same_ids:.0f} % |"
        )


def measure(case: str, model: Path, offload: Path, rounds: int) -> Result:
    """The rounds of a case."""
    rows = CASES[case][1]
    prompts = [[_LEAST_ID + (7 * row + 3 * at) % _SOME_IDS for at in range(PROMPT_LEN)] for row in range(rows)]
    rates: dict[int, list[float]] = {1: [], 2: []}
    ids: dict[int, list[int]] = {}
    engines = {halves: _llm(case, model, offload, halves) for halves in (1, 2)}
    try:
        for halves in (halves for at in range(rounds) for halves in ((2, 1) if at % 2 else (1, 2))):
            start = time.perf_counter()
            params = SamplingParams(max_tokens=GEN_LEN, ignore_eos=True)
            outputs = engines[halves].generate(prompts, params)
            rates[halves].append(rows * GEN_LEN / (time.perf_counter() - start))
            ids[halves] = [token for output in outputs for token in output.outputs[0].token_ids]
    finally:
        for llm in engines.values():
            llm.close()
    same = sum(a == b for a, b in zip(ids[1], ids[2], strict=True)) / len(ids[1])
    return Result(case=case, tokens_per_s=rates, same_ids=same)


def _llm(case: str, model: Path, offload: Path, halves: int) -> LLM:
    percent, rows = CASES[case]
    policy = Policy.from_percent(
        percent,
        gpu_batch_size=rows // BATCHES,
        num_gpu_batches=BATCHES,
        prompt_len=PROMPT_LEN,
        gen_len=GEN_LEN,
        prefill_tokens=64 * PROMPT_LEN,
        cpu_attention_percent=100,
        half_blocks=halves,
    )
    workload = Workload(prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
    llm = LLM(model, policy=policy, device="cpu", workload=workload, offload_dir=offload, expert_cache="off")
    llm.generate([[_LEAST_ID] * 8] * BATCHES, SamplingParams(max_tokens=2, ignore_eos=True))
    return llm


def table(results: Sequence[Result]) -> str:
    """The record as text."""
    return "\n".join(
        [
            "# Two half-blocks forced on the CPU",
            "",
            f"`python -m scripts.optimality.half_blocks_on_cpu`. 64 or 512 rows of {PROMPT_LEN} + {GEN_LEN} tokens in {BATCHES} GPU batches, a model of",
            "0.3 GB in bfloat16; median of the generated tokens/s. The cost is the median of the rounds' ratios, beside it the middle half of",
            f"them. Asked for: a cost of at most {100 * MOST:.0f} %. The planner takes 1.",
            "",
            "| case | rounds | 1 half-block | 2 | cost | middle half | same ids |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *(result.line() for result in results),
            "",
        ]
    )


def _recorded(output: Path) -> dict[str, Result]:
    """The cases of an earlier record, if there is one."""
    path = output.with_suffix(".json")
    results = json.loads(path.read_text("utf-8"))["results"] if path.exists() else []
    for each in results:
        each["tokens_per_s"] = {int(halves): rates for halves, rates in each["tokens_per_s"].items()}
    return {each["case"]: Result(**each) for each in results}


def main() -> int:
    """The command line; 1 where a case costs more than is asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "demo-model")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="at least 2")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "half-blocks-cpu", help="without suffix")
    args = parser.parse_args()
    if not args.model.exists():
        make_checkpoint(args.model, SIZES["demo"])
    found = _recorded(args.output)
    for case in args.cases:
        found[case] = measure(case, args.model, args.model.parent / "offload", args.rounds)
        print(found[case].line(), flush=True)
    results = [found[case] for case in CASES if case in found]
    record = {"kind": "flexmoe.half-blocks-cpu", "results": [asdict(result) for result in results]}
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(table(results), encoding="utf-8")
    return 0 if all(result.cost <= MOST for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
