"""When the experts of a unit are computed together, by grouped products: what the runtime does, and the planner predicts."""

from __future__ import annotations

from cost_model.model.arch import ModelArch

#: Mean tokens of an expert up to which a grouped product is at least as fast as a product per expert.
GROUPED_TOKENS = 64
#: Grouped products want rows of a multiple of this.
ROW_BYTES = 16


def are_grouped(arch: ModelArch, dtype_bytes: int, tokens: float) -> bool:
    """Whether a sweep of so many tokens computes the experts of a unit together where their weights lie stacked.

    Args:
        arch: the shape, with the units of the run.
        dtype_bytes: bytes of one number in the compute dtype.
    """
    if arch.experts_per_unit == 1 or tokens * arch.top_k > GROUPED_TOKENS * arch.num_experts:
        return False
    return all(width * dtype_bytes % ROW_BYTES == 0 for width in (arch.hidden, arch.ffn))
