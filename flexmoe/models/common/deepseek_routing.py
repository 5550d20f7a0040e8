"""Routing as in DeepSeek-V3, which several families have taken over."""

from collections.abc import Mapping
from typing import Any

from flexmoe.models.common.router import SIGMOID, Router


def deepseek_router(config: Mapping[str, Any], top_k: int, *, normalized: bool) -> Router:
    """Sigmoid scores, the best groups, a scale (arXiv 2412.19437, section 2.1.2).

    Args:
        config: the parsed `config.json`.
        top_k: experts of a token.
        normalized: what transformers takes where the config lacks ``norm_topk_prob``.
    """
    return Router(
        top_k=top_k,
        score=SIGMOID,
        groups=config.get("n_group") or 1,
        top_groups=config.get("topk_group") or 1,
        normalized=bool(config.get("norm_topk_prob", normalized)),
        sum_epsilon=1e-20,
        scale=float(config.get("routed_scaling_factor") or 1.0),
    )
