"""Router statistics of random routing."""

import numpy as np

from cost_model.routing.router_stats import RouterStats

MODEL = {"model_type": "qwen3_moe", "num_layers": 3, "num_experts": 5, "top_k": 2, "dense_layers": [1]}


def made(tokens=40, seed=0, model=None):
    model = dict(model or MODEL)
    rng = np.random.default_rng(seed)
    layers, experts, k = (model[name] for name in ("num_layers", "num_experts", "top_k"))
    chosen = (rng.random((layers, tokens, experts)).argsort(axis=2) < k).astype(np.int64)
    chosen[model.get("dense_layers", [])] = 0
    together = np.einsum("lte,ltf->lef", chosen, chosen)
    return RouterStats(model=model, tokens=tokens, counts=chosen.sum(axis=1), coactivation=together)
