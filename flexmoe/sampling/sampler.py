"""Chooses a token for every row of a sweep, as the row's `SamplingParams` say, on the device that holds the logits.

The order is vLLM's: what a grammar permits, logit bias, ids that may not end the row yet, penalties, temperature, min_p, top_k, top_p. What is left is drawn from by a race: every
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

from flexmoe.kernels.native import choice, library
from flexmoe.outputs import TokenLogprob
from flexmoe.params import SamplingParams
from flexmoe.sampling.grammar_masks import permit_only
from flexmoe.sampling.logprobs import finite_rows, records, top_tokens
from flexmoe.sampling.penalties import Download, TokenCounts, Upload, add_bias, bar_tokens, penalize, waiting
from flexmoe.sampling.random_draws import draw_keys, first_arrivals, stream_of
from flexmoe.structured.row import RowGrammar

#: Bytes per vocabulary entry that a row of a chunk takes at most: float32 logits, copies of them for log-probabilities
#: and top_p, a sorted copy with its 64-bit order, exponentials and their 64-bit sums, or random bits and numbers.
ROW_BYTES = 48
#: A top_p set is looked for among so many most probable tokens, then among more, then in all of them, sorted.
NUCLEUS_TOKENS = (128, 2048)
#: Stands for a token where no logits were there to choose by: it travels to the host with the tokens.
NOT_FINITE = -1
#: A higher temperature is infinite in float32, and makes NaN of what is impossible.
_HOTTEST = 1e38
#: Stands for a token until a larger part of the vocabulary has been sorted.
_UNSURE = -2


@dataclass(slots=True, kw_only=True)
class RowSampler:
    """What the sampler knows of one row: its parameters, its random stream, and what it has generated.

    Attributes:
        params: as asked; ``takes_best`` when only the most probable token is wanted and nothing else.
        stream: names the row's random numbers.
        drawn: tokens generated so far; the next one's random numbers are those of that place of the stream.
        counts: ids that the penalties look at; None where there are none.
        ends: ids that end the row, which are not chosen before `min_tokens`.
        grammar: what its tokens have to follow; None where they are free.
    """

    params: SamplingParams
    stream: int
    drawn: int
    counts: TokenCounts | None
    takes_best: bool
    ends: tuple[int, ...]
    grammar: RowGrammar | None = None

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
        grammar: RowGrammar | None = None,
    ) -> RowSampler:
        """Of the sample ``index`` of a request.

        Args:
            seed: the job's, for rows without one.
            key: what the draws depend on beside the seed, `EngineRequest.stream_key`.
            prompt, generated: token ids; the row resumes after ``generated``.
            eos_ids: ids that end a sequence.
            grammar: of the row, after ``generated``.
        """
        counts = None
        takes_best = params.greedy and not (params.penalized or params.logit_bias or grammar is not None)
        if params.penalized:
            counts = TokenCounts(prompt if params.repetition_penalty != 1 else (), generated)
        stream = 0 if params.greedy else stream_of(seed if params.seed is None else params.seed, key, index)
        return cls(
            params=params,
            stream=stream,
            drawn=len(generated),
            counts=counts,
            takes_best=takes_best and params.logprobs is None,
            ends=tuple(sorted({*eos_ids, *params.stop_token_ids})) if params.min_tokens else (),
            grammar=grammar,
        )

    @property
    def barred(self) -> tuple[int, ...]:
        """Ids that the next token may not be."""
        must_end = self.grammar is not None and self.grammar.must_end
        return self.ends if self.drawn < self.params.min_tokens and not must_end else ()

    @property
    def plain(self) -> bool:
        """Whether the next token is the most probable one, whatever it is, and nothing else is wanted."""
        return self.takes_best and not self.barred

    def append_token(self, token: int) -> None:
        """Count a token that was chosen for the row."""
        self.drawn += 1
        if self.counts is not None:
            self.counts.add(token)
        if self.grammar is not None:
            self.grammar.append_token(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A token per row, `NOT_FINITE` where the row's logits are not, and its log-probability for those that want one."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]


class Sampling:
    """Chooses a token for each row of logits. When it is made, all that the device does for it is issued; the host waits later.

    Args:
        logits_RV: ``[R, V]`` in any float dtype, on the compute device; left as they are.
        rows: one per row of logits.
        workspace_bytes: how much memory may be taken beside the logits; at least one row is taken at a time.
        upload: brings arrays to the device; None: with a wait for each.
        download: brings tokens to the host; None: with a wait for all that has been issued by then.
    """

    @torch.inference_mode()
    def __init__(
        self,
        logits_RV: torch.Tensor,
        rows: Sequence[RowSampler],
        *,
        workspace_bytes: int,
        upload: Upload | None = None,
        download: Download | None = None,
    ):
        self._logits_RV, self._rows, self._upload = logits_RV, rows, upload or waiting(logits_RV.device)
        vocab = logits_RV.shape[-1]
        self._step = max(1, workspace_bytes // (ROW_BYTES * vocab))
        self._sizes = [*(size for size in NUCLEUS_TOKENS if size < vocab), vocab]
        self._special = [at for at, row in enumerate(rows) if not row.plain]
        plain = [_most_probable(logits_RV)] if len(self._special) < len(rows) else []
        self._chunks, tokens = self._sampled(self._special, self._sizes[0])
        done = [*tokens, *plain]
        bring: Download = download or (lambda tensor: tensor.cpu)
        self._tokens = bring(torch.cat(done)) if done else None

    @torch.inference_mode()
    def chosen(self) -> Chosen:
        """The tokens. The host waits for them once; once more for rows that need a larger part of the vocabulary sorted than most;
        and for the log-probabilities that are asked for."""
        chosen = Chosen(tokens=[0] * len(self._rows), logprobs=[None] * len(self._rows))
        tokens = self._tokens().tolist() if self._tokens is not None else []
        special, chunks = self._special, self._chunks
        chosen.tokens[:] = tokens[len(special) :] or chosen.tokens
        sizes = iter(self._sizes[1:])
        while True:
            for at, token in zip(special, tokens):
                chosen.tokens[at] = token
            for chunk in chunks:
                chunk.report(chosen)
            special = [at for at, token in zip(special, tokens) if token == _UNSURE]
            if not special:  # when the whole vocabulary has been sorted at the latest
                return chosen
            chunks, done = self._sampled(special, next(sizes))
            tokens = torch.cat(done).tolist()

    def _sampled(self, special: Sequence[int], nucleus: int) -> tuple[list[_Chunk], list[torch.Tensor]]:
        """Rows that do not want the most probable token: their chunks, and what these choose."""
        places = range(0, len(special), self._step)
        chunks = [_Chunk(special[at : at + self._step], self._rows, nucleus) for at in places]
        return chunks, [chunk.sample(self._logits_RV, self._upload) for chunk in chunks]


def _most_probable(logits_RV: torch.Tensor) -> torch.Tensor:
    """The most probable token of each row, `NOT_FINITE` where one of the row's logits is not finite: int64 ``[R]``."""
    if logits_RV.device.type == "cpu" and library.available():
        return choice.largest(logits_RV)
    tokens_R = logits_RV.argmax(dim=-1)
    largest_R = logits_RV.gather(-1, tokens_R[:, None])[:, 0]
    return tokens_R.where(finite_rows(logits_RV, largest_R), NOT_FINITE)


def _keys(rows: Sequence[RowSampler]) -> np.ndarray:
    streams = np.array([row.stream for row in rows], dtype=np.uint64)
    return draw_keys(streams, np.array([row.drawn for row in rows], dtype=np.uint64))


class _Chunk:
    """Rows that are sampled together.

    Args:
        places: of the rows among those of the sweep.
        rows: of the sweep.
        nucleus: as in `filter_logits`.
    """

    def __init__(self, places: Sequence[int], rows: Sequence[RowSampler], nucleus: int):
        self._places, self._rows, self._nucleus = places, [rows[at] for at in places], nucleus
        self._drawn = [at for at, row in enumerate(self._rows) if not row.params.greedy]
        self._reported: _Reported | None = None

    def sample(self, logits_RV: torch.Tensor, upload: Upload) -> torch.Tensor:
        """Issue all that chooses the tokens: int64 ``[C]`` on the device, with `NOT_FINITE` and `_UNSURE` among them."""
        places_C, drawn_n = upload([np.array(self._places), np.array(self._drawn, np.int64)])
        x_CV = logits_RV[places_C].float()
        finite_C = finite_rows(x_CV)  # before biases and filters, which may give minus infinity
        x_CV.nan_to_num_(nan=torch.finfo(x_CV.dtype).min)
        reported = _Reported(x_CV, self._rows, upload)
        params = [row.params for row in self._rows]
        permit_only(x_CV, [row.grammar.mask if row.grammar else None for row in self._rows], upload)
        add_bias(x_CV, params, upload)
        bar_tokens(x_CV, [row.barred for row in self._rows], upload)
        penalize(x_CV, params, [row.counts for row in self._rows], upload)
        tokens_C = torch.zeros_like(places_C) if len(self._drawn) == len(self._rows) else x_CV.argmax(dim=-1)
        if self._drawn:
            x_CV = x_CV if len(self._drawn) == len(self._rows) else x_CV[drawn_n]
            some, keys = [params[at] for at in self._drawn], _keys([self._rows[at] for at in self._drawn])
            tokens_C[drawn_n] = draw(x_CV, some, keys, upload, self._nucleus)
        reported.end(tokens_C)
        self._reported = reported
        return tokens_C.where(finite_C, NOT_FINITE)

    def report(self, chosen: Chosen) -> None:
        """Give the rows that want them their log-probabilities; those of rows that are unsure are replaced later."""
        if self._reported is not None:
            for at, record in self._reported.records():
                chosen.logprobs[self._places[at]] = record


class _Reported:
    """Keeps of a chunk's logits what the rows' log-probabilities need, before the logits are changed."""

    def __init__(self, x_CV: torch.Tensor, rows: list[RowSampler], upload: Upload):
        self._at = [at for at, row in enumerate(rows) if row.params.logprobs is not None]
        if not self._at:
            return
        self._ks = [rows[at].params.logprobs or 0 for at in self._at]
        (self._rows,) = upload([np.array(self._at)])
        self._x: torch.Tensor | None = x_CV[self._rows]
        self._total = self._x.logsumexp(-1)
        self._top, self._ids = top_tokens(self._x, max(self._ks))

    def end(self, tokens_C: torch.Tensor) -> None:
        """These tokens have been chosen; the logits are no longer needed."""
        if self._at and self._x is not None:
            self._tokens = tokens_C[self._rows]
            self._logprobs = self._x.gather(-1, self._tokens.clamp(min=0)[:, None])[:, 0] - self._total
            self._x = None

    def records(self) -> list[tuple[int, TokenLogprob]]:
        """By place in the chunk; waits for the device."""
        if not self._at:
            return []
        top = self._top - self._total[:, None]
        return list(zip(self._at, records(self._tokens.tolist(), self._logprobs, self._ids, top, self._ks)))


def draw(
    x_CV: torch.Tensor,
    params: Sequence[SamplingParams],
    keys: np.ndarray,
    upload: Upload,
    nucleus: int | None = None,
) -> torch.Tensor:
    """Draw a token per row from logits, after temperature, min_p, top_k and top_p.

    Args:
        x_CV: float32 logits; overwritten.
        params: of each row; its temperature is above 0.
        keys: of the draws, uint32 ``[C, 2]``.
        upload: brings arrays to the device.
        nucleus: as in `filter_logits`.

    Returns:
        torch.Tensor: int64 ``[C]``, `_UNSURE` for rows whose top_p may keep more tokens than were looked at.
    """
    unsure_C = filter_logits(x_CV, params, upload, nucleus)
    (keys_C2,) = upload([keys.view(np.int32)])
    tokens_C = first_arrivals(x_CV, keys_C2)
    return tokens_C.masked_fill_(unsure_C, _UNSURE)


def filter_logits(
    x_CV: torch.Tensor, params: Sequence[SamplingParams], upload: Upload, nucleus: int | None = None
) -> torch.Tensor:
    """Divide logits by the temperature and put those that min_p, top_k and top_p leave out to minus infinity, in place.

    Args:
        upload: brings arrays to the device.
        nucleus: most probable tokens among which a top_p set is looked for; None: all.

    Returns:
        torch.Tensor: bools ``[C]``: rows whose top_p set may be larger than ``nucleus``, so that they have to be filtered anew.
    """
    vocab, some = x_CV.shape[-1], [at for at, p in enumerate(params) if p.top_p < 1]
    ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    most = max((k for k in ks if k < vocab), default=0)
    temperature, least, last, kept, rows, share = upload(
        [
            _column([min(p.temperature, _HOTTEST) for p in params]),
            _column([math.log(p.min_p) if p.min_p else -math.inf for p in params]),
            _column([min(k, max(most, 1)) - 1 for k in ks], np.int64),
            _column([k >= vocab for k in ks], np.bool_),
            np.array(some, np.int64),
            _column([params[at].top_p for at in some]),
        ]
    )
    x_CV /= temperature
    if any(p.min_p for p in params):
        x_CV.masked_fill_(x_CV < x_CV.amax(-1, keepdim=True) + least, -torch.inf)
    if most:
        edge = x_CV.topk(most).values.gather(-1, last).masked_fill_(kept, -torch.inf)
        x_CV.masked_fill_(x_CV < edge, -torch.inf)
    unsure_C = torch.zeros(len(params), dtype=torch.bool, device=x_CV.device)
    if some:
        edge = x_CV.new_full((len(params), 1), -torch.inf)
        edge[rows], unsure_C[rows] = _nucleus_edge(x_CV[rows], share, min(nucleus or vocab, vocab))
        x_CV.masked_fill_(x_CV < edge, -torch.inf)
    return unsure_C


def _column(values: Sequence[float], dtype: type = np.float32) -> np.ndarray:
    with np.errstate(over="ignore"):  # temperatures beyond float32 are infinite
        column: np.ndarray = np.array(values, dtype)[:, None]
    return column


def _nucleus_edge(x_CV: torch.Tensor, share: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least logit ``[C, 1]`` of the smallest set of most probable tokens whose probabilities sum to ``share`` ``[C, 1]``, and
    whether ``[C]`` the set may have more than ``size`` tokens, which alone are sorted."""
    largest, vocab = x_CV.amax(-1, keepdim=True), x_CV.shape[-1]
    wanted = share.double() * (x_CV - largest).exp_().sum(-1, keepdim=True, dtype=torch.float64)
    best = x_CV.topk(size).values if size < vocab else x_CV.sort(dim=-1, descending=True).values
    weights = (best - largest).exp_()
    before = weights.cumsum(-1, dtype=torch.float64).sub_(weights)
    # The first token has nothing before it, so that one is always kept.
    last = (before < wanted).sum(-1, keepdim=True).clamp_(min=1) - 1
    unsure = last[:, 0] == size - 1 if size < vocab else torch.zeros_like(last[:, 0], dtype=torch.bool)
    return best.gather(-1, last), unsure
