"""Which experts a token is sent to, and with which weights, from the logits of its layer's router.

Every family's router is one of the two here: `Router` composes what most of them are made of, `SparseMixer` is that of
Phi-3.5-MoE.

Legend: T tokens, E experts, K chosen experts, N groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

#: Chosen experts and their weights in float32, both ``[T, K]``.
Choice = tuple[torch.Tensor, torch.Tensor]

#: What a logit becomes: its softmax among all experts, its softmax among the chosen ones, or its sigmoid.
SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID = "softmax", "softmax of chosen", "sigmoid"


class Routing(Protocol):
    """What `Router` and `SparseMixer` have in common."""

    def __call__(self, logits_TE: torch.Tensor, correction_E: torch.Tensor | None = None) -> Choice:
        """Choose for every token; ``correction_E`` is a layer's, where the router has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The best experts by score, each weighted by its score.

    Args:
        top_k: experts of a token.
        score: `SOFTMAX`, `SOFTMAX_OF_CHOSEN` or `SIGMOID`.
        groups, top_groups: experts are in so many groups of consecutive ones, of which a token may use the best
            ``top_groups``; the score of a group is the sum of its two best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        normalized: a token's weights are divided by their sum, which is raised by ``sum_epsilon`` and is at least
            ``least_sum``.
        scale: factor on the weights.
    """

    top_k: int
    score: str = SOFTMAX
    groups: int = 1
    top_groups: int = 1
    normalized: bool = True
    sum_epsilon: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0

    def __call__(self, logits_TE: torch.Tensor, correction_E: torch.Tensor | None = None) -> Choice:
        """Choose for every token.

        Args:
            logits_TE: of any dtype; scores are computed in float32.
            correction_E: float32, added to the scores for the choice only, not to the weights.
        """
        scores_TE = self._scores(logits_TE.float())
        wanted_TE = scores_TE if correction_E is None else scores_TE + correction_E
        if self.top_groups < self.groups:
            wanted_TE = self._in_best_groups(wanted_TE)
        ids_TK = torch.topk(wanted_TE, self.top_k, dim=-1)[1]
        return ids_TK, self._weights(scores_TE.gather(-1, ids_TK))

    def _scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        if self.score == SIGMOID:
            return torch.sigmoid(logits_TE)
        return logits_TE.softmax(dim=-1) if self.score == SOFTMAX else logits_TE

    def _in_best_groups(self, wanted_TE: torch.Tensor) -> torch.Tensor:
        """The same, and minus infinity outside the best groups."""
        wanted_TNe: torch.Tensor = wanted_TE.unflatten(-1, (self.groups, -1))
        groups_TN = wanted_TNe.topk(2, dim=-1)[0].sum(dim=-1)
        best_Tn = torch.topk(groups_TN, self.top_groups, dim=-1)[1]
        outside_TN = torch.ones_like(groups_TN, dtype=torch.bool).scatter_(-1, best_Tn, False)
        return wanted_TNe.masked_fill(outside_TN[..., None], float("-inf")).flatten(-2)

    def _weights(self, scores_TK: torch.Tensor) -> torch.Tensor:
        if self.score == SOFTMAX_OF_CHOSEN:
            scores_TK = torch.softmax(scores_TK, dim=-1)
        elif self.normalized:
            sums_T1 = scores_TK.sum(dim=-1, keepdim=True) + self.sum_epsilon
            scores_TK = scores_TK / sums_T1.clamp(min=self.least_sum)
        return scores_TK if self.scale == 1.0 else scores_TK * self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseMixer:
    """Sparsemixer (Liu et al. 2023) without its sampling: the two best experts, each weighted among its near equals.

    Args:
        jitter: half of the relative distance from the best within which an expert is near.
    """

    jitter: float

    def __call__(self, logits_TE: torch.Tensor, correction_E: torch.Tensor | None = None) -> Choice:
        """Choose for every token; there is no correction."""
        scores_TE = logits_TE.float()
        first_T1, weight_T1 = self._best(scores_TE, scores_TE)
        rest_TE = scores_TE.scatter(-1, first_T1, float("-inf"))
        second_T1, next_weight_T1 = self._best(rest_TE, scores_TE)
        return torch.cat([first_T1, second_T1], dim=-1), torch.cat([weight_T1, next_weight_T1], dim=-1)

    def _best(self, candidates_TE: torch.Tensor, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best candidate, and its softmax weight among those that are within 2·jitter of it, relatively."""
        best_T1, expert_T1 = candidates_TE.max(dim=-1, keepdim=True)
        distance_TE = (best_T1 - scores_TE) / scores_TE.abs().clamp(min=best_T1)
        near_TE = candidates_TE.masked_fill(distance_TE > 2 * self.jitter, float("-inf"))
        return expert_T1, torch.softmax(near_TE, dim=-1).gather(-1, expert_T1)
