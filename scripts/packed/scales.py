"""Scales of packed weights: the error with ours beside that with others, on drawn weights and on those of a real model.

    python -m scripts.packed.scales --out benchmarks/quality.json      # seconds, and a download of 98 MB

The others: the largest weight at the end of the range (what compressed-tensors takes by default); the positive scale with the
smallest squared error of a fine grid; zero points, integers as compressed-tensors has them, of a fine grid too; HQQ's, which
refines zero points that are fractions and so are none of compressed-tensors' (arXiv 2309.15531 has its half-quadratic step for
p < 1). Errors are root mean squares relative to the weights. Real weights are rows of SmolLM2-135M-Instruct, which were 4-bit
numbers with a fractional offset before: that favours HQQ's in groups of 32.

Legend: R outputs, C inputs, G groups of inputs, n weights that share a scale.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cost_model.model.packed_format import PackedFormat
from flexmoe.formats.packed_matrix import PackedMatrix
from flexmoe.formats.rounding import packed_fields
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.checkpoints.gguf_llama import read_gguf
from scripts.checkpoints.smollm2 import PACKAGE, smollm2_gguf

GROUPS = (32, 64, 128)
_ROWS, _COLUMNS = 512, 1536
_REAL = "model.layers.10.mlp.down_proj.weight"
#: Parts of the range that clips nothing.
_GRID = tuple(1.1 - 0.02 * step for step in range(35))
_STEPS, _POWER = 20, 0.7
#: Of HQQ: the weight of its quadratic term, and its growth with each step.
_BETA, _GROWTH = 10.0, 1.01


def main(argv: list[str]) -> int:
    """Compare; the exit code is 1 where ours is worse than what compressed-tensors can hold without zero points."""
    args = _parser().parse_args(argv)
    begin = time.perf_counter()
    figures = [figure for what, weights_RC in _weights().items() for figure in compare(what, weights_RC)]
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {"machine": machine(), "versions": versions(), "model": f"drawn weights, and {_REAL} of {PACKAGE}"}
        about["command"] = shlex.join(["python", "-m", "scripts.packed.scales", *argv])
        Record(args.out, about).add("scales", figures, {}, time.perf_counter() - begin)
    return 1 if any(figure.met is False for figure in figures) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.packed.scales", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON record; a table is written beside it")
    return parser


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal, *squares = torch.randn(5, _ROWS, _COLUMNS, generator=generator)
    tails = normal / torch.stack([each.square() for each in squares]).mean(0).sqrt()
    real = read_gguf(smollm2_gguf()).weights[_REAL][:_ROWS].bfloat16().float()
    return {"normal": normal, "Student's t of 4 degrees": tails, "SmolLM2": real}


def compare(what: str, weights_RC: torch.Tensor) -> list[Figure]:
    """A line for each group size, of int4; its ratio is ours against the best of others without zero points."""
    figures = []
    for group in GROUPS:
        groups_RGn = weights_RC.unflatten(1, (-1, group))
        errors = {name: _relative(unpack(groups_RGn), groups_RGn) for name, unpack in OTHERS.items()}
        own = _relative(_ours(weights_RC, group).unflatten(1, (-1, group)), groups_RGn)
        figures.append(
            Figure(
                what=f"error of int4, {what}, groups of {group}",
                value=f"{own:.4f}",
                beside=", ".join(f"{name} {error:.4f}" for name, error in errors.items()),
                ratio=own / errors["positive"],
                target=1.0,
                at_most=True,
            )
        )
    return figures


def _relative(unpacked: torch.Tensor, weights: torch.Tensor) -> float:
    return float((unpacked - weights).norm() / weights.norm())


def _ours(weights_RC: torch.Tensor, group: int) -> torch.Tensor:
    packed = PackedFormat(method="compressed-tensors", codec="integer", bits=4, columns=group)
    fields = packed_fields(packed, weights_RC, torch.bfloat16)
    return PackedMatrix(packed, fields, (len(weights_RC), weights_RC.shape[1])).unpack(torch.empty_like(weights_RC))


def largest(groups_RGn: torch.Tensor) -> torch.Tensor:
    """The largest weight is the largest number."""
    return _symmetric(groups_RGn, groups_RGn.abs().amax(-1, keepdim=True) / 7)


def positive(groups_RGn: torch.Tensor) -> torch.Tensor:
    """The best positive scale."""
    plain = groups_RGn.abs().amax(-1, keepdim=True) / 7
    return _best(groups_RGn, lambda part: _symmetric(groups_RGn, plain * part))


def zero_points(groups_RGn: torch.Tensor) -> torch.Tensor:
    """The best of scales with zero points that are integers; the range that is clipped keeps its proportions."""
    low, high = (edge.clamp(max=0) if at == 0 else edge.clamp(min=0) for at, edge in enumerate(_edges(groups_RGn)))

    def unpacked(part: float) -> torch.Tensor:
        scale = _stored((high - low) * part / 15)
        zero = (-low * part / scale).round().clamp(0, 15)
        return ((groups_RGn / scale + zero).round().clamp(0, 15) - zero) * scale

    return _best(groups_RGn, unpacked)


def hqq(groups_RGn: torch.Tensor) -> torch.Tensor:
    """Zero points that are fractions, refined in turns with a sparse error."""
    low, high = _edges(groups_RGn)
    scale, beta = (high - low) / 15, _BETA
    zero = -low / scale
    for _ in range(_STEPS):
        numbers = (groups_RGn / scale + zero).round().clamp(0, 15)
        error = groups_RGn - (numbers - zero) * scale
        kept = (error.abs() - error.abs().clamp(min=1e-12).pow(_POWER - 1) / beta).clamp(min=0)
        zero = (numbers - (groups_RGn - error.sign() * kept) / scale).mean(-1, keepdim=True)
        beta *= _GROWTH
    return ((groups_RGn / scale + zero).round().clamp(0, 15) - zero) * scale


def _edges(groups_RGn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return groups_RGn.amin(-1, keepdim=True), groups_RGn.amax(-1, keepdim=True)


def _symmetric(groups_RGn: torch.Tensor, scale_RG1: torch.Tensor) -> torch.Tensor:
    scale_RG1 = _stored(scale_RG1)
    return (groups_RGn / scale_RG1).round().clamp(-8, 7) * scale_RG1


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.bfloat16().float().clamp(min=1e-30)


def _best(groups_RGn: torch.Tensor, unpack: Callable[[float], torch.Tensor]) -> torch.Tensor:
    """Of each group the values with the smallest squared error."""
    best = unpack(_GRID[0])
    for part in _GRID[1:]:
        found = unpack(part)
        better = ((found - groups_RGn).square() - (best - groups_RGn).square()).sum(-1, keepdim=True) < 0
        best = torch.where(better, found, best)
    return best


OTHERS = {"largest weight": largest, "positive": positive, "zero points": zero_points, "HQQ": hqq}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
