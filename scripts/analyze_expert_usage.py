"""How evenly a model's experts are used: tables, a heat map, and the file of frequencies for planner and expert cache.

    python -m flexmoe.run … --router-stats stats.json
    python -m scripts.analyze_expert_usage stats.json [more.json …] [--heat-map usage.png] [--usage usage.json] [--top 3]

Files of one model are added up: the shards of a job, or its starts. Needs neither torch nor the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cost_model.cli.plot import check_plot
from cost_model.routing.on_demand import touched
from cost_model.routing.router_stats import RouterStats
from policies.common.command_line import Parser, count, guarded, say
from policies.common.errors import StorageError, UsageError

#: Parts of a layer's choices of which the table says how few experts get them.
CARRIED = (0.5, 0.8, 0.95)
#: Tokens of a sweep for which the table says how many experts they reach.
TOKENS = (1, 4, 16, 64)
_BALANCE = """\
balance of each layer: tokens of the busiest expert over the mean (1 is even); coefficient of variation and variance of the
tokens per expert; entropy of the choices in bits, and in % of that of even use; experts that no token chose; how few experts
get 50, 80 and 95 % of the choices; the experts chosen most, with the % of tokens that chose them; the pairs chosen together
most, with the % of tokens, and how many times as often as chance would, given how often each is chosen"""
_TOUCHED = """\
experts of a layer that so many tokens are expected to reach, by the measured frequencies (the tokens' choices taken as
independent of each other), and under uniform routing"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return guarded("analyze_expert_usage", lambda: _run(_arguments(argv)))


def _run(args: argparse.Namespace) -> int:
    _check(args)
    stats = RouterStats.sum([RouterStats.load(path) for path in args.stats])
    routed, model = len(stats.layers), stats.model
    say(
        f"{model.get('model_type', 'model')}: {routed} layers of {model['num_experts']} experts, {model['top_k']} of them for "
        f"each token; {stats.tokens} tokens"
    )
    say("", _BALANCE, *balance_table(stats, args.top), "", _TOUCHED, *touched_table(stats))
    if args.heat_map:
        draw(stats, args.heat_map)
        say("", f"heat map: {args.heat_map}")
    if args.usage:
        stats.usage().save(args.usage)
        say("", f"expert usage: {args.usage}")
    return 0


def balance_table(stats: RouterStats, top: int) -> list[str]:
    """A line for each layer that routes, below a heading.

    Args:
        top: experts and pairs to name.
    """
    head = [
        "layer",
        "max/mean",
        "cv",
        "variance",
        "entropy",
        "of even",
        "unused",
        "/".join(f"{100 * c:.0f}%" for c in CARRIED),
    ]
    rows = [[*head, "chosen most", "chosen together most"]]
    for layer in stats.layers:
        b, counts_E = stats.balance(layer), stats.counts[layer]
        numbers = [
            f"{b.max_over_mean:.2f}",
            f"{b.variation:.2f}",
            f"{b.variance:.4g}",
            f"{b.entropy_bits:.2f}",
            f"{100 * b.relative_entropy:.1f}%",
            str(len(b.unused_experts)),
        ]
        few = "/".join(str(carriers(counts_E, part)) for part in CARRIED)
        hottest = np.argsort(-counts_E, kind="stable")[:top].tolist()
        named = " ".join(f"{e}:{100 * counts_E[e] / stats.tokens:.1f}%" for e in hottest)
        together = " ".join(_pair_text(stats, layer, i, j) for i, j in pairs(stats.coactivation[layer], top))
        rows.append([str(layer), *numbers, few, named, together or "-"])
    return _aligned(rows, left=2)


def carriers(counts_E: np.ndarray, part: float) -> int:
    """The fewest experts that get such a part of the choices."""
    gathered = np.cumsum(np.sort(counts_E)[::-1])
    return int(np.searchsorted(gathered, part * gathered[-1])) + 1


def pairs(together_EE: np.ndarray, top: int) -> list[tuple[int, int]]:
    """The pairs of experts that most tokens chose together, at most ``top``; none that no token chose."""
    above_EE = np.triu(together_EE, 1)
    best = np.argsort(-above_EE, axis=None, kind="stable")[:top].tolist()
    return [divmod(place, len(above_EE)) for place in best if above_EE.flat[place]]


def _pair_text(stats: RouterStats, layer: int, i: int, j: int) -> str:
    counts_E, both = stats.counts[layer], int(stats.coactivation[layer, i, j])
    k, experts = stats.model["top_k"], stats.model["num_experts"]
    # A token's choices differ from each other: with even use, a pair has k (k - 1) / (E (E - 1)) of the tokens.
    by_chance = int(counts_E[i]) * int(counts_E[j]) / stats.tokens * (k - 1) * experts / (k * (experts - 1))
    times = both / by_chance
    return f"{i}+{j}:{100 * both / stats.tokens:.1f}%,{times:.2f}x"


def touched_table(stats: RouterStats) -> list[str]:
    """Expected experts that some tokens reach, of each layer, of the mean layer and under uniform routing."""
    routed, even = list(stats.layers), stats.model["top_k"] / stats.model["num_experts"]
    shares_LE = stats.usage().shares[routed]
    measured_LT = np.stack([touched(shares_LE, n).sum(axis=1) for n in TOKENS], axis=1)
    uniform_T = [stats.model["num_experts"] * float(touched(np.array(even), n)) for n in TOKENS]
    rows = [["layer", *(f"{n} token{'s'[: n > 1]}" for n in TOKENS)]]
    named = [*zip(routed, measured_LT), ("mean", measured_LT.mean(axis=0)), ("uniform", uniform_T)]
    return _aligned(rows + [[str(name), *(f"{value:.1f}" for value in values)] for name, values in named], left=0)


def _aligned(rows: list[list[str]], *, left: int) -> list[str]:
    """Columns to the right, the last ``left`` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    last = len(widths) - left
    return [_line(row, widths, last) for row in rows]


def _line(row: Iterable[str], widths: list[int], last: int) -> str:
    cells = (c.rjust(w) if at < last else c.ljust(w) for at, (c, w) in enumerate(zip(row, widths)))
    return "  ".join(cells).rstrip()


def draw(stats: RouterStats, path: Path) -> None:
    """Draws tokens of each expert over the mean, layer by layer; layers that do not route are empty.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    counts_LE = stats.counts.astype(float)
    mean_L1 = counts_LE.mean(axis=1, keepdims=True)
    load_LE = np.divide(counts_LE, mean_L1, out=np.full_like(counts_LE, np.nan), where=mean_L1 > 0)
    layers, experts = load_LE.shape
    figure = Figure(figsize=(min(24, 4 + 0.16 * experts), min(24, 2.5 + 0.16 * layers)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.8")
    image = axes.imshow(load_LE, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{stats.tokens} tokens, top-{stats.model['top_k']}", fontsize=11)
    figure.colorbar(image, ax=axes, label="tokens of the expert / mean of the layer (1 is even)")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise StorageError(f"the heat map could not be written to {path}: {error.strerror or error}.") from error


def _check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read.

    Raises:
        UsageError: an output would replace an input, or the picture cannot be drawn.
    """
    if args.heat_map:
        check_plot(args.heat_map, "--heat-map")
    outputs = [os.path.realpath(path) for path in (args.heat_map, args.usage) if path]
    inputs = [os.path.realpath(path) for path in args.stats]
    if len({*outputs, *inputs}) < len(outputs) + len(inputs):
        raise UsageError(
            "a file is given twice; each of the statistics counts once, and an output replaces none of them"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(
        prog="python -m scripts.analyze_expert_usage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("stats", nargs="+", type=Path, metavar="STATS.json", help="files of --router-stats, of one model")
    p.add_argument(
        "--heat-map", type=Path, metavar="FILE", help="draw layer by expert (.png, .svg, .pdf; needs matplotlib)"
    )
    p.add_argument("--usage", type=Path, metavar="FILE", help="write how often each expert was chosen, as JSON")
    p.add_argument("--top", type=count, default=3, help="experts and pairs to name for each layer (default 3)")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
