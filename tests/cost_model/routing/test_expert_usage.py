"""The file of expert usage: strict, and of one model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cost_model import Hardware, Workload, solve
from cost_model.memory.allocation import residency
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import expert_groups, units_of
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.simulation.simulate import simulate
from cost_model.timing.evaluate import evaluate
from policies import Policy
from policies.common.errors import DataError, InfeasibleError, InputMissingError
from tests.support.usage import MIXTRAL, skewed


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


# What the planner makes of it.

QWEN = ModelArch.from_name("Qwen3-30B-A3B")
MACHINE = Hardware.preset("rtx4090")
FEW, MANY = Workload(prompt_len=64, gen_len=32, num_requests=1), Workload(prompt_len=64, gen_len=32, num_requests=2000)


def even(arch=MIXTRAL):
    counts = np.full((arch.num_layers, arch.num_experts), 10**6 * arch.top_k // arch.num_experts)
    return ExpertUsage(model=arch.fingerprint(), tokens=10**6, counts=counts)


def policy_of(w_gpu, rows=1, **rest):
    return Policy.from_percent(
        (w_gpu, 100 - w_gpu, 100, 0, 100, 0), gpu_batch_size=rows, num_gpu_batches=1, prompt_len=64, gen_len=32, **rest
    )


@pytest.mark.parametrize("job, rows", [(FEW, 1), (MANY, 64)])
def test_even_usage_predicts_what_no_usage_does(job, rows):
    plain, measured = (
        evaluate(MIXTRAL, MACHINE, job, policy_of(20, rows), usage=u, ignore_memory=True) for u in (None, even())
    )
    assert measured.job_s == pytest.approx(plain.job_s, rel=1e-4)


def test_fewer_experts_are_reached_where_usage_is_uneven():
    plain, uneven = (simulate(QWEN, MACHINE, FEW, policy_of(30), usage=u) for u in (None, skewed(QWEN)))
    assert uneven.job_s < 0.85 * plain.job_s and uneven.lanes_s["h2d"] < 0.85 * plain.lanes_s["h2d"]


@pytest.mark.parametrize("arch", [MIXTRAL, QWEN, QWEN.grouped(5)], ids=["mixtral", "qwen3", "qwen3 by 5"])
def test_the_most_used_units_come_first_in_every_layer(arch):
    usage = skewed(arch)
    for layer, order in enumerate(usage.unit_order(arch)):
        units = expert_groups(arch, layer)
        used = [usage.counts[layer, units[number].start : units[number].stop].mean() for number in order]
        assert used == sorted(used, reverse=True) and sorted(order) == list(range(len(units)))
    assert len(residency(arch, usage.unit_order(arch)).order) == len(units_of(arch))


@pytest.mark.parametrize("arch", [MIXTRAL, QWEN], ids=["mixtral", "qwen3"])
def test_the_most_used_experts_on_the_gpu_leave_less_to_move_on_demand(arch):
    usage = skewed(arch)
    plain = policy_of(30)
    ordered = replace(plain, expert_order=usage.unit_order(arch))
    moved = [simulate(arch, MACHINE, FEW, policy, usage=usage).lanes_s["h2d"] for policy in (plain, ordered)]
    assert moved[1] < 0.85 * moved[0]
    closed = [evaluate(arch, MACHINE, FEW, p, usage=usage, ignore_memory=True).lanes_s["h2d"] for p in (plain, ordered)]
    assert closed[1] < 0.85 * closed[0]


def test_an_order_alone_does_not_matter_where_every_expert_is_moved():
    many, usage, endless = policy_of(30, rows=64), skewed(), replace(MANY, num_requests=None)
    ordered = replace(many, expert_order=usage.unit_order(MIXTRAL))
    rates = [
        evaluate(MIXTRAL, MACHINE, endless, p, usage=usage, ignore_memory=True).tokens_per_s for p in (many, ordered)
    ]
    assert rates[0] == rates[1]


@pytest.mark.slow
def test_a_plan_with_usage_orders_experts_and_is_better_for_it():
    usage, job = skewed(), replace(FEW, num_requests=2)
    plan = solve(MIXTRAL, MACHINE, job, usage=usage, effort=0.02)
    assert plan.policy.expert_order == usage.unit_order(MIXTRAL)
    assert plan.prediction == evaluate(MIXTRAL, MACHINE, job, plan.policy, usage=usage)
    unordered = evaluate(MIXTRAL, MACHINE, job, replace(plan.policy, expert_order=None), usage=usage)
    assert plan.prediction.tokens_per_s > 1.05 * unordered.tokens_per_s
    assert solve(MIXTRAL, MACHINE, job, effort=0.02).policy.expert_order is None


def test_usage_of_another_model_is_refused_by_the_planner():
    for judge in (
        lambda u: evaluate(QWEN, MACHINE, FEW, policy_of(5), usage=u),
        lambda u: solve(QWEN, MACHINE, FEW, usage=u),
    ):
        with pytest.raises(InfeasibleError, match="expert usage is of another model"):
            judge(usage())


def test_an_order_of_other_units_is_refused_by_the_planner():
    policy = policy_of(5, expert_order=skewed(QWEN).unit_order(QWEN.grouped(5)))
    with pytest.raises(InfeasibleError, match="other units of experts"):
        evaluate(QWEN, MACHINE, FEW, policy)
    assert evaluate(QWEN, MACHINE, FEW, replace(policy, experts_per_unit=5), ignore_memory=True).job_s > 0
