"""Bytes of the KV cache: what a head of a token stores, plain or as int8.

A compressed head is its numbers as int8, one after the other, and behind them one scale for all of them; where their count is
odd, a byte between the two keeps the scale at an even place.
"""

from __future__ import annotations

#: Bytes of a scale: bfloat16, which has the range of float32. Numbers are divided by the scale as it is stored, so that its
#: eight bits cost no accuracy.
KV_SCALE_BYTES = 2


def kv_head_bytes(head_dim: int, dtype_bytes: int, *, compressed: bool) -> int:
    """Bytes of the keys, or of the values, of one KV head of a token.

    Args:
        head_dim: numbers.
        dtype_bytes: of a number of the compute dtype.
        compressed: they are stored as int8 with a scale.

    Example:
        >>> kv_head_bytes(128, 2, compressed=False), kv_head_bytes(128, 2, compressed=True)
        (256, 130)
    """
    return head_dim + head_dim % 2 + KV_SCALE_BYTES if compressed else head_dim * dtype_bytes
