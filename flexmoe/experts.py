"""The MoE of a layer: tokens sorted by expert on the device, one pass per expert over the whole block.

Legend: T tokens, D hidden, E experts, K chosen experts, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cost_model.costs import EXPERT_CHUNK_TOKENS
from flexmoe.device import Device


class ExpertDispatch:
    """Routes the tokens of a block to experts and adds up what comes back.

    Args:
        device: compute device.
        num_experts: E.
        max_tokens: most tokens of a sweep.
        top_k: K.
    """

    def __init__(self, device: Device, num_experts: int, max_tokens: int, top_k: int):
        self._device = device
        self._chunk = EXPERT_CHUNK_TOKENS[device.torch.type]
        self._bounds = torch.arange(num_experts + 1, device=device.torch)
        self._starts_host = device.host_buffer((num_experts + 1) * 8).view(torch.int64) if device.is_cuda else None

    def route(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> list[int]:
        """Sort the block's (token, expert) pairs by expert; the only host wait of the layer.

        Args:
            ids_TK: chosen experts.
            weights_TK: their weights.
            dtype: dtype in which the weights are applied.

        Returns:
            list[int]: tokens of each expert.
        """
        experts, order = ids_TK.flatten().sort(stable=True)
        starts = torch.searchsorted(experts, self._bounds)  # bincount would wait for the device, twice
        if self._starts_host is not None:
            starts = self._starts_host.copy_(starts, non_blocking=True)
            copied = self._device.record()
        self._tokens = order // ids_TK.shape[1]
        self._weights = weights_TK.flatten()[order].to(dtype).unsqueeze(1)
        if self._starts_host is not None:
            self._device.host_wait(copied)
        self._starts = starts.tolist()
        return [stop - start for start, stop in zip(self._starts, self._starts[1:])]

    def route_all(self, tokens: int) -> None:
        """Send every token to expert 0 with weight one: the MLP of a dense layer."""
        self._starts, self._tokens = [0, tokens], None

    def add(self, expert: int, x_TD: torch.Tensor, y_TD: torch.Tensor, compute: Callable) -> None:
        """Run one expert over its tokens and add the weighted result to the block's output.

        Args:
            expert: its index.
            x_TD: normalized hidden states of the block.
            y_TD: output of the MoE, added to in place.
            compute: maps ``[n, D]`` to ``[n, D]``.
        """
        first, last = self._starts[expert], self._starts[expert + 1]
        for start in range(first, last, self._chunk):
            pairs = slice(start, min(last, start + self._chunk))
            if self._tokens is None:
                y_TD[pairs] += compute(x_TD[pairs])
                continue
            tokens = self._tokens[pairs]
            y_TD.index_add_(0, tokens, compute(x_TD.index_select(0, tokens)).mul_(self._weights[pairs]))
