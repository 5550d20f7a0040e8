"""The range of a tensor's values, added up piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: Values that are looked at together: their copy in float64 is small beside what a run holds.
_CHUNK = 1 << 20


@dataclass(slots=True)
class Range:
    """Range of values that came in several tensors; those that are not finite are counted and otherwise left out.

    Attributes:
        values, finite: how many there are, and how many of them are finite.
        least, most: of the finite ones.
        square_sum: of the finite ones.
    """

    values: int = 0
    finite: int = 0
    least: float = math.inf
    most: float = -math.inf
    square_sum: float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """The values of one more tensor, of any shape; waits for the device."""
        for piece in x.detach().reshape(-1).split(_CHUNK):
            if piece.numel():
                self._add(piece.float())

    def _add(self, x: torch.Tensor) -> None:
        self.values += x.numel()
        least, most = torch.aminmax(x)
        if not math.isfinite(float(least)) or not math.isfinite(float(most)):
            x = x[x.isfinite()]
            if not x.numel():
                return
            least, most = torch.aminmax(x)
        self.finite += x.numel()
        self.least, self.most = min(self.least, float(least)), max(self.most, float(most))
        self.square_sum += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2

    def record(self) -> dict[str, int | float | None]:
        """As `ranges.jsonl` has it; null where no value is finite."""
        if not self.finite:
            return {"values": self.values, "finite": 0, **dict.fromkeys(("min", "max", "absmax", "rms"))}
        return {
            "values": self.values,
            "finite": self.finite,
            "min": self.least,
            "max": self.most,
            "absmax": max(-self.least, self.most),
            "rms": math.sqrt(self.square_sum / self.finite),
        }
