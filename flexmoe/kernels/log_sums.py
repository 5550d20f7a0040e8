"""Attention in parts: each gives its output and the logarithm of the sum of its softmax, and they are merged by these.

Legend: T tokens, H query heads, G KV heads, N query heads of a KV head, Dh head size, S keys.
"""

from __future__ import annotations

import torch

#: Scores that are held at a time, in bytes.
_SCORE_BYTES = 2**26


class Merged:
    """What the parts so far give.

    Args:
        like: queries ``[T, H, Dh]``.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._out_THd = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        self._lse_TH = torch.full(like.shape[:2], -torch.inf, device=like.device)

    def add(self, tokens: slice | torch.Tensor, out_THd: torch.Tensor, lse_TH: torch.Tensor) -> None:
        """One more part of some tokens; each of them sees at least one of its keys."""
        before_TH, out_before_THd = self._lse_TH[tokens], self._out_THd[tokens]
        sum_TH = torch.logaddexp(before_TH, lse_TH)
        share_TH1, share_before_TH1 = ((each - sum_TH).exp().unsqueeze(-1) for each in (lse_TH, before_TH))
        self._out_THd[tokens] = out_before_THd * share_before_TH1 + out_THd.float() * share_TH1
        self._lse_TH[tokens] = sum_TH

    def result(self, like: torch.Tensor, sinks_H: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
        """Attention to the keys of all parts, in the dtype of ``like``.

        Args:
            sinks_H: a score of each head that belongs to no key.
            out: where it goes; made when absent.
        """
        if sinks_H is not None:
            self._out_THd *= torch.sigmoid(self._lse_TH - sinks_H.float()).unsqueeze(-1)
        return self._out_THd.to(like.dtype) if out is None else out.copy_(self._out_THd)


def attend_all(q_THd: torch.Tensor, k_SGd: torch.Tensor, v_SGd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries that all see all keys, with the logarithms of its sums: ``[T, H, Dh]`` and ``[T, H]``, float32."""
    groups, shared = k_SGd.shape[1], q_THd.shape[1] // k_SGd.shape[1]
    k_GdS, v_GSd = k_SGd.permute(1, 2, 0).to(q_THd.dtype), v_SGd.transpose(0, 1).to(q_THd.dtype)
    together = max(1, _SCORE_BYTES // (4 * q_THd.shape[1] * k_SGd.shape[0]))
    outs, sums = [], []
    for q in q_THd.split(together):
        q_GTNd = q.unflatten(1, (groups, shared)).transpose(0, 1)
        scores_GTNS = (q_GTNd.flatten(1, 2) @ k_GdS).float().mul_(q.shape[-1] ** -0.5)
        lse_GTN = scores_GTNS.logsumexp(-1)
        weights = scores_GTNS.sub_(lse_GTN.unsqueeze(-1)).exp_().to(q.dtype)
        out_GTNd = (weights @ v_GSd).float()
        outs.append(out_GTNd.unflatten(1, (len(q), shared)).transpose(0, 1).flatten(1, 2))
        sums.append(lse_GTN.unflatten(1, (len(q), shared)).transpose(0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(sums)
