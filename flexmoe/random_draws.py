"""Random numbers by counter: a draw is a function of its place alone, whatever was drawn before it or beside it.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), on the host, many rows at once.
A row's stream is named by a seed, a key and the index of the sample; the t-th number of a stream does not depend on the
block, shard, order, device or restart in which it is asked for.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def stream_of(seed: int, key: str, index: int) -> int:
    """The 64-bit name of a stream: a hash of a job's or a row's seed, the row's key and the sample's index."""
    text = f"{seed}\n{index}\n{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(streams: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The number at ``places[i]`` of ``streams[i]``.

    Args:
        streams: uint64 ``[R]``, from `stream_of`.
        places: uint64 ``[R]``, counted from 0.

    Returns:
        np.ndarray: float64 ``[R]`` in [0, 1), of 53 random bits each.
    """
    zero = np.zeros(len(places), dtype=np.uint64)
    first, second, _, _ = philox((places & _LOW, places >> _HALF, zero, zero), (streams & _LOW, streams >> _HALF))
    return ((first << _HALF | second) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def philox(counter: tuple[np.ndarray, ...], key: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Philox-4x32-10: four random words of 32 bits for four counter words and two key words, all uint64 ``[R]``."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        key0, key1 = k0 + np.uint64(turn * _WEYL[0]) & _LOW, k1 + np.uint64(turn * _WEYL[1]) & _LOW
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ key0, right & _LOW, (left >> _HALF) ^ c3 ^ key1, left & _LOW
    return c0, c1, c2, c3
