"""One product of several experts, each over its own tokens, in a single call.

torch has one for weights that lie stacked. Ours, on the CPU, is faster for few tokens per expert and takes the weights of
each expert wherever they lie.

Legend: n tokens, C columns and R rows of a weight, e experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from cost_model.model.weight_units import ROW_BYTES
from flexmoe.formats.packed_matrix import PackedMatrix
from flexmoe.kernels.linear import few_packed_tokens, linear, own_tokens
from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.products import grouped_products
from flexmoe.kernels.native.unpacking import packed_products
from flexmoe.system.cuda_features import has_grouped_mm

#: One matrix of each expert: stacked ``[e, R, C]``, or a ``[R, C]`` for each, which may be packed.
Matrices = torch.Tensor | Sequence[torch.Tensor] | Sequence[PackedMatrix]


def has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has a grouped product for numbers of this dtype."""
    return device.type != "cuda" or has_grouped_mm(device, dtype)


def can_group(matrices: Sequence[Matrices]) -> bool:
    """Whether `grouped_product` takes each of these.

    Torch's product wants a stack whose rows begin at multiples of 16 bytes, as those of the tokens do, and a device that has it.
    """
    stacked = [m for m in matrices if isinstance(m, torch.Tensor)]
    if len(stacked) < len(matrices):
        return matrices[-1][0].device.type == "cpu" and native.available()
    if not has_grouped_product(stacked[0].device, stacked[0].dtype):
        return False
    sizes = [(m.data_ptr(), *(step * m.element_size() for step in (_row_step(m), m.shape[-1]))) for m in stacked]
    return all(size % ROW_BYTES == 0 for of_one in sizes for size in of_one)


def _row_step(stack: torch.Tensor) -> int:
    """Numbers from one row in memory to the next: inputs or, where they come first, outputs of a matrix."""
    return max(stack.stride()[1:])


def with_biases(
    product: Callable[..., torch.Tensor],
    x_nC: torch.Tensor,
    matrices: Matrices,
    biases_eR: torch.Tensor | None,
    *,
    ends_e: torch.Tensor,
) -> torch.Tensor:
    """A grouped product, with the bias of its expert added to each token's; on a GPU without a wait."""
    out_nR = product(x_nC, matrices, ends_e=ends_e)
    if biases_eR is None:
        return out_nR
    if not out_nR.is_cuda:  # no bias is written out for each token
        bounds = [0, *ends_e.tolist()]
        for expert, (start, end) in enumerate(zip(bounds, bounds[1:])):
            if end > start:
                out_nR[start:end] += biases_eR[expert]
        return out_nR
    tokens = torch.arange(len(x_nC), dtype=ends_e.dtype, device=ends_e.device)
    return out_nR.add_(biases_eR.index_select(0, torch.searchsorted(ends_e, tokens, right=True)))


def product_in_turn(
    x_nC: torch.Tensor,
    matrices: Matrices,
    biases_eR: torch.Tensor | None = None,
    *,
    tokens: Sequence[tuple[int, slice]],
) -> torch.Tensor:
    """The same, ``[n, R]``, by a product for each expert that has tokens, wherever its weights lie.

    Args:
        biases_eR: of the experts.
        tokens: (number of the expert, its tokens); together they are all tokens.
    """
    out_nR = x_nC.new_empty(len(x_nC), matrices[0].shape[0])
    for number, own in tokens:
        matrix = matrices[number]
        if x_nC.is_cuda and isinstance(matrix, torch.Tensor):  # one launch
            torch.mm(x_nC[own], matrix.t(), out=out_nR[own])
        else:
            out_nR[own] = linear(x_nC[own], matrix)
        if biases_eR is not None:
            out_nR[own] += biases_eR[number]
    return out_nR


def grouped_product(x_nC: torch.Tensor, matrices: Matrices, ends_e: torch.Tensor) -> torch.Tensor:
    """``x · matrices[e]^T`` for the tokens ``x_nC[ends_e[e - 1] : ends_e[e]]`` of each expert e: ``[n, R]``."""
    if not isinstance(matrices, torch.Tensor) and isinstance(matrices[0], PackedMatrix):
        return _packed_product(x_nC, cast(Sequence[PackedMatrix], matrices), ends_e)
    rows_lie_well = cast(torch.Tensor, matrices[0]).stride(-1) == 1  # else inputs come first
    few = len(x_nC) <= own_tokens(x_nC.dtype) * len(matrices)
    if few and rows_lie_well and x_nC.device.type == "cpu" and native.available():
        return grouped_products(x_nC, cast(torch.Tensor | Sequence[torch.Tensor], matrices), ends_e)
    if not isinstance(matrices, torch.Tensor) or (x_nC.device.type == "cpu" and x_nC.dtype != torch.float32):
        return _one_by_one(x_nC, matrices, ends_e)
    product: torch.Tensor = F.grouped_mm(x_nC, matrices.transpose(1, 2), offs=ends_e)
    return product


def _packed_product(x_nC: torch.Tensor, matrices: Sequence[PackedMatrix], ends_e: torch.Tensor) -> torch.Tensor:
    if len(x_nC) <= few_packed_tokens(x_nC.dtype) * len(matrices):
        return packed_products(x_nC.contiguous(), matrices, ends_e)
    return _one_by_one(x_nC, matrices, ends_e)


def _one_by_one(x_nC: torch.Tensor, matrices: Iterable[Any], ends_e: torch.Tensor) -> torch.Tensor:
    bounds = [0, *ends_e.tolist()]
    return torch.cat([linear(x_nC[a:b], m) for m, a, b in zip(matrices, bounds, bounds[1:])])
