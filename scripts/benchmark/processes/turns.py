"""A job with its experts on disk and the same job with everything resident, sweep by sweep in turns, and looks at the disk.

A shared machine changes its speed by half within seconds. What is measured a second apart was measured on the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flexmoe import LLM, SamplingParams

_QUIET_S = 0.03  # without a finished read: none is under way


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
    params = [SamplingParams(max_tokens=most, ignore_eos=True) for most in max_tokens]
    for llm in (streamed, resident):
        for request in llm.in_waiting_order(prompts, params):
            llm.engine.submit(request)
    streamed_s, resident_s, read_bytes, rates = [], [], [], [look()]
    while streamed.engine.unfinished:
        read = _when_quiet(streamed)
        streamed_s.append(_step_s(streamed))
        read_bytes.append(_read_bytes(streamed) - read)
        _when_quiet(streamed)
        resident_s.append(_step_s(resident))
        rates.append(look())
    if resident.engine.unfinished:
        raise RuntimeError(f"after {len(streamed_s)} sweeps rows are left of the resident model alone")
    around = [(before + after) / 2 for before, after in zip(rates, rates[1:])]
    return {"streamed_s": streamed_s, "resident_s": resident_s, "read_bytes": read_bytes, "disk_rates": around}


def _step_s(llm: LLM) -> float:
    begin = time.perf_counter()
    for output in llm.engine.step():
        if output.error:
            raise RuntimeError(output.error)
    return time.perf_counter() - begin


def _when_quiet(llm: LLM) -> int:
    """Bytes read so far, once no more come."""
    read = -1
    while read != (read := _read_bytes(llm)):
        time.sleep(_QUIET_S)
    return read


def _read_bytes(llm: LLM) -> int:
    totals = llm.engine.recorder.totals()
    return totals["disk_read"].nbytes if "disk_read" in totals else 0
