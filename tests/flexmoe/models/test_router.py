"""The routers of the families are those of transformers, over random tokens and over scores that tie or overflow."""

import pytest
import torch
from torch import nn

from flexmoe.models.common.router import SIGMOID, SOFTMAX_OF_CHOSEN, Router, SparseMixer

transformers = pytest.importorskip("transformers")

TOKENS, EXPERTS, HIDDEN = 10_000, 32, 16


def _peer(family, name, **config):
    """A router of transformers and its config; its weights are drawn."""
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[name])
    config = transformers.AutoConfig.for_model(family, hidden_size=HIDDEN, **config)
    torch.manual_seed(0)
    router = getattr(module, name)(config).eval()
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data = torch.randn(tensor.shape)
    return router, config


def _softmax(normalized=True):
    router, config = _peer("qwen2_moe", "Qwen2MoeTopKRouter", num_experts=EXPERTS, norm_topk_prob=normalized)
    return router, Router(top_k=config.num_experts_per_tok, normalized=normalized), None


def _grouped(groups, top_groups, normalized=True, scale=2.5):
    router, _ = _peer(
        "glm4_moe",
        "Glm4MoeTopkRouter",
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=normalized,
        routed_scaling_factor=scale,
    )
    own = Router(
        top_k=4,
        score=SIGMOID,
        groups=groups,
        top_groups=top_groups,
        normalized=normalized,
        sum_epsilon=1e-20,
        scale=scale,
    )
    return router, own, router.e_score_correction_bias


def _minimax():
    router, _ = _peer("minimax_m2", "MiniMaxM2TopKRouter", num_local_experts=EXPERTS, num_experts_per_tok=4)
    correction = torch.randn(EXPERTS)
    bound = nn.Module()
    bound.forward = lambda x: router(x, correction)
    bound.weight = router.weight
    return bound, Router(top_k=4, score=SIGMOID), correction


def _ernie():
    router, config = _peer("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", moe_num_experts=EXPERTS, moe_k=4)
    correction = router.moe_statics.e_score_correction_bias.data.mul_(0.05)
    return router, Router(top_k=4, least_sum=config.moe_norm_min), correction.flatten()


def _gpt_oss():
    router, _ = _peer("gpt_oss", "GptOssTopKRouter", num_local_experts=EXPERTS, num_experts_per_tok=4)
    return router, Router(top_k=4, score=SOFTMAX_OF_CHOSEN), None


def _granite():
    router, _ = _peer("granitemoe", "GraniteMoeTopKRouter", num_local_experts=EXPERTS, num_experts_per_tok=4)
    return router, Router(top_k=4, score=SOFTMAX_OF_CHOSEN), None


def _phi():
    router, _ = _peer("phimoe", "PhimoeTopKRouter", num_local_experts=EXPERTS, router_jitter_noise=0.1)
    return router, SparseMixer(jitter=0.1), None


PEERS = {
    "softmax": _softmax,
    "softmax, not normalized": lambda: _softmax(normalized=False),
    "sigmoid, no groups": lambda: _grouped(1, 1),
    "sigmoid, best 2 of 8 groups": lambda: _grouped(8, 2),
    "sigmoid, best 3 of 4 groups, not normalized": lambda: _grouped(4, 3, normalized=False, scale=1.0),
    "sigmoid, corrected": _minimax,
    "softmax, corrected, least sum": _ernie,
    "softmax of chosen, bias": _gpt_oss,
    "softmax of chosen": _granite,
    "sparsemixer": _phi,
}


def _logits(router, x_TD):
    bias = getattr(router, "bias", None)
    return nn.functional.linear(x_TD, router.weight, bias)


def _dense(ids_TK, weights_TK):
    """The weight of every expert for every token."""
    return torch.zeros(len(ids_TK), EXPERTS).scatter_(1, ids_TK, weights_TK.float())


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_ten_thousand_tokens_are_sent_where_transformers_sends_them(name):
    router, own, correction = PEERS[name]()
    x_TD = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    _, weights_TK, ids_TK = router(x_TD)
    found_ids, found = own(_logits(router, x_TD), correction)
    assert torch.equal(found_ids.sort(-1)[0], ids_TK.sort(-1)[0])
    assert found.dtype == torch.float32
    torch.testing.assert_close(_dense(found_ids, found), _dense(ids_TK, weights_TK), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, 300.0])
@torch.no_grad()
def test_weights_are_transformers_where_scores_tie_vanish_or_overflow(name, scale):
    """Which of equal experts is chosen is not defined; that the weights are the same is."""
    router, own, correction = PEERS[name]()
    x_TD = torch.randint(-1, 2, (500, HIDDEN), generator=torch.Generator().manual_seed(2)) * scale
    router.weight.data = torch.randint(-1, 2, router.weight.shape, generator=torch.Generator().manual_seed(3)).float()
    _, weights_TK, _ = router(x_TD)
    found_ids, found = own(_logits(router, x_TD), correction)
    assert all(len(set(row)) == len(row) for row in found_ids.tolist())
    torch.testing.assert_close(found.sort(-1)[0], weights_TK.sort(-1)[0].float(), atol=1e-6, rtol=1e-5, equal_nan=True)


def test_a_correction_counts_for_the_choice_and_not_for_the_weight():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    correction = torch.tensor([0.0, 0.0, 0.0, 5.0])
    ids, weights = Router(top_k=1, score=SIGMOID, normalized=False)(logits, correction)
    assert ids.tolist() == [[3]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[-1.0]])))


def test_groups_bound_what_a_token_may_use():
    logits = torch.tensor([[9.0, -9.0, 1.0, 2.0, 0.5, 0.4]])  # the best expert, but not in the best group
    ids, _ = Router(top_k=2, score=SIGMOID, groups=3, top_groups=1)(logits)
    assert sorted(ids[0].tolist()) == [2, 3]


def test_low_precision_logits_are_scored_in_float32():
    logits = torch.randn(100, EXPERTS, generator=torch.Generator().manual_seed(4)).bfloat16()
    for own in (Router(top_k=4), Router(top_k=4, score=SIGMOID), Router(top_k=4, score=SOFTMAX_OF_CHOSEN)):
        for one, other in zip(own(logits), own(logits.float())):
            assert torch.equal(one, other)
