"""Rows of unlike lengths, as attention sees them.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch


@dataclass(slots=True)
class Ragged:
    """Which rows an attention call serves; built once per sweep, used by every layer.

    Attributes:
        q_starts: int32 ``[B + 1]``, first query of each row.
        contexts: int32 ``[B]``, tokens of each row in the cache, the run included.
        tables: int32 ``[B, pages]``, page table of each row.
        plans: what kernels derive from the rows, by what it depends on besides.
    """

    q_starts: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor
    plans: dict[Hashable, Planned] = field(default_factory=dict)

    @classmethod
    def of(cls, q_lengths: list[int], contexts: list[int], tables: list[list[int]]) -> Ragged:
        """From plain lists."""
        widths = np.fromiter(map(len, tables), dtype=np.int64, count=len(tables))
        padded = np.zeros((len(tables), max(1, widths.max(initial=0))), dtype=np.int32)
        flat = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=int(widths.sum()))
        padded[np.arange(padded.shape[1]) < widths[:, None]] = flat
        starts = np.concatenate([[0], np.cumsum(q_lengths)]).astype(np.int32)
        return cls(torch.from_numpy(starts), torch.tensor(contexts, dtype=torch.int32), torch.from_numpy(padded))

    def seen_tokens(self, window: int | None = None) -> int:
        """Context tokens that the rows' queries see, over all rows."""
        if window is None:
            return int(self.contexts.sum())
        return int(np.minimum(self.contexts.numpy(), self.q_lengths + window - 1).sum())

    @property
    def q_lengths(self) -> np.ndarray:
        """int64 ``[B]``: queries of each row."""
        return np.diff(self.q_starts.numpy()).astype(np.int64)


@dataclass(slots=True, eq=False)
class Planned:
    """What a kernel derives from rows, once for all layers of a sweep.

    Attributes:
        packed: int32, all index arrays; on the host, until they are wanted on the device or somebody brings them there.
        described: the kernel's calls; an array stands for the next of the ``packed`` integers.
        calls: the same for the kernel, once it has been used.
    """

    packed: torch.Tensor
    described: list[dict[str, Any]]
    calls: list[Any] | None = None

    @classmethod
    def of(cls, described: list[dict[str, Any]]) -> Planned:
        """With the arrays packed."""
        arrays = (value for one in described for value in one.values() if isinstance(value, np.ndarray))
        flat = np.concatenate([np.empty(0, np.int32), *(array.reshape(-1).astype(np.int32) for array in arrays)])
        return cls(torch.from_numpy(flat), described)

    def on_device(self, device: torch.device, call: Callable[..., Any]) -> list[Any]:
        """The calls, each made by ``call`` from its description with the arrays as tensors on the device."""
        if self.calls is None:
            self.packed = self.packed.to(device)
            sizes = [v.size for one in self.described for v in one.values() if isinstance(v, np.ndarray)]
            pieces = iter(self.packed.split(sizes))
            self.calls = [
                call(**{k: next(pieces).view(v.shape) if isinstance(v, np.ndarray) else v for k, v in one.items()})
                for one in self.described
            ]
        return self.calls
