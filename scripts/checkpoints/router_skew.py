"""Routers that prefer some experts, as those of trained models do: about a Zipf law, in another order in every layer.

No router has a bias. Instead some hidden dimensions are reserved, one for each *topic*, a stretch of the vocabulary: a token
has a constant in the dimension of its topic and zero in the others. Nothing is added to these dimensions and nothing but the
routers reads them (and the head, so that a text stays with its topic), so a router's row finds there how much its expert is
liked. Its other numbers are random: they add to the score a noise that depends on the token and on what came before it.

An expert is chosen when its liking plus noise of standard deviation one is among the K best. The noise is one by
construction: rows of routers have norm one, and what they read has the variance `_variance` per dimension.

Legend: E experts, K chosen experts, D hidden, N topics.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch

from cost_model.model.arch import ModelArch
from flexmoe.errors import UsageError
from scripts.checkpoints.shapes import Matrix

#: Highest probability that a token is routed to one expert: choice stays a matter of the token.
_MOST = 0.95
#: Variance that the residual gets from attention and from experts at most, over all layers and per dimension, where it begins as one.
_GAIN = 2.0
#: What comes of it: of attention, which looks at many tokens; and of an expert, by the square of its routing weight.
_FROM_ATTENTION, _FROM_EXPERT = 0.05, 0.18
#: Sum of the squares of a token's routing weights. Sparsemixer's are near one each, the others' add up to one.
_SQUARES, _SQUARES_OF = 0.55, {"phimoe": 2.0}
#: Of a word's logit, standard deviations that the head adds in the topic at hand; greedy and drawn texts stay with it.
_STAY = 16.0
_DRAWS, _ROUNDS = 1 << 14, 30
_NORMAL = NormalDist()


class RouterSkew:
    """Changes the weights of a random model so that routers have favourites.

    Args:
        arch: the shape.
        exponent: of Zipf's law, above zero: the expert of rank r is chosen in proportion to r to the power of minus this.
        topics: N, stretches of the vocabulary of about the same length, each with favourites of its own.
        seed: decides which experts are the favourites.

    Raises:
        UsageError: the model has too few dimensions or words for so many topics, or no head of its own.
    """

    def __init__(self, arch: ModelArch, *, exponent: float, topics: int = 1, seed: int = 0):
        if arch.tied:
            raise UsageError("a model with skewed routers needs a head of its own: leave out the tied one")
        if 8 * topics > min(arch.hidden, arch.vocab_size):
            raise UsageError(
                f"{topics} topics are too many for {arch.hidden} hidden dimensions and {arch.vocab_size} words: at most one "
                f"to eight of either"
            )
        self._arch, self._topics, self._seed = arch, topics, seed
        self._likings = torch.tensor(likings(exponent, arch.num_experts, arch.top_k), dtype=torch.float32)

    def favourites(self, layer: int, topic: int) -> torch.Tensor:
        """int64 ``[E]``: the experts of a layer, the one that a topic's tokens choose most first."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/favourites/{layer}/{topic}".encode()))
        return torch.randperm(self._arch.num_experts, generator=generator)

    def words(self, topic: int) -> range:
        """Token ids of a topic."""
        start, stop = (at * self._arch.vocab_size // self._topics for at in (topic, topic + 1))
        return range(start, stop)

    def apply(self, values: torch.Tensor, matrix: Matrix) -> None:
        """Change a tensor of the hub's layout in place."""
        reserved = slice(0, self._topics)
        if matrix.role == "embed":
            values.mul_(self._arch.hidden**0.5)
            self._mark_words(values, 1.0)
        elif matrix.role == "router":
            self._favour(values, matrix.unit.layer)
        elif matrix.role == "head":
            self._mark_words(values, _STAY if self._topics > 1 else 0.0)
        elif matrix.role in ("q", "k", "v", "gate_up"):
            values[:, reserved] = 0
        elif matrix.role in ("o", "o_bias", "down"):
            values.mul_((_GAIN / (2 * self._arch.num_layers)) ** 0.5)
            values[reserved] = 0
        elif matrix.role in ("post_norm", "norm"):
            values[reserved] = 1
        elif matrix.role in ("post_norm_bias", "norm_bias"):
            values[reserved] = 0

    def _mark_words(self, table_VD: torch.Tensor, value: float) -> None:
        table_VD[:, : self._topics] = 0
        for topic in range(self._topics):
            words = self.words(topic)
            table_VD[words.start : words.stop, topic] = value

    def _favour(self, router_ED: torch.Tensor, layer: int) -> None:
        free_ED = router_ED[:, self._topics :]
        free_ED /= free_ED.norm(dim=1, keepdim=True)
        noise_std = self._variance(layer) ** 0.5
        for topic in range(self._topics):
            router_ED[self.favourites(layer, topic), topic] = noise_std * self._likings

    def _variance(self, layer: int) -> float:
        """Of the residual per free dimension where a layer's router reads it, relative to the embedding's, which is one."""
        squares = _SQUARES_OF.get(self._arch.model_type, _SQUARES)
        added = _GAIN * (_FROM_ATTENTION + _FROM_EXPERT * squares)
        return 1 + added * (layer + 0.5) / self._arch.num_layers


def chosen(exponent: float, experts: int, top_k: int) -> np.ndarray:
    """float64 ``[E]``: the probability that a token is routed to the expert of each rank. It follows Zipf's law, as far as it
    is not above 0.95, and adds up to K."""
    weights = np.arange(1, experts + 1, dtype=float) ** -exponent
    most, free = max(_MOST, top_k / experts), weights.copy()
    share = np.zeros(experts)
    while True:
        capped = share >= most
        share = np.where(capped, most, 0.0)
        share[~capped] = free[~capped] * (top_k - most * capped.sum()) / max(free[~capped].sum(), 1e-300)
        if (share <= most * (1 + 1e-12)).all():
            return share


@lru_cache(maxsize=8)
def likings(exponent: float, experts: int, top_k: int) -> tuple[float, ...]:
    """How much the expert of each rank is liked, in standard deviations of the noise, so that `chosen` comes true.

    Were the K-th best score always the same, an expert chosen with probability p would be liked by the p-quantile of the
    normal distribution more than it. As it is not, the frequencies over drawn noise correct that until they agree.
    """
    wanted = chosen(exponent, experts, top_k)
    if top_k == experts:
        return (0.0,) * experts
    noise = np.random.default_rng(0).standard_normal((_DRAWS, experts), dtype=np.float32)
    goal = np.array([_NORMAL.inv_cdf(p) for p in wanted])
    liked = goal.copy()
    for _ in range(_ROUNDS):
        best = np.argpartition(noise + liked.astype(np.float32), experts - top_k, axis=1)[:, experts - top_k :]
        found = (np.bincount(best.ravel(), minlength=experts) + 0.5) / (_DRAWS + 1)
        liked += 0.7 * (goal - np.array([_NORMAL.inv_cdf(p) for p in found]))
    return tuple(float(value) for value in liked - liked.mean())
