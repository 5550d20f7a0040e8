"""Rows of unlike lengths, as attention sees them.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
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
        plans: what a kernel derives from the rows (index tensors on its device), by what it depends on besides.
    """

    q_starts: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor
    plans: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, q_lengths: list[int], contexts: list[int], tables: list[list[int]]) -> Ragged:
        """From plain lists."""
        width = max((len(t) for t in tables), default=0)
        padded = np.zeros((len(tables), max(1, width)), dtype=np.int32)
        for row, table in zip(padded, tables):
            row[: len(table)] = table
        starts = np.concatenate([[0], np.cumsum(q_lengths)]).astype(np.int32)
        return cls(torch.from_numpy(starts), torch.tensor(contexts, dtype=torch.int32), torch.from_numpy(padded))

    @property
    def kv_tokens(self) -> int:
        """Context tokens over all rows."""
        return int(self.contexts.sum())

    @property
    def q_lengths(self) -> np.ndarray:
        """int64 ``[B]``: queries of each row."""
        return np.diff(self.q_starts.numpy()).astype(np.int64)


def placed(descriptions: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The same with every array as an int32 tensor on the device; all of them travel in one copy."""
    arrays = [value for one in descriptions for value in one.values() if isinstance(value, np.ndarray)]
    flat = np.concatenate([np.empty(0, np.int32), *(a.reshape(-1).astype(np.int32) for a in arrays)])
    pieces = iter(torch.from_numpy(flat).to(device).split([a.size for a in arrays]))
    return [
        {
            name: next(pieces).view(value.shape) if isinstance(value, np.ndarray) else value
            for name, value in one.items()
        }
        for one in descriptions
    ]
