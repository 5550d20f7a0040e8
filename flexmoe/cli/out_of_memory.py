"""Memory that runs out in the middle of a run, as a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from flexmoe.errors import InfeasibleError

#: torch's allocator for the CPU has no error class of its own.
_CPU_MESSAGE = "can't allocate memory"


@contextlib.contextmanager
def as_infeasible() -> Iterator[None]:
    """Turns an allocation that failed into an `InfeasibleError`.

    Raises:
        InfeasibleError: the device or the host has no memory left.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _infeasible(error) from error
    except RuntimeError as error:
        if _CPU_MESSAGE not in str(error):
            raise
        raise _infeasible(error) from error


def _infeasible(error: Exception) -> InfeasibleError:
    told = (str(error).strip().splitlines() or ["no memory"])[0]
    return InfeasibleError(
        f"memory ran out ({told}); what a job has done is kept: run the same command with a smaller --gpu-batch-size, "
        "--prefill-tokens or --gpu-mem, and it goes on from there"
    )
