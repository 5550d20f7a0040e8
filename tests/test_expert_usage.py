"""The file of expert usage: strict, and of one model."""

import json

import numpy as np
import pytest

from cost_model.arch import ModelArch
from cost_model.expert_usage import ExpertUsage
from policies.errors import DataError, InfeasibleError, InputMissingError

MIXTRAL = ModelArch.from_name("Mixtral-8x7B")


def usage(tokens=10, seed=0):
    rng = np.random.default_rng(seed)
    chosen = rng.random((MIXTRAL.num_layers, tokens, MIXTRAL.num_experts)).argsort(axis=2) < MIXTRAL.top_k
    return ExpertUsage(model=MIXTRAL.fingerprint(), tokens=tokens, counts=chosen.sum(axis=1))


def test_what_was_saved_is_loaded(tmp_path):
    usage().save(tmp_path / "usage.json")
    loaded = ExpertUsage.load(tmp_path / "usage.json")
    assert loaded.tokens == 10 and (loaded.counts == usage().counts).all()
    loaded.check_model(MIXTRAL)


def test_shares_add_up_to_top_k_and_none_is_impossible():
    shares = usage().shares
    assert shares.sum(axis=1) == pytest.approx(np.full(MIXTRAL.num_layers, MIXTRAL.top_k))
    assert 0 < shares.min() < shares.max() <= 1
    assert np.corrcoef(shares.ravel(), usage().counts.ravel())[0, 1] > 0.999


def test_a_dense_layer_has_no_shares(tmp_path):
    model = {"num_layers": 2, "num_experts": 3, "top_k": 1, "dense_layers": [1]}
    known = ExpertUsage(model=model, tokens=4, counts=np.array([[3, 1, 0], [0, 0, 0]]))
    assert known.shares[1].sum() == 0 and known.shares[0].sum() == pytest.approx(1)
    with pytest.raises(DataError, match="layer 1 counts 4"):
        ExpertUsage(model=model, tokens=4, counts=np.array([[3, 1, 0], [4, 0, 0]]))


def test_another_models_usage_is_refused_with_what_differs():
    with pytest.raises(InfeasibleError, match="hidden, .*num_experts"):
        usage().check_model(ModelArch.from_name("Qwen3-30B-A3B"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "flexmoe.policy"}, "flexmoe.expert-usage"),
        ({"schema_version": 2}, "newer"),
        ({"tokens": 11}, "layer 0 counts 20"),
        ({"tokens": True}, "tokens"),
        ({"counts": [[1, 2], [3]]}, "equally long"),
        ({"counts": [[0.5] * 8] * 32}, "whole numbers"),
        ({"counts": []}, "layers and experts"),
        ({"counts": [[20] + [0] * 7] * 32}, "layer 0"),
        ({"model": []}, "model"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path, change, said):
    path = tmp_path / "usage.json"
    usage().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        ExpertUsage.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputMissingError, match="none.json"):
        ExpertUsage.load(tmp_path / "none.json")
