"""A product with a weight, on any device at the speed of its hardware.

A CPU without instructions for 16-bit numbers multiplies them in torch several times slower than in float32. There our own
products widen them where they are multiplied; without the native library, the weight is widened piece by piece, and the product
of the pieces is taken in float32.

A CPU that has them takes our own products of few tokens (`own_tokens`) and gives others to oneDNN, which generates code for every number of tokens and keeps it: an
expert gets another number in every sweep, and the code of a thousand products takes hundreds of MiB. So tokens are
padded to one of few numbers (`padded_tokens`). Every row of a product is computed by itself, and what is padded is cut
off. Products in float32 are MKL's, which keeps no such code; they are not padded.

Legend: n tokens, C columns and R rows of a weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from flexmoe.formats.packed_matrix import PackedMatrix
from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.products import grouped_products
from flexmoe.kernels.native.unpacking import packed_products
from flexmoe.kernels.native.unpacking import unpack as native_unpack
from flexmoe.system.machine import cpu_flags

#: CPU features of which one makes torch's own products of this dtype fast.
_INSTRUCTIONS = {
    torch.bfloat16: frozenset({"avx512bw", "avx512_bf16", "amx_bf16", "bf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}
_AMX = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
#: Tokens of an expert up to which our own product is faster than torch's (`python -m scripts.packed.own_products`): in tiles of AMX,
#: where torch alone has AMX, where there is AVX-512, elsewhere with instructions for 16-bit numbers, and of float32, which MKL
#: multiplies.
_OWN_TOKENS_TILES, _OWN_TOKENS_AMX, _OWN_TOKENS_AVX512, _OWN_TOKENS, _OWN_TOKENS_FLOAT32 = 256, 32, 64, 12, 32
#: Tokens up to which a packed weight is multiplied where it is unpacked, some rows at a time in a core's own cache, instead of
#: by torch: where torch alone has AMX, where there is AVX-512, and elsewhere. In tiles of AMX it always is.
_PACKED_TOKENS_AMX, _PACKED_TOKENS_AVX512, _PACKED_TOKENS = 16, 512, 12
#: Least tokens that are multiplied at once by oneDNN, and how many sizes there are between a power of two and the next.
_LEAST_TOKENS, _SIZES_PER_OCTAVE = 8, 8
#: Numbers of a weight that are widened at a time: 4 MiB stay in the cache, and the pieces are large enough for threads.
_PIECE = 1 << 20
#: Numbers of a packed weight that are unpacked at a time for a product of torch's: small ones are multiplied more slowly.
_UNPACKED_PIECE = 1 << 22


def linear(
    x_nC: torch.Tensor, weight_RC: torch.Tensor | PackedMatrix, bias_R: torch.Tensor | None = None
) -> torch.Tensor:
    """``x · weight^T + bias``: ``[n, R]`` in the dtype of ``x``."""
    if isinstance(weight_RC, PackedMatrix):
        return _unpacked_product(x_nC, weight_RC, bias_R)
    if x_nC.device.type != "cpu" or x_nC.dtype not in _INSTRUCTIONS:
        return F.linear(x_nC, weight_RC, bias_R)
    if 0 < len(x_nC) <= own_tokens(x_nC.dtype) and weight_RC.is_contiguous() and native.available():
        x_nC = x_nC if x_nC.stride(1) == 1 else x_nC.contiguous()
        biases = None if bias_R is None else [bias_R]
        return grouped_products(x_nC, [weight_RC], torch.tensor([len(x_nC)], dtype=torch.int32), biases)
    if multiplies(x_nC.dtype):
        more = padded_tokens(len(x_nC)) - len(x_nC)
        return F.linear(F.pad(x_nC, (0, 0, 0, more)) if more else x_nC, weight_RC, bias_R)[: len(x_nC)]
    wide_nC, out_nR = x_nC.float(), x_nC.new_empty(len(x_nC), len(weight_RC))
    rows = max(1, _PIECE // weight_RC.shape[1])
    for at in range(0, len(weight_RC), rows):
        bias = None if bias_R is None else bias_R[at : at + rows].float()
        out_nR[:, at : at + rows] = F.linear(wide_nC, weight_RC[at : at + rows].float(), bias)
    return out_nR


def linears(x_nC: torch.Tensor, weights: Sequence[torch.Tensor | PackedMatrix]) -> list[torch.Tensor]:
    """`linear` with each of some weights: ``[n, R]`` each, in order.

    Packed ones of one shape are multiplied by few tokens in one call, whose threads meet once.
    """
    packed = [weight for weight in weights if isinstance(weight, PackedMatrix)]
    alike = len(packed) == len(weights) and len({weight.shape for weight in packed}) == 1
    if not alike or not len(x_nC) or not _multiplies_packed(x_nC):
        return [linear(x_nC, weight) for weight in weights]
    count, tokens = len(packed), len(x_nC)
    ends = torch.arange(1, count + 1, dtype=torch.int32) * tokens
    return list(packed_products(x_nC.repeat(count, 1), packed, ends).chunk(count))


def _multiplies_packed(x_nC: torch.Tensor) -> bool:
    """Whether our own product of a packed weight is taken for these tokens."""
    return len(x_nC) <= few_packed_tokens(x_nC.dtype) and _is_native(x_nC)


def _unpacked_product(x_nC: torch.Tensor, weight: PackedMatrix, bias_R: torch.Tensor | None) -> torch.Tensor:
    if _multiplies_packed(x_nC):
        product_nR = packed_products(x_nC.contiguous(), [weight], torch.tensor([len(x_nC)], dtype=torch.int32))
        return product_nR if bias_R is None else product_nR.add_(bias_R)
    out_nR = x_nC.new_empty(len(x_nC), weight.shape[0])
    for rows, piece_RC in unpacked_pieces(weight, x_nC.dtype):
        out_nR[:, rows] = linear(x_nC, piece_RC, None if bias_R is None else bias_R[rows])
    return out_nR


def unpacked_pieces(weight: PackedMatrix, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows of a packed weight after the others, in a buffer that is used again; on the CPU as many as stay in its cache."""
    (rows, columns), device = weight.shape, weight.device
    step = rows if device.type != "cpu" else min(rows, max(_LEAST_TOKENS, _UNPACKED_PIECE // columns // 32 * 32))
    buffer = scratch(device, dtype, step * columns)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        yield slice(first, last), unpack(weight, buffer[: (last - first) * columns].view(last - first, columns), first)


def unpack(weight: PackedMatrix, out_RC: torch.Tensor, first: int = 0) -> torch.Tensor:
    """`PackedMatrix.unpack`, on the CPU in native code and on CUDA by Triton where they are there; the values are the same."""
    if _is_native(out_RC):
        return native_unpack(weight, out_RC, first)
    by_triton = _triton_unpack() if out_RC.is_cuda else None
    return weight.unpack(out_RC, first) if by_triton is None else by_triton(weight, out_RC, first)


@cache
def _triton_unpack() -> Callable[[PackedMatrix, torch.Tensor, int], torch.Tensor] | None:
    """None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from flexmoe.kernels.triton_unpacking import unpack

    return unpack


@cache
def own_tokens(dtype: torch.dtype) -> int:
    """Tokens of an expert up to which our own product is faster on this CPU than one of torch's."""
    if dtype not in _INSTRUCTIONS:
        return _OWN_TOKENS_FLOAT32
    if not multiplies(dtype):
        return sys.maxsize
    if _AMX[dtype] in cpu_flags():
        return _OWN_TOKENS_TILES if _in_tiles(dtype) else _OWN_TOKENS_AMX
    return _OWN_TOKENS_AVX512 if "avx512bw" in cpu_flags() else _OWN_TOKENS


@cache
def few_packed_tokens(dtype: torch.dtype) -> int:
    """Tokens of an expert up to which our own product of a packed weight is faster on this CPU than one of torch's."""
    flags = cpu_flags()
    if _AMX.get(dtype) in flags:
        return sys.maxsize if _in_tiles(dtype) else _PACKED_TOKENS_AMX
    return _PACKED_TOKENS_AVX512 if "avx512bw" in flags else _PACKED_TOKENS


def _in_tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and native.has_tiles()


def _is_native(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in native.DTYPE_CODES and native.available()


@cache
def _scratches() -> dict[tuple[torch.device, torch.dtype], torch.Tensor]:
    return {}


def scratch(device: torch.device, dtype: torch.dtype, numbers: int) -> torch.Tensor:
    """A buffer of so many numbers for unpacked weights, the same one each time; kernels of one stream use it in turn."""
    kept = _scratches()
    buffer = kept.get((device, dtype))
    if buffer is None or len(buffer) < numbers:
        kept[device, dtype] = buffer = torch.empty(numbers, dtype=dtype, device=device)
    return buffer[:numbers]


def padded_tokens(tokens: int) -> int:
    """The number of tokens that a product of oneDNN is taken of: 32 of them up to 512, and at most an eighth more above 64."""
    step = max(_LEAST_TOKENS, (1 << max(0, tokens - 1).bit_length()) // (2 * _SIZES_PER_OCTAVE))
    return -(-tokens // step) * step


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of numbers of a dtype."""
    return dtype not in _INSTRUCTIONS or not _INSTRUCTIONS[dtype].isdisjoint(cpu_flags())
