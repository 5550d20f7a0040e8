"""Log-probabilities of the model's own distribution: of tokens that were chosen, and of tokens that were given.

Legend: R rows of logits, C rows of a chunk, V vocabulary (or a piece of it), K most probable tokens, N scored positions, D hidden.
"""

from __future__ import annotations

import torch

from flexmoe.outputs import TokenLogprob


def finite_rows(x_RV: torch.Tensor, largest_R: torch.Tensor | None = None) -> torch.Tensor:
    """Which rows hold finite numbers only, as bools ``[R]`` that stay on the device.

    Args:
        largest_R: the largest of each row, NaN where one is, if it is known: a pass less.
    """
    largest_R = x_RV.amax(-1) if largest_R is None else largest_R
    return x_RV.amin(-1).isfinite() & largest_R.isfinite()


def top_tokens(x_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, the largest first, equal ones by lower id.

    Returns:
        tuple[Tensor, Tensor]: values ``[C, K]`` and int64 ids ``[C, K]``; K is at most V.
    """
    if k >= x_CV.shape[-1]:
        return x_CV.sort(dim=-1, descending=True, stable=True)
    values, ids = x_CV.topk(k + 1)
    tied = values[:, k - 1] == values[:, k] if k else torch.zeros(len(ids), dtype=torch.bool)
    values, ids = values[:, :k], ids[:, :k]
    if bool(tied.any()):  # `topk` leaves open which of several equal values it takes
        ids[tied] = _first_tokens(x_CV[tied], k, values[tied, -1:])
        values[tied] = x_CV[tied].gather(-1, ids[tied])
    return _in_order(values, ids)


def _first_tokens(x_CV: torch.Tensor, k: int, least: torch.Tensor) -> torch.Tensor:
    """Ids of the k largest, of which ``least`` ``[C, 1]`` is the last: of those that equal it the first ones."""
    above, equal = x_CV > least, x_CV == least
    wanted = k - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= wanted))
    return kept.nonzero()[:, 1].view(-1, k)


def _in_order(values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By falling value, equal ones by rising id."""
    by_id = ids.sort(dim=-1).indices
    values, order = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_id).gather(-1, order)


def records(
    tokens: list[int], logprobs: torch.Tensor, top_ids: torch.Tensor, top: torch.Tensor, ks: list[int]
) -> list[TokenLogprob]:
    """Host records of N positions: ``logprobs`` ``[N]`` of the tokens, and of the most probable ``[N, K]``.

    Args:
        ks: how many of the most probable each position wants.
    """
    rows = zip(tokens, logprobs.tolist(), top_ids.tolist(), top.tolist(), ks)
    return [TokenLogprob(token_id=t, logprob=p, top=tuple(zip(i[:k], v[:k]))) for t, p, i, v, k in rows]


class PromptScores:
    """Log-probabilities of given tokens, from logits that come piece by piece of the vocabulary.

    The logits of all scored positions at once could take more memory than anything else in a sweep; so each piece of
    the head is applied to a few positions at a time, and what is kept per position is the largest logit, the sum of
    exponentials relative to it, the given token's logit and the most probable tokens.

    Args:
        targets: int64 ``[N]``: the token at the place after each position.
        k: most probable tokens wanted, 0 for none.
    """

    def __init__(self, targets: torch.Tensor, k: int):
        count, device = len(targets), targets.device
        self._targets = targets
        self._largest = torch.full((count,), -torch.inf, device=device)
        self._sum = torch.zeros(count, device=device)
        self._given = torch.zeros(count, device=device)
        self._finite = torch.ones(count, dtype=torch.bool, device=device)
        self._values = torch.empty(count, 0, device=device)
        self._ids = torch.empty(count, 0, dtype=torch.int64, device=device)
        self._k = k

    def add(self, rows: slice, first: int, logits_CV: torch.Tensor) -> None:
        """Logits of the positions ``rows`` for the ids from ``first`` on; float32 and free to be overwritten."""
        self._finite[rows] &= finite_rows(logits_CV)
        logits_CV.nan_to_num_(nan=torch.finfo(logits_CV.dtype).min)
        targets = self._targets[rows] - first
        width = logits_CV.shape[-1]
        here = (targets >= 0) & (targets < width)
        given = logits_CV.gather(-1, targets.clamp(0, width - 1)[:, None])[:, 0]
        self._given[rows] = torch.where(here, given, self._given[rows])
        if self._k:
            self._merge(rows, first, logits_CV)
        largest = torch.maximum(self._largest[rows], logits_CV.amax(-1))
        sums = self._sum[rows] * (self._largest[rows] - largest).exp()
        self._sum[rows] = sums + logits_CV.sub_(largest[:, None]).exp_().sum(-1)
        self._largest[rows] = largest

    def __len__(self) -> int:
        return len(self._targets)

    def records(self, ks: list[int]) -> list[TokenLogprob]:
        """One record per position, in order; where logits were not finite its log-probabilities are NaN.

        Args:
            ks: how many of the most probable tokens each wants.
        """
        total = (self._largest + self._sum.log()).masked_fill_(~self._finite, torch.nan)
        top = self._values - total[:, None]
        return records(self._targets.tolist(), self._given - total, self._ids, top, ks)

    def _merge(self, rows: slice, first: int, logits_CV: torch.Tensor) -> None:
        values, ids = top_tokens(logits_CV, self._k)
        if not self._ids.shape[1]:  # the first piece; a piece narrower than k leaves room for the next ones
            shape = len(self._targets), self._k
            self._values = torch.full(shape, -torch.inf, device=values.device)
            self._ids = torch.full(shape, -1, dtype=torch.int64, device=values.device)
        values = torch.cat([self._values[rows], values], dim=-1)
        ids = torch.cat([self._ids[rows], ids + first], dim=-1)
        values, ids = _in_order(values, ids)
        self._values[rows], self._ids[rows] = values[:, : self._k], ids[:, : self._k]
