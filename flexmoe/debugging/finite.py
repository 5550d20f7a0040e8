"""Whether the values of tensors are finite, and the error that names the first that are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from flexmoe.errors import DataError
from policies.common.option_names import option

#: What to do where weights are the cause.
DAMAGED = "weights of the checkpoint are probably damaged; compare its files with the original's"


class NonFiniteError(DataError):
    """A tensor of the model holds NaN or an infinity: the sentence names sweep, layer, unit and row."""


def overflow() -> str:
    """What to do where numbers have outgrown float16."""
    other = option("dtype", "bfloat16")
    return f"numbers beyond float16's largest, 65504, have probably come up; run with {other}, or float32"


def is_finite(x: torch.Tensor, *, masked: bool = False) -> bool:
    """Whether all values are; waits for the device.

    Args:
        masked: minus infinity is a mask, and counts as finite.
    """
    # NaN and infinities survive a sum. A sum of finite values may overflow, which the second look clears up.
    return bool(x.sum(dtype=torch.float32).isfinite()) or not bool(_wrong(x, masked).any())


def wrong_rows(x: torch.Tensor, *, masked: bool = False) -> np.ndarray:
    """Places of the rows (of the first dimension) that hold a value which is not finite."""
    found: np.ndarray = _wrong(x, masked).reshape(len(x), -1).any(1).nonzero()[:, 0].cpu().numpy()
    return found


def wrong_weights(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Roles of the tensors of a unit that hold values which are not finite; packed numbers are always finite."""
    return [role for role, w in weights.items() if w.is_floating_point() and not is_finite(w.float())]


def _wrong(x: torch.Tensor, masked: bool) -> torch.Tensor:
    return x.isnan() | (x == torch.inf) if masked else ~x.isfinite()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first values of a run that are not finite.

    Attributes:
        sweep, layer: counted from 0; the layer is -1 for the embedding and the number of layers for the head.
        unit: name of the weight unit that was computed with.
        expert: of the layer; None outside of experts.
        tensor: what it is of the model.
        value: one of the values.
        row: which sequence, and which of its tokens, in words.
        others: further tokens of which the tensor holds such values.
        weights: tensors of the unit that hold such values; None where the unit's weights were not looked at.
        dtype: of the computation.
    """

    sweep: int
    layer: int
    unit: str
    expert: int | None
    tensor: str
    value: float
    row: str
    others: int
    weights: tuple[str, ...] | None
    dtype: torch.dtype

    def sentence(self) -> str:
        """What was found, where, and what to do."""
        expert = "" if self.expert is None else f", expert {self.expert}"
        others = f" and for {self.others} more tokens" if self.others else ""
        return (
            f"{self.tensor} of {self.unit} (layer {self.layer}{expert}) is not finite in sweep {self.sweep}: it holds "
            f"{self.value} for {self.row}{others}; {self._cause()}"
        )

    def _cause(self) -> str:
        if self.weights:
            found = f"the unit's weights hold such values too ({', '.join(self.weights)})"
            if self.dtype == torch.float16:  # in which larger ones become infinite
                return f"{found}: {overflow()}; where they are the same there, {DAMAGED}"
            return f"{found}: {DAMAGED}"
        if self.dtype == torch.float16:
            return f"the unit's weights are finite: {overflow()}" if self.weights is not None else overflow()
        if self.weights is None:
            return "what it was computed from was finite"
        return "the unit's weights and what it was computed from were finite, so numbers outgrew the dtype"
