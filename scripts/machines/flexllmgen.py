"""The T4 machine of FlexLLMGen's planner: its fitted constants (`CostModelConfig` in its cost_model.py) in our fields.

There GB is 2^30 bytes and T is 10^12; a multiply-add is two FLOPs, as here. Its attention is that of one query head per
KV head in 16 bits, so decode attention does one FLOP per byte of KV.
"""

from __future__ import annotations

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import Gpu, Hardware
from policies.common.memory_units import GIB

PREFILL_FLOPS_PER_S, DECODE_FLOPS_PER_S = 21.24e12, 4.3e12
#: The batch that its corrections c1 and c2 take for a large one; beyond it, its decode rate says nothing.
DECODE_TOKENS = 64
SINGLE_SHARE = 4 / 21  # of 16 bits, as in the preset t4
EXPERT_ELEMENTS, DENSE_ELEMENTS = 3 * 4096 * 14336, 41_984_000

_ABSENT = "FlexLLMGen's planner has no such cost: 0"
_CURVE = (
    "mm_flops_g 4.3 TFLOP/s up to 64 tokens (a decode batch), mm_flops_p 21.24 TFLOP/s (prefill) from where that takes as "
    "long as 64 tokens at the former; one curve for all products, as there. 32 bits: 4/21 of it, as in the preset t4, since "
    "FlexLLMGen has none."
)
SOURCES = {
    "memory_bytes": "gmem 15 GB; FlexLLMGen takes 80 % of it (alpha_g) when it plans",
    "reserved_bytes": "gmem is what it takes as usable of the 16 GB: 0",
    "experts": _CURVE,
    "dense": _CURVE,
    "memory_bytes_per_s": "no constant; datasheet of the T4, 320 GB/s, at 80 %, as in the preset t4",
    "h2d_bytes_per_s": "ctog_bdw 12.89 GB/s",
    "d2h_bytes_per_s": "gtoc_bdw_hidden 4.82 GB/s, which it takes for hidden states",
    "h2d_duplex_bytes_per_s": "as alone: it lets the directions not disturb each other",
    "d2h_duplex_bytes_per_s": "as alone: it lets the directions not disturb each other",
    "kv_load_bytes_per_s": "ctog_bdw 12.89 GB/s: its caches are whole tensors, and nothing is gathered",
    "kv_store_bytes_per_s": "gtoc_bdw_cache 0.97 GB/s",
    "attention_bytes_per_s": "bmm_flops_g 0.079 TFLOP/s at one FLOP per byte of KV",
    "attention_flops_per_s": "bmm_flops_p 9.97 TFLOP/s",
    "op_s": _ABSENT,
    "score_s": _ABSENT,
    "h2d_busy_latency_s": _ABSENT,
    "unpack_s": _ABSENT,
    "int8_attention": _ABSENT,
    "cpu_int8_attention": _ABSENT,
    "process_bytes": "FlexLLMGen's planner counts none: 0",
    "cores": "no constant; chosen as in the preset t4",
    "host_memory_bytes": "cmem 204 GB; FlexLLMGen takes 80 % of it (alpha_c) when it plans",
    "host_bytes_per_s": "no constant; 80 GB/s as in the preset t4",
    "disk_bytes": "nmem 1500 GB; FlexLLMGen takes 80 % of it (alpha_n) when it plans",
    "disk_read_bytes_per_s": "dtoc_bdw 0.473 GB/s",
    "disk_write_bytes_per_s": "ctod_bdw_cache_p 0.746 GB/s, that of the prompts' KV, the bulk of what is written",
    "h2d_core_s_per_byte": _ABSENT,
    "disk_read_core_s_per_byte": _ABSENT,
    "disk_write_core_s_per_byte": _ABSENT,
    "kv_block_read_s": _ABSENT,
    "kv_block_core_s": _ABSENT,
    "kv_block_write_s": _ABSENT,
    "disk_latency_s": _ABSENT,
    "disk_busy_latency_s": _ABSENT,
    "handoff_s": _ABSENT,
    "disk_read_beside_compute": "FlexLLMGen's planner has no such loss: 1",
    "cpu_attention_bytes_per_s": "cpu_flops 0.0123 TFLOP/s at one FLOP per byte of KV",
    "cpu_attention_flops_per_s": "cpu_flops 0.0123 TFLOP/s, fitted on decoding; its prompts are never attended on the CPU",
    "row_s": _ABSENT,
    "sweep_s": _ABSENT,
    "without a field": "ctod_bdw_hidden_p and ctod_bdw_g 2.015 GB/s (hidden states, and KV while decoding); c1, c2 and c3, "
    "which lower cpu_flops for batches below 64 and hidden sizes below 4096; 5 % off dtoc_bdw for weights while decoding; "
    "and that copies to the GPU are added to the slowest other lane while decoding.",
}


def t4_flexllmgen() -> Hardware:
    """The machine as FlexLLMGen's planner sees it."""
    up, hidden_down, cache_down = 12.89 * GIB, 4.82 * GIB, 0.97 * GIB
    gpu = Gpu(
        name="NVIDIA T4",
        memory_bytes=15 * GIB,
        reserved_bytes=0,
        experts=_curves(EXPERT_ELEMENTS),
        dense=_curves(DENSE_ELEMENTS),
        memory_bytes_per_s=256e9,
        h2d_bytes_per_s=up,
        d2h_bytes_per_s=hidden_down,
        h2d_duplex_bytes_per_s=up,
        d2h_duplex_bytes_per_s=hidden_down,
        kv_load_bytes_per_s=up,
        kv_store_bytes_per_s=cache_down,
        attention_bytes_per_s=79e9,
        attention_flops_per_s=9.97e12,
        op_s=0.0,
    )
    return Hardware(
        name="t4-flexllmgen",
        device="cuda",
        gpus=(gpu,),
        cores=24,
        host_memory_bytes=204 * GIB,
        host_bytes_per_s=80e9,
        disk_bytes=1500 * GIB,
        disk_read_bytes_per_s=0.473 * GIB,
        disk_write_bytes_per_s=0.746 * GIB,
        h2d_core_s_per_byte=0.0,
        disk_read_core_s_per_byte=0.0,
        disk_write_core_s_per_byte=0.0,
        kv_block_read_s=0.0,
        kv_block_core_s=0.0,
        kv_block_write_s=0.0,
        disk_latency_s=0.0,
        disk_busy_latency_s=0.0,
        handoff_s=0.0,
        cpu_attention_bytes_per_s=12.3e9,
        cpu_attention_flops_per_s=12.3e9,
        row_s=0.0,
        sweep_s=0.0,
        sources=SOURCES,
    )


def _curves(elements: int) -> dict[int, GemmRates]:
    knee = DECODE_TOKENS * PREFILL_FLOPS_PER_S / DECODE_FLOPS_PER_S
    rates = (DECODE_FLOPS_PER_S, DECODE_FLOPS_PER_S, PREFILL_FLOPS_PER_S)
    shares = {2: 1.0, 4: SINGLE_SHARE}
    return {
        each: GemmRates(
            tokens=(1, DECODE_TOKENS, knee),
            weight_elements=(elements,),
            flops_per_s=(tuple(share * rate for rate in rates),),
        )
        for each, share in shares.items()
    }
