"""Seconds of masks by themselves, and tokens/s of a model with and without them."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flexmoe.llm import LLM
from flexmoe.params import SamplingParams
from policies.policy import Policy, Workload
from scripts.benchmark.record import Figure
from scripts.structured.libraries import LIBRARIES, Library
from scripts.structured.schemas import SCHEMAS

#: One that no row comes to the end of.
ENDLESS = {"type": "array", "items": SCHEMAS[0], "minItems": 1000}
MOST_SLOWER = 0.9


def masks(tokenizer: Any, rows: int, steps: int) -> tuple[list[Figure], dict]:
    """Each library makes the masks of so many rows one by one, for tokens drawn from these masks."""
    raw: dict[str, dict[str, list[float]]] = {}
    for kind in LIBRARIES:
        start = time.perf_counter()
        library: Library = kind(tokenizer)
        raw[library.name] = _masks(library, tokenizer.eos_token_id, rows, steps) | {
            "vocabulary_s": [time.perf_counter() - start]
        }
    first, second = (kind.name for kind in LIBRARIES)
    figures = []
    for name, unit, what in (
        ("mask_s", 1e6, "µs for a mask, mean"),
        ("worst_s", 1e6, "µs for the slowest mask"),
        ("compile_s", 1e3, "ms to compile a schema, median of those here"),
    ):
        ours, theirs = (raw[each][name][0] for each in (first, second))
        figures.append(
            Figure(
                what=what,
                value=f"{ours * unit:.1f} by {first}",
                beside=f"{theirs * unit:.1f} by {second}",
                ratio=ours / theirs,
            )
        )
    return figures, raw


def _masks(library: Library, end: int, rows: int, steps: int) -> dict[str, list[float]]:
    compiled_s = []
    for schema in (*SCHEMAS, ENDLESS):
        start = time.perf_counter()
        library.matcher(schema).mask()
        compiled_s.append(time.perf_counter() - start)
    matchers, rng, taken_s = [library.matcher(ENDLESS) for _ in range(rows)], np.random.default_rng(0), []
    for _ in range(steps):
        for matcher in matchers:
            start = time.perf_counter()
            mask = matcher.mask()
            taken_s.append(time.perf_counter() - start)
            permitted = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            start = time.perf_counter()
            matcher.take(int(rng.choice(permitted[permitted != end])))
            taken_s[-1] += time.perf_counter() - start
    return {"mask_s": [float(np.mean(taken_s))], "worst_s": [max(taken_s)], "compile_s": [median(compiled_s)]}


def cost(model: Path, rows: int, new_tokens: int, rounds: int) -> tuple[list[Figure], dict]:
    """So many rows in flight at temperature 1, in turn with and without a schema that none of them comes to the end of."""
    params = {
        True: SamplingParams(
            max_tokens=new_tokens, temperature=1.0, ignore_eos=True, structured_outputs={"json": ENDLESS}
        ),
        False: SamplingParams(max_tokens=new_tokens, temperature=1.0, ignore_eos=True),
    }
    policy = Policy.from_percent(
        (100, 0, 100, 0, 100, 0), gpu_batch_size=rows, num_gpu_batches=1, prompt_len=8, gen_len=new_tokens
    )
    workload = Workload(prompt_len=8, gen_len=new_tokens)
    prompts = [[(7 * row + at) % 1000 + 100 for at in range(8)] for row in range(rows)]
    raw: dict[str, list[float]] = {"with": [], "without": []}
    with contextlib.closing(
        LLM(str(model), policy=policy, workload=workload, device="cpu", longest_row=8 + new_tokens)
    ) as llm:
        for structured in (True, False):
            llm.generate(prompts[:2], params[structured], use_tqdm=False)
        for at in range(rounds):
            for structured in (True, False) if at % 2 else (False, True):
                raw["with" if structured else "without"].extend(_decode_s(llm, prompts, params[structured]))
    ours, plain = median(raw["with"]), median(raw["without"])
    return [
        Figure(
            what=f"decoding, {rows} rows in flight with a JSON Schema each; the median sweep of {rounds} runs",
            value=f"{rows / ours:.1f} tokens/s",
            beside=f"{rows / plain:.1f} without",
            ratio=plain / ours,
            target=MOST_SLOWER,
        )
    ], raw


def _decode_s(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[float]:
    """Seconds of the sweeps after the first one, in which the prompts are computed."""
    before = len(llm.metrics()["sweep_s"])
    outputs = llm.generate(prompts, params, use_tqdm=False)
    if any(len(output.outputs[0].token_ids) != params.max_tokens for output in outputs):
        raise ValueError("a row ended early, so the runs do not compare")
    return [float(each) for each in llm.metrics()["sweep_s"][before + 1 :]]
