"""Which experts the routers choose, counted while the model runs.

The tokens of each expert are known to the host anyway, so they are always counted. Which experts are chosen together is
counted on the compute device, where asked for; nothing here waits for the device before somebody reads it.

Legend: T tokens, L layers, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cost_model.model.arch import ModelArch
from cost_model.routing.router_stats import Balance, RouterStats
from flexmoe.errors import UsageError
from policies.common.checks import check_count

#: Of the one-hot rows of a chunk of tokens. Such a chunk is far below the 2^24 tokens up to which float32 counts exactly.
_CHUNK_BYTES = 1 << 20


def coactivation_bytes(arch: ModelArch) -> int:
    """Memory on the compute device that counting co-activation takes: the totals, and what a chunk of tokens needs."""
    layer = 8 * arch.num_experts**2
    return (arch.num_layers - len(arch.dense_layers)) * layer + 2 * layer + _CHUNK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStats:
    """Routing of one layer since the model was loaded.

    Args:
        layer: its number.
        tokens: tokens routed: every one that was computed, those that a restart computed again included.
        counts: int64 ``[E]`` on the host, tokens that chose each expert; they add up to ``tokens`` · K.
        balance: how evenly: `max_over_mean`, `variance`, `variation`, `entropy_bits`, `relative_entropy`,
            `unused_experts`; see `cost_model.routing.router_stats.Balance`.
        coactivation: int64 ``[E, E]`` on the host, tokens that chose both experts: symmetric, with ``counts`` on the
            diagonal; None where the model was loaded without ``router_stats=True``.
    """

    layer: int
    tokens: int
    counts: torch.Tensor
    balance: Balance
    coactivation: torch.Tensor | None


class RouterCounter:
    """Counts the choices of all layers that route.

    Args:
        arch: the shape.
        device: the compute device.
        coactivation: count which experts are chosen together too.
    """

    def __init__(self, arch: ModelArch, device: torch.device, *, coactivation: bool):
        self._arch = arch
        self._counts_LE = np.zeros((arch.num_layers, arch.num_experts), dtype=np.int64)
        routed = [layer for layer in range(arch.num_layers) if not arch.is_dense(layer)]
        self._together: dict[int, torch.Tensor] = {}
        if coactivation:
            size = (len(routed), arch.num_experts, arch.num_experts)
            self._together = dict(zip(routed, torch.zeros(size, dtype=torch.int64, device=device)))

    def add(self, layer: int, ids_TK: torch.Tensor, tokens_of_expert: Sequence[int]) -> None:
        """Count a sweep's choices in a layer.

        Args:
            ids_TK: chosen experts, on the compute device.
            tokens_of_expert: how many tokens chose each expert.
        """
        self._counts_LE[layer] += tokens_of_expert
        if layer in self._together:
            chunk = max(1, _CHUNK_BYTES // (4 * self._arch.num_experts))
            for first in range(0, len(ids_TK), chunk):
                ids_nK = ids_TK[first : first + chunk]
                chosen_nE = torch.zeros(len(ids_nK), self._arch.num_experts, device=ids_nK.device).scatter_(
                    1, ids_nK, 1.0
                )
                self._together[layer] += (chosen_nE.T @ chosen_nE).to(torch.int64)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been routed yet."""
        return not self._counts_LE.any()

    def layer(self, layer: int) -> LayerStats:
        """What has been counted in a layer; where co-activation is counted, waits for the device.

        Raises:
            UsageError: there is no such layer, it is dense, or it has routed nothing yet.
        """
        arch = self._arch
        if check_count("layer", layer, 0) >= arch.num_layers:
            raise UsageError(f"layer is {layer}; the model has layers 0 to {arch.num_layers - 1}")
        if arch.is_dense(layer):
            raise UsageError(f"layer {layer} is dense: it has one MLP for all tokens and no router; take another layer")
        counts_E = self._counts_LE[layer].copy()
        if not counts_E.any():
            raise UsageError(f"layer {layer} has routed no token yet; generate something first")
        return LayerStats(
            layer=int(layer),
            tokens=int(counts_E.sum()) // arch.top_k,
            counts=torch.from_numpy(counts_E),
            balance=Balance.of(counts_E),
            coactivation=self._together[layer].cpu().clone() if layer in self._together else None,
        )

    def stats(self) -> RouterStats:
        """What has been counted, as `--router-stats` writes it; waits for the device.

        Raises:
            UsageError: co-activation is not counted.
            DataError: nothing has been routed yet, or a sweep failed, so that the first layers have routed more.
        """
        if not self._together:
            raise UsageError("co-activation is not counted here; load the model with router_stats=True")
        counts_LE, experts = self._counts_LE.copy(), self._arch.num_experts
        together_LEE = np.zeros((len(counts_LE), experts, experts), dtype=np.int64)
        for layer, together_EE in self._together.items():
            together_LEE[layer] = together_EE.cpu().numpy()
        tokens = int(counts_LE.sum(axis=1).max()) // self._arch.top_k
        return RouterStats(model=self._arch.fingerprint(), tokens=tokens, counts=counts_LE, coactivation=together_LEE)
