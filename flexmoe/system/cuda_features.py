"""What a CUDA device has, and how torch is told to use it.

Capability is the pair that NVIDIA calls compute capability.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Elsewhere torch's grouped product is a loop over the experts that waits for the device twice.
_GROUPED = ((9, 0), (10, 0))
_FLASH = (8, 0)


def has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has one kernel for a grouped product of these numbers on a CUDA device."""
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) in _GROUPED


def has_flash_attention(device: torch.device) -> bool:
    """Whether torch has flash attention of 16-bit numbers on a CUDA device."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= _FLASH


def prepare_torch() -> None:
    """Settings of the process for CUDA. Masked attention does without cuDNN: it makes and keeps a plan for every exact
    shape, in tens to hundreds of milliseconds each, and here shapes change in every sweep."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def warm_kernels(device: torch.device) -> None:
    """Use once what a sweep uses, so that the memory of its kernels and libraries is taken before room is measured."""
    emulated = torch.cuda.get_device_capability(device) < _FLASH
    for dtype in (torch.float32, torch.float16, *(() if emulated else (torch.bfloat16,))):
        a = torch.ones(512, 512, dtype=dtype, device=device)
        torch.topk(torch.softmax(F.linear(a, a), dim=-1), 2).indices.flatten().sort(stable=True)
        rows = torch.arange(512, device=device)
        torch.zeros_like(a).index_copy_(0, rows, a.index_select(0, rows)).index_add_(0, rows, a)
        _warm_attention(a, device)
        if has_grouped_mm(device, dtype):
            F.grouped_mm(
                a, a.view(2, 256, 512).transpose(1, 2), offs=torch.tensor([200, 512], dtype=torch.int32).to(device)
            )
    torch.cuda.current_stream(device).synchronize()


def _warm_attention(a: torch.Tensor, device: torch.device) -> None:
    """With a mask, and where there is flash attention, of rows that decode and of others."""
    heads = a.view(1, 8, 256, 128)
    F.scaled_dot_product_attention(heads, heads, heads, attn_mask=torch.ones(256, 256, dtype=torch.bool, device=device))
    if a.dtype == torch.float32 or not has_flash_attention(device):
        return
    k_TGd = a.view(1024, 2, 128)
    for queries in (1, 4):
        q_THd = a.view(-1)[: 4 * queries * 8 * 128].view(-1, 8, 128)
        starts = [torch.arange(0, 5 * n, n, dtype=torch.int32, device=device) for n in (queries, 256)]
        torch.ops.aten._flash_attention_forward(
            q_THd, k_TGd, k_TGd, *starts, queries, 256, 0.0, True, False, seqused_k=starts[1][1:] - starts[1][:-1]
        )
