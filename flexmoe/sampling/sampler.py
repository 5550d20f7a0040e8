"""Chooses a token for every row of a sweep, as the row's `SamplingParams` say, on the device that holds the logits.

The order is vLLM's: logit bias, ids that may not end the row yet, penalties, temperature, min_p, top_k, top_p. What is left is drawn from by a race: every
token has an exponential random number of its own (`random_draws`), is late by that divided by its weight, and the first
one wins (the same as Gumbel noise: Maddison, Tarlow and Minka, "A* sampling", NeurIPS 2014). Equal logits give equal
tokens whatever the block, and logits that differ by rounding, as those of two policies or devices do, give another token
only where two tokens arrive together: with 32,000 tokens and logits 1e-6 apart less than once in a million draws. To
invert the cumulative distribution, where rounding moves the edges of all tokens at once, parts once in 1300. Equal
logits at the edge of top_k or top_p stay together: all are kept.

Rows that only want the most probable token cost one argmax over the block. The others are taken a few at a time: in float32
a row of logits with its sorted copy and sums takes several times what the sweep's logits do.

Legend: R rows of logits, C of them in a chunk, V vocabulary, K most probable tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexmoe.outputs import TokenLogprob
from flexmoe.params import SamplingParams
from flexmoe.sampling.logprobs import finite_rows, records, top_tokens
from flexmoe.sampling.penalties import TokenCounts, add_bias, bar_tokens, penalize
from flexmoe.sampling.random_draws import draw_keys, log_arrivals, stream_of

#: Bytes per vocabulary entry that a row of a chunk takes at most: float32 logits, copies of them for log-probabilities
#: and top_p, a sorted copy with its 64-bit order, exponentials and their 64-bit sums, or random bits and numbers.
ROW_BYTES = 48
#: A top_p set is looked for among so many most probable tokens, then among more, then in all of them, sorted.
NUCLEUS_TOKENS = (128, 2048)
#: Stands for a token where no logits were there to choose by: it travels to the host with the tokens.
NOT_FINITE = -1


@dataclass(slots=True, kw_only=True)
class RowSampler:
    """What the sampler knows of one row: its parameters, its random stream, and what it has generated.

    Attributes:
        params: as asked; ``takes_best`` when only the most probable token is wanted and nothing else.
        stream: names the row's random numbers.
        drawn: tokens generated so far; the next one's random numbers are those of that place of the stream.
        counts: ids that the penalties look at; None where there are none.
        ends: ids that end the row, which are not chosen before `min_tokens`.
    """

    params: SamplingParams
    stream: int
    drawn: int
    counts: TokenCounts | None
    takes_best: bool
    ends: tuple[int, ...]

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        *,
        seed: int,
        key: str,
        index: int,
        prompt: Sequence[int],
        generated: Sequence[int],
        eos_ids: Collection[int] = (),
    ) -> RowSampler:
        """Of the sample ``index`` of a request.

        Args:
            seed: the job's, for rows without one.
            key: what the draws depend on beside the seed, `EngineRequest.stream_key`.
            prompt, generated: token ids; the row resumes after ``generated``.
            eos_ids: ids that end a sequence.
        """
        counts = None
        if params.penalized:
            counts = TokenCounts(prompt if params.repetition_penalty != 1 else (), generated)
        stream = 0 if params.greedy else stream_of(seed if params.seed is None else params.seed, key, index)
        return cls(
            params=params,
            stream=stream,
            drawn=len(generated),
            counts=counts,
            takes_best=params.greedy and not (params.penalized or params.logit_bias) and params.logprobs is None,
            ends=tuple(sorted({*eos_ids, *params.stop_token_ids})) if params.min_tokens else (),
        )

    @property
    def barred(self) -> tuple[int, ...]:
        """Ids that the next token may not be."""
        return self.ends if self.drawn < self.params.min_tokens else ()

    @property
    def plain(self) -> bool:
        """Whether the next token is the most probable one, whatever it is, and nothing else is wanted."""
        return self.takes_best and not self.barred

    def append_token(self, token: int) -> None:
        """Count a token that was chosen for the row."""
        self.drawn += 1
        if self.counts is not None:
            self.counts.add(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A token per row, `NOT_FINITE` where the row's logits are not, and its log-probability for those that want one."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]


@torch.inference_mode()
def sample(logits_RV: torch.Tensor, rows: Sequence[RowSampler], *, workspace_bytes: int) -> Chosen:
    """Choose a token for each row of logits.

    Args:
        logits_RV: ``[R, V]`` in any float dtype, on the compute device; left as they are.
        rows: one per row of logits.
        workspace_bytes: how much memory may be taken beside the logits; at least one row is taken at a time.
    """
    special = [at for at, row in enumerate(rows) if not row.plain]
    tokens_R = _most_probable(logits_RV) if len(special) < len(rows) else None
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    if not special:
        return Chosen(tokens=tokens_R.tolist() if tokens_R is not None else [], logprobs=logprobs)
    keys = _keys([rows[at] for at in special])
    step, picked = max(1, workspace_bytes // (ROW_BYTES * logits_RV.shape[-1])), []
    for first in range(0, len(special), step):
        places = special[first : first + step]
        tokens, found = _sample_chunk(logits_RV, places, [rows[at] for at in places], keys[first : first + step])
        picked += tokens
        for at, logprob in zip(places, found):
            logprobs[at] = logprob
    tokens = tokens_R.tolist() if tokens_R is not None else [0] * len(rows)
    for at, token in zip(special, picked):
        tokens[at] = token
    return Chosen(tokens=tokens, logprobs=logprobs)


def _most_probable(logits_RV: torch.Tensor) -> torch.Tensor:
    tokens_R = logits_RV.argmax(dim=-1)
    largest_R = logits_RV.gather(-1, tokens_R[:, None])[:, 0]
    return tokens_R.where(finite_rows(logits_RV, largest_R), NOT_FINITE)


def _keys(rows: Sequence[RowSampler]) -> np.ndarray:
    streams = np.array([row.stream for row in rows], dtype=np.uint64)
    return draw_keys(streams, np.array([row.drawn for row in rows], dtype=np.uint64))


def _sample_chunk(
    logits_RV: torch.Tensor, places: list[int], rows: list[RowSampler], keys: np.ndarray
) -> tuple[list[int], list[TokenLogprob | None]]:
    x_CV = logits_RV[torch.tensor(places, device=logits_RV.device)].float()
    finite_C = finite_rows(x_CV)  # before biases and filters, which may give minus infinity
    x_CV.nan_to_num_(nan=torch.finfo(x_CV.dtype).min)
    reported = _Reported(x_CV, rows)
    params = [row.params for row in rows]
    add_bias(x_CV, params)
    bar_tokens(x_CV, [row.barred for row in rows])
    penalize(x_CV, params, [row.counts for row in rows])
    tokens_C = x_CV.argmax(dim=-1)
    drawn = [at for at, p in enumerate(params) if not p.greedy]
    if drawn:
        # The most probable tokens are no longer needed where a token is drawn.
        some = torch.tensor(drawn, device=x_CV.device)
        x_CV = x_CV if len(drawn) == len(rows) else x_CV[some]
        tokens_C[some] = draw(x_CV, [params[at] for at in drawn], keys[drawn])
    return tokens_C.where(finite_C, NOT_FINITE).tolist(), reported.of(tokens_C)


class _Reported:
    """Keeps of a chunk's logits what the rows' log-probabilities need, before the logits are changed."""

    def __init__(self, x_CV: torch.Tensor, rows: list[RowSampler]):
        self._count = len(rows)
        self._at = [at for at, row in enumerate(rows) if row.params.logprobs is not None]
        if not self._at:
            return
        self._ks = [rows[at].params.logprobs or 0 for at in self._at]
        self._rows = torch.tensor(self._at, device=x_CV.device)
        self._x = x_CV[self._rows]
        self._total = self._x.logsumexp(-1)
        self._top, self._ids = top_tokens(self._x, max(self._ks))

    def of(self, tokens_C: torch.Tensor) -> list[TokenLogprob | None]:
        found: list[TokenLogprob | None] = [None] * self._count
        if self._at:
            tokens = tokens_C[self._rows]
            logprobs = self._x.gather(-1, tokens[:, None])[:, 0] - self._total
            top = self._top - self._total[:, None]
            for at, record in zip(self._at, records(tokens.tolist(), logprobs, self._ids, top, self._ks)):
                found[at] = record
        return found


def draw(x_CV: torch.Tensor, params: Sequence[SamplingParams], keys: np.ndarray) -> torch.Tensor:
    """Draw a token per row from logits, after temperature, min_p, top_k and top_p.

    Args:
        x_CV: float32 logits; overwritten.
        params: of each row; its temperature is above 0.
        keys: of the draws, uint32 ``[C, 2]``.

    Returns:
        torch.Tensor: int64 ``[C]``.
    """
    filter_logits(x_CV, params)
    return x_CV.sub_(log_arrivals(keys, x_CV.shape[-1], x_CV.device)).argmax(dim=-1)


def filter_logits(x_CV: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Divide logits by the temperature and put those that min_p, top_k and top_p leave out to minus infinity, in place."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=x_CV.device)[:, None]

    x_CV /= column([p.temperature for p in params])
    if any(p.min_p for p in params):
        least = column([math.log(p.min_p) if p.min_p else -math.inf for p in params])
        x_CV.masked_fill_(x_CV < x_CV.amax(-1, keepdim=True) + least, -torch.inf)
    vocab = x_CV.shape[-1]
    ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    most = max((k for k in ks if k < vocab), default=0)
    if most:
        largest = x_CV.topk(most).values
        at = torch.tensor([min(k, most) - 1 for k in ks], device=x_CV.device)[:, None]
        edge = largest.gather(-1, at).masked_fill_(column(ks) >= vocab, -torch.inf)
        x_CV.masked_fill_(x_CV < edge, -torch.inf)
    some = [at for at, p in enumerate(params) if p.top_p < 1]
    if some:
        rows = torch.tensor(some, device=x_CV.device)
        edge = x_CV.new_full((len(params), 1), -torch.inf)
        edge[rows] = _nucleus_edge(x_CV[rows], column([params[at].top_p for at in some]))
        x_CV.masked_fill_(x_CV < edge, -torch.inf)


def _nucleus_edge(x_CV: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The least logit of the smallest set of most probable tokens whose probabilities sum to ``share`` ``[C, 1]``."""
    largest, vocab = x_CV.amax(-1, keepdim=True), x_CV.shape[-1]
    wanted = share.double() * (x_CV - largest).exp_().sum(-1, keepdim=True, dtype=torch.float64)
    edge, left = torch.empty_like(largest), torch.arange(len(x_CV), device=x_CV.device)
    for size in (*(s for s in NUCLEUS_TOKENS if s < vocab), vocab):
        x = x_CV[left]
        best = x.topk(size).values if size < vocab else x.sort(dim=-1, descending=True).values
        weights = (best - largest[left]).exp_()
        before = weights.cumsum(-1, dtype=torch.float64).sub_(weights)
        # The first token has nothing before it, so that one is always kept.
        last = (before < wanted[left]).sum(-1, keepdim=True).clamp_(min=1) - 1
        edge[left] = best.gather(-1, last)
        left = left[last[:, 0] == size - 1]  # all of them are kept, and perhaps more
        if not len(left):
            break
    return edge
