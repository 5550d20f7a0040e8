"""The report as a picture: memory by tier, and tokens/s against the rows in flight and against latency."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from cost_model.cli.block_size_curve import Point, curve, wall
from cost_model.cli.report import Report
from cost_model.timing.evaluate import Prediction
from policies.common.errors import StorageError, UsageError
from policies.common.memory_units import GIB
from policies.policy import Policy

SUFFIXES = (".png", ".svg", ".pdf")
_SMALL_SHARE = 0.03
_GREY, _COLOURS = "0.6", ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")


def check_plot(path: Path, flag: str = "--plot") -> None:
    """Refuses a plot that could not be written, before anything is computed.

    Args:
        flag: that asks for it.

    Raises:
        UsageError: matplotlib is not installed, or the file's name asks for an unknown format.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{flag} {path} has no known format; end its name in one of {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{flag} needs matplotlib, which is not installed; pip install 'flexmoe[plot]' brings it")


def draw(report: Report, predict: Callable[[Policy], Prediction], path: Path) -> None:
    """Writes the picture of a report.

    Args:
        predict: judges a policy on the report's machine for its job, with memory ignored.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    points = curve(report.policy, predict)
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    memory, rows, latency = figure.subplots(1, 3)
    _memory(memory, report)
    _rows(rows, points, report.policy, wall(report.policy, predict))
    _latency(latency, points, report.policy)
    figure.suptitle(f"{report.arch.name} on {report.hardware.gpu.name} ({report.origin})", fontsize=11)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise StorageError(f"the plot could not be written to {path}: {error.strerror or error}.") from error


def _memory(axes, report: Report) -> None:
    """A stack per tier, as parts of its limit: tiers differ by two orders of magnitude."""
    parts = report.prediction.memory.parts
    limits = {name: limit for name, limit in report.prediction.budgets.items() if limit is not None}
    colours: dict[str, str] = {}
    names = []
    for place, (name, limit) in enumerate(limits.items()):
        # Tiers that share a memory stand on one another.
        tiers = name.split("+")
        items = [(f"{tier} {item}" if len(tiers) > 1 else item, n) for tier in tiers for item, n in parts[tier].items()]
        used = sum(size for _, size in items)
        names.append(f"{name}\n{used / GIB:.1f} of {limit / GIB:.0f} GiB")
        bottom = 0.0
        for item, size in sorted(items, key=lambda each: -each[1]):
            share = 100 * size / limit if limit else 0.0
            item = item if share >= 100 * _SMALL_SHARE else "other"
            known = item in colours
            colour = colours.setdefault(item, _GREY if item == "other" else _COLOURS[len(colours) % len(_COLOURS)])
            axes.bar(place, share, 0.6, bottom=bottom, color=colour, label=None if known else item)
            bottom += share
    axes.axhline(100, color="red", linestyle="--", linewidth=1, label="limit")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, max(axes.get_ylim()[1], 105) * 1.3)  # room for the legend above the stacks
    axes.set_ylabel("peak memory (% of the tier)")
    axes.set_title("Memory")
    axes.legend(fontsize=8, ncols=3, loc="upper center")


def _rows(axes, points: list[Point], policy: Policy, most: int | None) -> None:
    inside, beyond = _split(points)
    axes.plot([p.rows for p in inside], [p.prediction.tokens_per_s for p in inside], color="C0", label="fits")
    if beyond:
        axes.plot(
            [p.rows for p in beyond],
            [p.prediction.tokens_per_s for p in beyond],
            color="C0",
            linestyle="--",
            label="does not fit",
        )
    if most is not None:
        axes.axvline(most, color="red", linestyle="--", linewidth=1, label=f"memory wall, {most} rows")
    _chosen(axes, policy.block_size, points, policy)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("rows in flight")
    axes.set_ylabel("generated tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_title("More rows, same placement")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _latency(axes, points: list[Point], policy: Policy) -> None:
    inside, beyond = _split(points)
    for part, style, label in ((inside, "-", "fits"), (beyond, "--", "does not fit")):
        if part:
            seconds, rates = [p.prediction.row_s / 60 for p in part], [p.prediction.tokens_per_s for p in part]
            axes.plot(seconds, rates, color="C0", linestyle=style, label=label)
    chosen = next(p for p in points if p.rows == policy.block_size)
    _chosen(axes, chosen.prediction.row_s / 60, points, policy)
    axes.set_xlabel("time of a row in flight (min)")
    axes.set_ylabel("generated tokens/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title("Throughput against latency")
    axes.grid(alpha=0.3)
    axes.set_xlim(right=1.05 * axes.get_xlim()[1])
    axes.legend(fontsize=8, loc="best")


def _chosen(axes, x: float, points: list[Point], policy: Policy) -> None:
    rate = next(p for p in points if p.rows == policy.block_size).prediction.tokens_per_s
    axes.plot(
        [x], [rate], "o", color="C1", zorder=5, label=f"this policy, {policy.block_size} rows, {rate:.3g} tokens/s"
    )


def _split(points: list[Point]) -> tuple[list[Point], list[Point]]:
    """The points that fit, and the rest with the last that fits before them, so that the lines meet."""
    inside = [p for p in points if p.fits]
    beyond = [p for p in points if not p.fits]
    return inside, [*inside[-1:], *beyond] if beyond else []
