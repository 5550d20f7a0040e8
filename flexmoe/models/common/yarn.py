"""YaRN (Peng et al. 2023, arXiv 2309.00071): short wavelengths of the rotary embedding stay, long ones are stretched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def yarn(periods: torch.Tensor, base: float, context: int, values: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """Frequencies ``[Dh / 2]``, and the factor on cosine and sine.

    Args:
        periods: float32 ``[Dh / 2]``, the powers of the base.
        base: of the rotary embedding.
        context: tokens of the model's context.
        values: the config's ``rope_parameters`` or ``rope_scaling``, with transformers' defaults for what is absent.
    """
    original = values["original_max_position_embeddings"]
    factor = values.get("factor") or context / original
    low, high = (_rotating(values.get(name) or default, len(periods), base, original) for name, default in _BETAS)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(periods) - 1)
    ramp = (torch.arange(len(periods), dtype=torch.float32) - low) / (high - low if high > low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept, _attention_factor(factor, values)


_BETAS = (("beta_fast", 32), ("beta_slow", 1))


def _rotating(rotations: float, pairs: int, base: float, original: int) -> float:
    """The pair of dimensions, not a whole number, that turns so many times within the original context."""
    return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(base)


def _attention_factor(factor: float, values: Mapping[str, Any]) -> float:
    """What the logits are made sharper by, as far as cosine and sine do it; section 3.4 of the paper."""
    given, of_all = values.get("attention_factor"), values.get("mscale_all_dim")
    if given is not None:
        return float(given)
    if values.get("mscale") and of_all:
        return _scale(factor, values["mscale"]) / _scale(factor, of_all)
    return _scale(factor, 1.0)


def _scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
