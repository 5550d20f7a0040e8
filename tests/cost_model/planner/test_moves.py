"""Moves from one policy to a neighbouring one: what they hold, and that they lead to policies."""

from dataclasses import replace

import pytest

from cost_model.planner.moves import Held, moves, resized, simpler
from policies.policy import Policy
from policies.workload import Workload

JOB = Workload(prompt_len=512, gen_len=32)
POLICY = Policy(
    gpu_batch_size=64,
    num_gpu_batches=4,
    w_gpu_percent=10,
    w_cpu_percent=80,
    cache_gpu_percent=25,
    cache_cpu_percent=50,
    act_gpu_percent=50,
    act_cpu_percent=50,
    prefill_tokens=256,
    cpu_attention_percent=60,
    weight_slots=6,
)


def rows_on(policy, tier):
    """Rows whose KV is at home there; what is on neither is on disk."""
    shares = {"gpu": policy.cache_gpu_percent, "cpu": policy.cache_cpu_percent}
    return policy.block_size * shares.get(tier, 100 - sum(shares.values())) / 100


def test_every_move_leads_to_another_policy():
    found = [move(POLICY, 0.4) for move in moves(JOB)]
    assert all(isinstance(policy, Policy) and policy != POLICY for policy in found if policy)
    assert sum(policy is None for policy in found) == 0


def test_moves_come_back_to_no_share_above_a_hundred():
    policy = POLICY
    for step in (1.0, 0.3, 1.0):
        for move in moves(JOB):
            policy = move(policy, step) or policy
    assert policy.cache_gpu_percent + policy.cache_cpu_percent <= 100
    assert policy.num_gpu_batches >= 1 and policy.gpu_batch_size >= 1 and policy.weight_slots >= 2


@pytest.mark.parametrize(
    "held, tiers", [(Held.GPU_ROWS, ("gpu",)), (Held.GPU_AND_HOST_ROWS, ("gpu", "cpu")), (Held.SHARES, ())], ids=str
)
def test_rows_come_where_they_are_not_held(held, tiers):
    larger = resized(POLICY, 64, 6, held, JOB)
    assert larger.block_size == 384 and larger.prefill_tokens == 384
    for tier in ("gpu", "cpu", "disk"):
        kept = rows_on(larger, tier) == pytest.approx(rows_on(POLICY, tier))
        assert kept == (tier in tiers)


def test_pace_is_held_where_it_is_asked_for():
    assert resized(POLICY, 64, 6, Held.SHARES_AND_PACE, JOB).prefill_tokens == POLICY.prefill_tokens


def test_of_two_half_blocks_one_gpu_batch_marches_as_one():
    two = replace(POLICY, half_blocks=2)
    assert resized(two, 64, 3, Held.SHARES, JOB).half_blocks == 2
    assert resized(two, 64, 1, Held.SHARES, JOB).half_blocks == 1


def test_the_same_policy_is_no_neighbour():
    assert resized(POLICY, 64, 4, Held.SHARES, JOB) is None


def test_simpler_policies_do_with_less_and_take_the_kv_off_the_disk_first():
    found = list(simpler(POLICY, JOB))
    assert found[0].cache_gpu_percent == 25 and found[0].cache_cpu_percent == 75
    assert any(policy.weight_slots is None for policy in found)
    assert any(policy.act_gpu_percent == 100 for policy in found)
    assert all(policy.block_size <= POLICY.block_size for policy in found)
