"""What happens between the products of a layer: norm, rotary embedding with new keys and values to their pages, gate, rows put or
added to others.

On the CPU each is one pass over memory in native code, with float32 inside and one rounding at the end. Elsewhere, and where
there is no native library, torch does it.

Legend: n rows or tokens, D numbers of a row, H heads, G KV heads, d head size, w elements of a head in a pool, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flexmoe.formats.packed_kv import is_packed, pack
from flexmoe.kernels.native import elementwise as native

#: Cosine and sine of rotary embedding.
Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class NewKV:
    """Where keys and values of new tokens go: those of the tokens [start, stop) of a batch, to slots of a pool.

    Attributes:
        k_pool, v_pool: pages ``[pages, page_tokens, G, w]``, of plain or of compressed heads.
        slots: int64 ``[stop - start]``, flat token slots.
        start, stop: tokens of the batch.
    """

    k_pool: torch.Tensor
    v_pool: torch.Tensor
    slots: torch.Tensor
    start: int
    stop: int

    def put(self, k_nGd: torch.Tensor, v_nGd: torch.Tensor) -> None:
        """Write them, given keys, rotated, and values of all tokens of the batch."""
        k_nGd, v_nGd = k_nGd[self.start : self.stop], v_nGd[self.start : self.stop]
        if is_packed(self.k_pool):
            k_nGd, v_nGd = pack(k_nGd), pack(v_nGd)
        put_rows((self.k_pool.flatten(0, 1), self.v_pool.flatten(0, 1)), self.slots, (k_nGd, v_nGd))


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float, *, weight_first: bool = False) -> torch.Tensor:
    """RMSNorm over the last dimension in float32 (Zhang and Sennrich 2019).

    Args:
        weight_first: the weight is applied before rounding, not after it.
    """
    if native.fits(x, weight_D) and x.is_contiguous():
        return native.norm(x.flatten(0, -2), weight_D, eps, weight_first=weight_first).view(x.shape)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_D.float() * wide).to(x.dtype) if weight_first else weight_D * wide.to(x.dtype)


def add_and_norm(
    h_nD: torch.Tensor,
    added_nD: torch.Tensor,
    factor: float,
    weight_D: torch.Tensor,
    eps: float,
    *,
    weight_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum ``h + factor · added``, and its `rms_norm`; the sum may take the place of what is added."""
    if native.fits(h_nD, added_nD, weight_D):
        normed = native.norm(h_nD, weight_D, eps, weight_first=weight_first, added_nD=added_nD, factor=factor)
        return added_nD, normed
    h_nD = torch.add(h_nD, added_nD, alpha=factor)
    return h_nD, rms_norm(h_nD, weight_D, eps, weight_first=weight_first)


def rotate(
    q_nHd: torch.Tensor,
    k_nGd: torch.Tensor,
    v_nGd: torch.Tensor,
    angles: Angles,
    new: NewKV | None = None,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned by cosine and sine, perhaps in place; dimensions behind the turned ones stay as they are.

    Args:
        q_nHd, k_nGd, v_nGd: of a batch's tokens.
        angles: cosine and sine ``[n, 1, rotated]``, the two halves of which are equal.
        new: where keys, turned, and values of some tokens go. What is returned of the keys of these tokens is undefined.
        interleaved: pairs are neighbours, not of the two halves. The result then has the first of all pairs before the
            second ones, in queries as in keys, which their products do not see.
    """
    pools = None if new is None else (new.k_pool, new.v_pool)
    if native.can_rotate(q_nHd, k_nGd, v_nGd, angles, pools):
        slots, first = (None, 0) if new is None else (new.slots, new.start)
        native.rotate(q_nHd, k_nGd, v_nGd, angles, interleaved=interleaved, pools=pools, slots_m=slots, first=first)
        return q_nHd, k_nGd
    q_nHd, k_nGd = _turned(q_nHd, angles, interleaved), _turned(k_nGd, angles, interleaved)
    if new is not None:
        new.put(k_nGd, v_nGd)
    return q_nHd, k_nGd


def _turned(x_nHd: torch.Tensor, angles: Angles, interleaved: bool) -> torch.Tensor:
    cos, sin = angles
    turned, rest = x_nHd[..., : cos.shape[-1]], x_nHd[..., cos.shape[-1] :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    if interleaved:
        turned = torch.cat([first, second], dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def silu_gate(gate_nF: torch.Tensor, up_nF: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up``, in place of the gate."""
    if native.fits(gate_nF, up_nF):
        return native.gate(gate_nF, up_nF, gate_nF)
    return F.silu(gate_nF, inplace=True).mul_(up_nF)


def clamped_gate(gate_nF: torch.Tensor, up_nF: torch.Tensor, limit: float, slope: float) -> torch.Tensor:
    """``gate · sigmoid(slope · gate) · (up + 1)``, gate clamped from above and up from both sides.

    The two may be every second number of one row each, gate first.
    """
    alternate = gate_nF.stride(-1) == 2 and up_nF.data_ptr() == gate_nF.data_ptr() + gate_nF.element_size()
    if alternate and native.fits(gate_nF.as_strided((len(gate_nF), 1), (gate_nF.stride(0), 1))):
        return native.gate(gate_nF, up_nF, torch.empty(gate_nF.shape, dtype=gate_nF.dtype), (limit, slope))
    if native.fits(gate_nF, up_nF):
        return native.gate(gate_nF, up_nF, gate_nF, (limit, slope))
    gate_nF, up_nF = gate_nF.clamp(max=limit), up_nF.clamp(-limit, limit)
    return torch.sigmoid(gate_nF * slope).mul_(gate_nF).mul_(up_nF.add_(1))


def add_rows(to_TD: torch.Tensor, places_n: torch.Tensor, from_nD: torch.Tensor, factors_n1: torch.Tensor) -> None:
    """``to[places[i]] += factors[i] · from[i]``; what is added may be overwritten."""
    if native.fits(to_TD, from_nD, factors_n1):
        native.add_rows(to_TD, places_n, from_nD, factors_n1)
    else:
        to_TD.index_add_(0, places_n, from_nD.mul_(factors_n1))


def put_rows(
    to: tuple[torch.Tensor, torch.Tensor], places_n: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """``to[which][places[i]] = rows[which][i]`` for both of two, which are alike."""
    if native.can_put(to, rows):
        native.put_rows(to, places_n, rows)
        return
    for own, new in zip(to, rows):
        own.index_copy_(0, places_n, new)
