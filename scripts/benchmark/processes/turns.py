"""Jobs sweep by sweep, in turns with what they are compared with: the same job with everything resident, the disk, products.

A shared machine changes its speed by half within seconds. What is measured a second apart was measured on the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flexmoe import LLM, SamplingParams
from scripts.support.reads import bytes_read, read_when_quiet


def in_turns(
    streamed: LLM, resident: LLM, prompts: Sequence, max_tokens: Sequence[int], look: Callable[[], float]
) -> dict:
    """Run a job on both models.

    Before a sweep is timed the reads ahead of the streamed model have ended: their bytes are not in `read_bytes`, and no read
    disturbs a resident sweep.

    Args:
        streamed, resident: models that hold the whole job in flight.
        look: the disk's bytes/s, now; called before the first sweep and after each.

    Returns:
        dict: of each sweep `streamed_s`, `resident_s`, the `read_bytes` of its streamed seconds, and the `disk_rates` around it.

    Raises:
        RuntimeError: the models did not make the same sweeps.
    """
    for llm in (streamed, resident):
        _submit(llm, prompts, max_tokens)
    streamed_s, resident_s, read_bytes, rates = [], [], [], [look()]
    while streamed.engine.unfinished:
        read = read_when_quiet(streamed)
        streamed_s.append(_step_s(streamed))
        read_bytes.append(bytes_read(streamed) - read)
        read_when_quiet(streamed)
        resident_s.append(_step_s(resident))
        rates.append(look())
    if resident.engine.unfinished:
        raise RuntimeError(f"after {len(streamed_s)} sweeps rows are left of the resident model alone")
    around = [(before + after) / 2 for before, after in zip(rates, rates[1:])]
    return {"streamed_s": streamed_s, "resident_s": resident_s, "read_bytes": read_bytes, "disk_rates": around}


def with_products(
    llm: LLM, prompts: Sequence, max_tokens: Sequence[int], rate: Callable[[int], float]
) -> list[tuple[int, float, float]]:
    """Run a job, and behind each sweep time the products of an expert by themselves.

    Args:
        llm: holds the whole job in flight.
        rate: FLOP/s when a sweep has so many tokens.

    Returns:
        list[tuple]: of each sweep its tokens, its seconds, and the mean of the rates before and behind it.
    """
    _submit(llm, prompts, max_tokens)
    found: list[tuple[int, float, float]] = []
    last = 0, 0.0
    while llm.engine.unfinished:
        seconds = _step_s(llm)
        tokens = llm.metrics()["tokens_per_sweep"][-1]
        now = rate(tokens)
        found.append((tokens, seconds, (now + last[1]) / 2 if last[0] == tokens else now))
        last = tokens, now
    return found


def _submit(llm: LLM, prompts: Sequence, max_tokens: Sequence[int]) -> None:
    params = [SamplingParams(max_tokens=most, ignore_eos=True) for most in max_tokens]
    for request in llm.in_waiting_order(prompts, params):
        llm.engine.submit(request)


def _step_s(llm: LLM) -> float:
    begin = time.perf_counter()
    for output in llm.engine.step():
        if output.error:
            raise RuntimeError(output.error)
    return time.perf_counter() - begin
