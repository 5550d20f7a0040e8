"""What most of a run's time goes to, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.common.option_names import option

#: A lane that is busy for less of the time than this decides nothing.
_DECIDES = 0.5
#: What each lane does, and what would shorten it; ``{}`` are options.
_LANES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "disk_read": (
        "reading from the disk",
        "a faster drive, or more {} or {} to keep weights in,",
        ("cpu_mem", "gpu_mem"),
    ),
    "disk_write": ("writing to the disk", "a faster drive, or more {} to keep KV cache in,", ("cpu_mem",)),
    "h2d": ("copying to the GPU tier", "more {}, or a faster link,", ("gpu_mem",)),
    "d2h": ("copying from the GPU tier", "more {}, or a faster link,", ("gpu_mem",)),
    "gpu": ("computing", "a faster device, or more memory for more rows at once,", ()),
    "cpu": ("attention on the CPU", "more {} to keep KV cache in, or faster host memory,", ("gpu_mem",)),
}


def bottleneck(metrics: Mapping[str, Any]) -> str:
    """The lane that was busy longest, and what would help most.

    Args:
        metrics: ``wall_s``, and ``lanes`` with the ``busy_s`` of each.
    """
    if not metrics["lanes"]:
        return "none, as nothing ran"
    wall_s = max(metrics["wall_s"], 1e-9)
    lane, busy_s = max(((lane, t["busy_s"]) for lane, t in metrics["lanes"].items()), key=lambda each: each[1])
    share = min(1.0, busy_s / wall_s)
    what, remedy, options = _LANES[lane]
    if share < _DECIDES:
        return (
            f"none of the lanes ({what} was busy longest, {100 * share:.0f} % of the time), so they wait for "
            "each other; more rows at once would help most"
        )
    return f"{what}, busy {100 * share:.0f} % of the time; {remedy.format(*map(option, options))} would help most"
