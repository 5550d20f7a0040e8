"""The weights of synthetic checkpoints: decided by seed and name alone, so that every layout holds the same model."""

from __future__ import annotations

import zlib

import torch

from scripts.checkpoints.router_skew import RouterSkew
from scripts.checkpoints.shapes import Matrix, TensorOnDisk

_BIAS_STD = 0.02


class Values:
    """What a checkpoint's tensors hold.

    Args:
        seed: decides every weight, together with its name in the hub's layout.
        skew: makes routers prefer some experts; None: all experts are chosen about alike.
    """

    def __init__(self, seed: int, skew: RouterSkew | None = None):
        self._seed, self._skew = seed, skew

    def tensor(self, tensor: TensorOnDisk, dtype: torch.dtype) -> torch.Tensor:
        """One tensor; one that holds several matrices is put together matrix by matrix."""
        if len(tensor.matrices) == 1:
            return self._matrix(*tensor.matrices.values(), tensor.shape).to(dtype)
        whole = torch.empty(tensor.shape, dtype=dtype)
        pieces = whole.view(len(tensor.matrices), *tensor.matrix_shape)
        for piece, matrix in zip(pieces, tensor.matrices.values(), strict=True):
            piece.copy_(self._matrix(matrix, tensor.matrix_shape))
        return whole

    def _matrix(self, matrix: Matrix, shape: tuple[int, ...]) -> torch.Tensor:
        values = _random(matrix.name, shape, self._seed)
        if self._skew is not None:
            self._skew.apply(values, matrix)
        return values


def _random(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Float32 values decided by seed and name.

    A standard deviation of 1/sqrt(inputs) keeps activations near one at any width (0.0156 at Mixtral's 4096, where
    real weights have about 0.02): narrow models with a fixed 0.02 would repeat a constant token.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if name.endswith(".bias"):
        return torch.empty(shape).normal_(0.0, _BIAS_STD, generator=generator)
    if len(shape) == 1:
        return torch.empty(shape).normal_(1.0, 0.1, generator=generator)
    return torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)
