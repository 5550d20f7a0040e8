"""Numbers of a few bits that lie in 32-bit words, the first in the lowest bits."""

from __future__ import annotations

import torch

WORD_BITS = 32


def words(numbers: int, bits: int) -> int:
    """Words that so many numbers take."""
    return -(-numbers * bits // WORD_BITS)


def unpacked(
    packed: torch.Tensor, bits: int, dim: int, count: int, order: tuple[int, ...] | None = None
) -> torch.Tensor:
    """The numbers of int32 words as uint8, spread along a dimension.

    Args:
        packed: int32 words.
        bits: of a number, 4 or 8.
        dim: along which a word holds numbers that follow each other.
        count: of them along that dimension; the last word may hold more.
        order: the place in a word of each number in turn; default: rising.
    """
    per_word = WORD_BITS // bits
    places = torch.tensor(order or range(per_word), dtype=torch.int32, device=packed.device) * bits
    dim %= packed.dim()
    shifts = places.view(-1, *[1] * (packed.dim() - 1 - dim))
    numbers = (packed.unsqueeze(dim + 1) >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)
    return numbers.flatten(dim, dim + 1).narrow(dim, 0, count)


def packed_words(numbers: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The inverse: int32 words of numbers (uint8) along a dimension; what is missing in the last word is 0."""
    per_word, dim = WORD_BITS // bits, dim % numbers.dim()
    moved = numbers.movedim(dim, -1).to(torch.int64)
    count = words(moved.shape[-1], bits)
    padded = torch.nn.functional.pad(moved, (0, count * per_word - moved.shape[-1])).unflatten(-1, (count, per_word))
    shifts = torch.arange(per_word, device=numbers.device) * bits
    joined = (padded << shifts).sum(-1)
    return torch.where(joined >= 1 << 31, joined - (1 << 32), joined).to(torch.int32).movedim(-1, dim).contiguous()
