"""Random numbers by counter: a draw is a function of its place alone, whatever was drawn before it or beside it.

Every draw has a key of 64 bits, by Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
on the host, many rows at once. A row's stream is named by a seed, a key and the index of the sample; the key of the t-th
draw of a stream does not depend on the block, shard, order, device or restart in which it is asked for. From it follows
one random number for every token of the vocabulary, by an integer hash that is exact on every device.

Legend: R draws, V vocabulary.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from flexmoe.kernels.native import choice, library

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
#: The multipliers of the hash (Ettinger, "Prospecting for hash functions", lowbias32 of 2018, improved 2022).
_HASH = 0x21F0AAAD, 0xD35A2D97
#: Numbers are at most this, so that every token keeps a chance.
_LARGEST = 1 - 2.0**-24


def stream_of(seed: int, key: str, index: int) -> int:
    """The 64-bit name of a stream: a hash of a job's or a row's seed, the row's key and the sample's index."""
    text = f"{seed}\n{index}\n{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def draw_keys(streams: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The keys of the draws ``places[i]`` of ``streams[i]``.

    Args:
        streams: uint64 ``[R]``, from `stream_of`.
        places: uint64 ``[R]``, counted from 0.

    Returns:
        np.ndarray: uint32 ``[R, 2]``.
    """
    zero = np.zeros(len(places), dtype=np.uint64)
    first, second, _, _ = philox((places & _LOW, places >> _HALF, zero, zero), (streams & _LOW, streams >> _HALF))
    return np.stack([first, second], axis=1).astype(np.uint32)


def philox(counter: tuple[np.ndarray, ...], key: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Philox-4x32-10: four random words of 32 bits for four counter words and two key words, all uint64 ``[R]``."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        key0, key1 = k0 + np.uint64(turn * _WEYL[0]) & _LOW, k1 + np.uint64(turn * _WEYL[1]) & _LOW
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ key0, right & _LOW, (left >> _HALF) ^ c3 ^ key1, left & _LOW
    return c0, c1, c2, c3


def first_arrivals(x_RV: torch.Tensor, keys_R2: torch.Tensor) -> torch.Tensor:
    """The tokens that win the race: those whose logit less the logarithm of its arrival is largest.

    Args:
        x_RV: float32 logits, minus infinity for tokens that may not win; overwritten.
        keys_R2: int32, from `draw_keys`, on the same device.

    Returns:
        torch.Tensor: int64 ``[R]``.
    """
    if x_RV.device.type == "cpu" and library.available():
        return choice.winners(x_RV, keys_R2)
    return x_RV.sub_(log_arrivals(keys_R2, x_RV.shape[-1])).argmax(dim=-1)


def log_arrivals(keys_R2: torch.Tensor, vocab: int) -> torch.Tensor:
    """Logarithms of exponential random numbers, one for every token of every draw: the times of a race.

    Args:
        keys_R2: int32, from `draw_keys`.

    Returns:
        torch.Tensor: float32 ``[R, V]`` on the device of the keys, all finite.
    """
    return log_exponentials(token_words(keys_R2, vocab))


def token_words(keys_R2: torch.Tensor, vocab: int) -> torch.Tensor:
    """32 random bits for every token of every draw: int32 ``[R, V]``, to be read as unsigned."""
    words_RV = torch.arange(vocab, dtype=torch.int32, device=keys_R2.device).mul_(_signed(_WEYL[0])) + keys_R2[:, :1]
    return _hash(_hash(words_RV).add_(keys_R2[:, 1:]))


def log_exponentials(words_RV: torch.Tensor) -> torch.Tensor:
    """Logarithms of exponential random numbers from random bits, which are overwritten.

    Small ones, which win races, are the exact ones: the number is taken from 0 on, where float32 is finest.
    """
    uniform_RV = words_RV.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST)
    return uniform_RV.neg_().log1p_().neg_().log_()


def _hash(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits that mixes all of them, in place. int32 shifts keep the sign: the mask takes it off."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _signed(_HASH[0])
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(_HASH[1])
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    return x


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
