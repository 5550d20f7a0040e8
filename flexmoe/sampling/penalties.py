"""Logit bias, barred ids and penalties: what changes a row's logits because the request or earlier tokens say so.

Kept per row as the ids that occur and how often, never as a vector over the vocabulary; applied to a chunk of rows by
one gather and one scatter.

Legend: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from flexmoe.params import SamplingParams

_FIRST_ROOM = 32

#: Brings arrays to the device of the logits, all in one copy that nobody waits for.
Upload = Callable[[Sequence[np.ndarray]], list[torch.Tensor]]
#: Begins to bring a tensor to the host; what it returns waits for it.
Download = Callable[[torch.Tensor], Callable[[], torch.Tensor]]


class TokenCounts:
    """Which ids a row holds, each once, and how often each was generated (0: it occurs in the prompt alone).

    Args:
        prompt: ids that count as seen but not as generated; only the repetition penalty asks for them.
        generated: ids generated so far.
    """

    def __init__(self, prompt: Sequence[int], generated: Sequence[int]):
        ids = np.unique(np.asarray(prompt, dtype=np.int64))
        self._used = len(ids)
        self._ids = np.concatenate([ids, np.empty(_FIRST_ROOM, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float32)
        self._place = {token: at for at, token in enumerate(ids.tolist())}
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        """A token was generated."""
        at = self._place.setdefault(token, self._used)
        if at == self._used:
            if at == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[at] = token
            self._used += 1
        self._counts[at] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64: the ids, each once."""
        return self._ids[: self._used]

    @property
    def counts(self) -> np.ndarray:
        """float32: how often each of them was generated."""
        return self._counts[: self._used]


def waiting(device: torch.device) -> Upload:
    """Uploads to a device for callers without pinned memory: each waits until the device has it."""
    return lambda arrays: [torch.from_numpy(a).to(device) for a in arrays]


def add_bias(x_CV: torch.Tensor, params: Sequence[SamplingParams], upload: Upload) -> None:
    """Add each row's logit bias, in place."""
    rows = [(at, p.biased_tokens) for at, p in enumerate(params) if p.biased_tokens]
    if not rows:
        return
    place = np.repeat([at for at, _ in rows], [len(bias) for _, bias in rows])
    pairs = [pair for _, bias in rows for pair in bias]
    tokens, values = np.array([token for token, _ in pairs]), np.array([value for _, value in pairs], np.float32)
    rows_n, tokens_n, values_n = upload([place, tokens, values])
    x_CV[rows_n, tokens_n] += values_n


def bar_tokens(x_CV: torch.Tensor, barred: Sequence[Sequence[int]], upload: Upload) -> None:
    """Make it impossible that a row gets one of its ``barred`` ids, in place; ids outside the vocabulary are no matter."""
    pairs = [(at, token) for at, ids in enumerate(barred) for token in ids if token < x_CV.shape[-1]]
    if pairs:
        (pairs_2n,) = upload([np.array(pairs).T.copy()])
        x_CV.index_put_(tuple(pairs_2n), x_CV.new_full((), -torch.inf))


def penalize(
    x_CV: torch.Tensor,
    params: Sequence[SamplingParams],
    counts: Sequence[TokenCounts | None],
    upload: Upload,
) -> None:
    """Apply each row's penalties, in place; rows without counts are left alone.

    As in vLLM: first the repetition penalty (Keskar et al. 2019, CTRL, equation 2 with negative logits multiplied),
    then the frequency and the presence penalty of OpenAI's API.
    """
    rows = [(at, p, c) for (at, p), c in zip(enumerate(params), counts) if c is not None and len(c.ids)]
    if not rows:
        return
    sizes = [len(c.ids) for _, _, c in rows]

    def spread(values: list[int] | list[float], dtype: type) -> np.ndarray:
        return np.repeat(np.array(values, dtype), sizes)

    place, ids, repetition, frequency, presence, times = upload(
        [
            spread([at for at, _, _ in rows], np.int64),
            np.concatenate([c.ids for _, _, c in rows]),
            spread([p.repetition_penalty for _, p, _ in rows], np.float32),
            spread([p.frequency_penalty for _, p, _ in rows], np.float32),
            spread([p.presence_penalty for _, p, _ in rows], np.float32),
            np.concatenate([c.counts for _, _, c in rows]),
        ]
    )
    x = x_CV[place, ids]
    x = torch.where(x > 0, x / repetition, x * repetition)
    x -= frequency * times
    x -= presence * (times > 0)
    x_CV[place, ids] = x
