"""Compressed KV: the keys, or the values, of a head of a token as int8 with one scale for all of them.

A head's numbers lie one after the other, and behind them, at an even byte, the scale in bfloat16: see
`cost_model.model.kv_bytes`. A tensor of such heads has int16 words for elements, ``[..., G, w]``, so that whatever moves KV
moves it as it moves plain numbers. A value is number times scale; no number is beyond 127.

Legend: T tokens, G KV heads, d head size, w words of a head.
"""

from __future__ import annotations

import torch

from cost_model.model.kv_bytes import kv_head_bytes

#: Elements of a tensor of compressed heads.
WORD = torch.int16
_LARGEST = 127


def is_packed(pool: torch.Tensor) -> bool:
    """Whether a tensor holds compressed heads."""
    return pool.dtype is WORD


def head_words(head_dim: int) -> int:
    """Words of a compressed head."""
    return kv_head_bytes(head_dim, 1, compressed=True) // WORD.itemsize


def pack(x_TGd: torch.Tensor) -> torch.Tensor:
    """The heads compressed, ``[T, G, w]`` words: the scale is the largest absolute value over 127, numbers are rounded to the
    nearest, ties to even.

    Where a value is not finite, all values of the head become NaN.
    """
    size = x_TGd.shape[-1]
    words = x_TGd.new_zeros(*x_TGd.shape[:-1], head_words(size), dtype=WORD)
    scale = (x_TGd.abs().amax(-1, keepdim=True).float() / _LARGEST).to(torch.bfloat16)
    words[..., -1:].view(torch.bfloat16).copy_(scale)
    divisor = scale.float()
    numbers = torch.div(x_TGd, divisor.masked_fill_(divisor == 0, 1))
    numbers.round_().nan_to_num_(0).clamp_(-_LARGEST, _LARGEST)
    words[..., :-1].view(torch.int8)[..., :size].copy_(numbers)
    return words


def unpack(words: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The values of compressed heads, in ``out`` ``[..., G, d]`` of any float dtype; returns it."""
    numbers = words[..., :-1].view(torch.int8)[..., : out.shape[-1]]
    return torch.mul(numbers, words[..., -1:].view(torch.bfloat16).float(), out=out)


def copied_pages(
    pool: torch.Tensor, pages: slice | torch.Tensor, q_THd: torch.Tensor, room: torch.Tensor | None
) -> torch.Tensor:
    """Pages of a pool of keys, or of values, side by side as numbers that queries are attended with: ``[P, page_tokens, G, d]``.

    Args:
        pool: ``[pages, page_tokens, G, d]``, or of compressed heads.
        pages: which; a slice, or an int32 index.
        room: of at least as many pages, where they are copied to; made when absent.
    """
    if not is_packed(pool):
        if isinstance(pages, slice):
            raise ValueError("pages that lie side by side already are attended where they are")
        return torch.index_select(pool, 0, pages, out=None if room is None else room[: len(pages)])
    words = pool[pages] if isinstance(pages, slice) else torch.index_select(pool, 0, pages)
    size = q_THd.shape[-1]
    return unpack(words, q_THd.new_empty(*words.shape[:-1], size) if room is None else room[: len(words)])
