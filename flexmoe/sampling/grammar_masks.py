"""Applies the masks of grammars to logits.

Legend: C rows of a chunk, N of them with a mask, V vocabulary, W bytes of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flexmoe.sampling.penalties import Upload


def permit_only(x_CV: torch.Tensor, masks: Sequence[np.ndarray | None], upload: Upload) -> None:
    """Make every id impossible that a row's mask does not permit, in place.

    Args:
        masks: uint8 ``[W]`` of each row, a bit for each id, the lowest first; ids beyond it are not permitted. None: all are.
        upload: brings arrays to the device.
    """
    masked = [at for at, mask in enumerate(masks) if mask is not None]
    if not masked:
        return
    vocab = x_CV.shape[-1]
    rows_N, bits_NW = upload([np.array(masked), np.stack([_padded(masks[at], -(-vocab // 8)) for at in masked])])
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=x_CV.device)
    barred_NV = ((bits_NW[:, :, None] >> shifts_8) & 1).flatten(1)[:, :vocab] == 0
    if len(masked) == len(masks):
        x_CV.masked_fill_(barred_NV, -torch.inf)
    else:
        x_CV[rows_N] = x_CV[rows_N].masked_fill_(barred_NV, -torch.inf)


def _padded(mask: np.ndarray | None, size: int) -> np.ndarray:
    """A mask of as many bytes as the vocabulary of the logits has."""
    padded = np.zeros(size, np.uint8)
    if mask is not None:
        padded[: len(mask)] = mask[:size]
    return padded
