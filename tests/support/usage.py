"""Usage of experts, as a run would have recorded it."""

import numpy as np

from cost_model.model.arch import ModelArch
from cost_model.routing.expert_usage import ExpertUsage

MIXTRAL = ModelArch.from_name("Mixtral-8x7B")


def skewed(arch=MIXTRAL, tokens=1000, seed=1):
    """Usage in which a few experts of each layer, others in each, get most tokens."""
    rng, counts = np.random.default_rng(seed), np.zeros((arch.num_layers, arch.num_experts), dtype=np.int64)
    weights = 1.0 / np.arange(1, arch.num_experts + 1) ** 1.5
    for layer in range(arch.num_layers):
        # Gumbel's trick: k different experts for each token.
        scores = np.log(rng.permutation(weights)) + rng.gumbel(size=(tokens, arch.num_experts))
        counts[layer] = np.bincount(scores.argsort(axis=1)[:, -arch.top_k :].ravel(), minlength=arch.num_experts)
    return ExpertUsage(model=arch.fingerprint(), tokens=tokens, counts=counts)
