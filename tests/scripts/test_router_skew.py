"""Skewed routers choose experts by the law that was asked for, whatever the family, and topics have their own favourites."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmoe.errors import UsageError
from scripts.checkpoints.router_skew import RouterSkew, chosen, likings
from scripts.checkpoints.shapes import model_arch, model_config
from scripts.make_checkpoint import SIZES, make_checkpoint
from tests.support.drawn import drawn

COMMON = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "vocab_size": 800,
}
MODELS = {
    "mixtral": COMMON | {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": COMMON
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "phimoe": COMMON
    | {
        "model_type": "phimoe",
        "intermediate_size": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "attention_bias": True,
    },
}
pytestmark = pytest.mark.usefixtures("one_thread")


def skew_of(config_kwargs, **options):
    return RouterSkew(model_arch(model_config(config_kwargs, torch.float32)), **options)


def made(config_kwargs, directory, **options):
    make_checkpoint(directory, config_kwargs, dtype=torch.float32, tokenizer=False, **options)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.no_grad()
def frequencies(model, ids):
    """Share of the tokens ``[layers, E]`` that transformers' routers send to each expert."""
    logits = model(ids, output_router_logits=True).router_logits
    k = model.config.num_experts_per_tok
    return np.array(
        [np.bincount(layer.topk(k).indices.flatten(), minlength=layer.shape[-1]) / len(layer) for layer in logits]
    )


def prompts(rows, length, words=range(3, 800)):
    return torch.randint(words.start, words.stop, (rows, length), generator=torch.Generator().manual_seed(5))


def rank_correlation(one, other):
    return np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(other)))[0, 1]


@pytest.mark.parametrize("name, exponent", drawn(list(product(MODELS, (0.5, 1.0)))))
def test_experts_are_chosen_by_zipfs_law_in_another_order_in_every_layer(name, exponent, tmp_path):
    model = made(MODELS[name], tmp_path / "made", router_skew=exponent)
    skew, ids = skew_of(MODELS[name], exponent=exponent), prompts(16, 128)
    found, experts = frequencies(model, ids), skew.favourites(0, 0).numel()
    law = chosen(exponent, experts, model.config.num_experts_per_tok)
    top, ranked = experts // 8, np.array([shares[skew.favourites(at, 0)] for at, shares in enumerate(found)])
    assert np.mean([rank_correlation(shares, law) for shares in ranked]) > (0.9 if exponent == 1 else 0.8)
    for shares in ranked:
        assert shares[:top].sum() == pytest.approx(law[:top].sum(), rel=0.15)
        assert shares[experts // 2 :].sum() == pytest.approx(law[experts // 2 :].sum(), rel=0.3)
    assert len({tuple(skew.favourites(layer, 0).tolist()) for layer in range(4)}) == 4


@pytest.mark.parametrize("name", MODELS)
def test_the_choice_depends_on_the_token_and_on_what_came_before_it(name, tmp_path):
    model = made(MODELS[name], tmp_path / "made", router_skew=1.0)
    ids = prompts(2, 64)
    ids[:, -1] = 7
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits[-1].view(2, 64, -1)
    chosen_experts = {tuple(sorted(row.topk(2).indices.tolist())) for row in logits[0]}
    assert len(chosen_experts) > 4
    assert (logits[0, -1] - logits[1, -1]).std() > 0.1 * logits[0, -1].std()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_topic_has_its_own_favourites_and_texts_stay_with_their_topic(name, tmp_path):
    model = made(MODELS[name], tmp_path / "made", router_skew=1.0, router_topics=2)
    skew = skew_of(MODELS[name], exponent=1.0, topics=2)
    assert [skew.words(topic) for topic in (0, 1)] == [range(400), range(400, 800)]
    experts = skew.favourites(0, 0).numel()
    law = chosen(1.0, experts, model.config.num_experts_per_tok)
    for topic in (0, 1):
        words = skew.words(topic)
        ids = prompts(8, 128, range(max(3, words.start), words.stop))
        found = frequencies(model, ids)
        own, others = (
            [rank_correlation(shares[skew.favourites(at, t)], law) for at, shares in enumerate(found)]
            for t in (topic, 1 - topic)
        )
        assert np.mean(own) > 0.9 and np.mean(others) < 0.6
        assert all(one > other for one, other in zip(own, others, strict=True))
        texts = model.generate(ids[:4, :16], max_new_tokens=24, do_sample=topic == 1, eos_token_id=None, pad_token_id=0)
        assert Counter(token in words for token in texts[:, 16:].flatten().tolist()) == {True: 96}


def test_the_law_adds_up_to_top_k_and_no_expert_is_certain():
    assert chosen(1.0, 8, 2) == pytest.approx(2 / np.arange(1, 9) / (1 / np.arange(1, 9)).sum())
    many = chosen(1.0, 128, 8)
    assert many.sum() == pytest.approx(8) and many.max() == pytest.approx(0.95) and (np.diff(many) <= 0).all()
    assert many[20] / many[41] == pytest.approx(2)
    assert chosen(2.0, 4, 4) == pytest.approx(1) and likings(2.0, 4, 4) == (0.0,) * 4
    assert chosen(30.0, 8, 2).sum() == pytest.approx(2)


def test_a_skew_is_decided_by_its_seed():
    one, same, other = (skew_of(MODELS["mixtral"], exponent=1.0, seed=seed) for seed in (1, 1, 2))
    assert one.favourites(0, 0).tolist() == same.favourites(0, 0).tolist() != other.favourites(0, 0).tolist()


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"tie_word_embeddings": True}, {"router_skew": 1.0}, "a head of its own"),
        ({}, {"router_skew": 1.0, "router_topics": 17}, "17 topics are too many"),
        ({}, {"router_topics": 2}, "give a router skew"),
    ],
)
def test_a_skew_that_cannot_be_is_a_usage_error(tmp_path, changes, options, says):
    with pytest.raises(UsageError, match=says):
        make_checkpoint(tmp_path / "made", SIZES["tiny"] | {"hidden_size": 128} | changes, **options)
    assert not any(tmp_path.iterdir())
