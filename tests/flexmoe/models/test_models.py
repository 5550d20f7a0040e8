"""What a family refuses, and the pieces of mathematics that only one of them has."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cost_model.model.arch import ModelArch
from cost_model.model.families import SUPPORTED_MODEL_TYPES
from cost_model.model.known_shapes import known_config
from cost_model.model.packing import TOGETHER
from cost_model.model.weight_units import units_of
from flexmoe.errors import DataError
from flexmoe.formats.packed_kv import WORD, head_words
from flexmoe.kernels.elementwise import NewKV
from flexmoe.models.common.decoder import Decoder
from flexmoe.models.registry import FAMILIES, family
from policies.units import UnitId
from tests.support.tiny_families import SWITCH, long_rope

SHAPES = ("mixtral-8x7b", "mixtral-8x22b", "phi-3.5-moe", "qwen3-30b-a3b", "qwen3-235b-a22b")
#: One known shape of each further family that is not packed.
MORE = (
    "glm-4.5-air",
    "glm-4.5",
    "dots.llm1",
    "olmoe-1b-7b",
    "qwen1.5-moe-a2.7b",
    "ernie-4.5-21b-a3b",
    "granite-3.0-3b-a800m",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "mistral-7b-v0.3",
    "qwen3-8b",
    "phi-4",
)
FLOAT32 = ("correction", "wide router")


def phi(**changes):
    values = known_config("phi-3.5-moe") | {"rope_scaling": long_rope(128)} | changes
    return family(ModelArch.from_config(values), values)


def test_every_family_that_can_be_planned_for_runs():
    assert set(FAMILIES) == set(SUPPORTED_MODEL_TYPES)


def test_the_planner_knows_whose_matrices_lie_together():
    """`quantize` names matrices one by one, as these families have not stored them."""
    together = {
        name for name, kind in FAMILIES.items() if kind.names.qkv or kind.names.dense_gate_up or kind.names.gate_up
    }
    assert together == TOGETHER


def test_a_family_adds_names_norm_router_gated_unit_and_multipliers_only():
    allowed = {"names", "__init__", "feed_forward", "norm", "norm_weight_first", "routing"}
    for kind in FAMILIES.values():
        own = {name for name in vars(kind) if callable(vars(kind)[name]) or name in vars(Decoder)}
        assert {name for name in own if not name.startswith("_") or name == "__init__"} <= allowed


def test_a_family_is_a_small_file():
    for kind in FAMILIES.values():
        assert len(Path(inspect.getfile(kind)).read_text().splitlines()) <= 60


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SHAPES + MORE)
def test_the_parts_of_a_unit_are_its_planned_bytes_in_both_layouts(name, packed):
    arch = ModelArch.from_name(name)
    on_disk = (f"model.layers.0.{family(arch).names.packed_gate_up}",) if packed else ()
    parts = family(arch).parts(on_disk)
    for unit in units_of(arch):
        own = [(torch.Size(p.shape).numel(), 4 if p.role in FLOAT32 else arch.dtype_bytes) for p in parts[unit.id]]
        assert unit.stored_bytes == sum(count * size for count, size in own)
    expected = family(arch).expected_tensors(on_disk)
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == arch.parameters


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_experts_per_tok": 1}, "exactly 2"),
        ({"rope_scaling": long_rope(128) | {"long_factor": [1.0] * 63}}, "long_factor .* 64 positive numbers"),
        ({"rope_scaling": long_rope(128) | {"short_factor": None}}, "short_factor"),
        ({"rope_scaling": long_rope(128) | {"short_factor": [0.0] * 64}}, "short_factor"),
        ({"rope_scaling": long_rope(128) | {"long_mscale": "1"}}, "long_mscale"),
        ({"router_jitter_noise": "none"}, "router_jitter_noise"),
    ],
)
def test_a_phi_config_that_cannot_be_run_is_refused(changes, named):
    with pytest.raises(DataError, match=named):
        phi(**changes)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize(
    "name, norm",
    [
        ("mixtral-8x7b", ""),
        ("qwen3-30b-a3b", "head"),
        ("qwen3-30b-a3b", "rotated"),
        ("minimax-m2", "projection"),
        ("ernie-4.5-21b-a3b", ""),
        ("glm-4.5-air", ""),
        ("granite-3.0-3b-a800m", ""),
    ],
)
def test_new_keys_and_values_are_written_where_they_belong_while_they_are_projected(name, norm, compressed):
    """As they are written after the projection, whatever is normed, turned or scaled, and only those of the named tokens."""
    whole = ModelArch.from_name(name)
    rotary = whole.rotary_dim and 16 * whole.rotary_dim // whole.head_dim
    shape = dict(hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=rotary)
    arch = replace(whole, qk_norm=norm, packed=None, **shape)
    math, generator = family(arch), torch.Generator().manual_seed(1)
    weights = {
        part.role: torch.randn(part.shape, generator=generator).mul_(0.1).bfloat16()
        for part in math.parts(())[UnitId("attention", 0)]
    }
    h = torch.randn(50, 64, generator=generator).bfloat16()
    rope = math.rope(torch.arange(50), torch.full((50,), 50), torch.bfloat16)
    width, dtype = (head_words(16), WORD) if compressed else (16, torch.bfloat16)
    first, second = torch.zeros(2, 2, 5, 16, 2, width, dtype=dtype)
    slots = torch.randperm(80, generator=generator)[:40]
    q, k, v = math.project(h, weights, rope, None)
    NewKV(first[0], first[1], slots, 7, 47).put(k, v)
    same_q, same_k, _ = math.project(h, weights, rope, NewKV(second[0], second[1], slots, 7, 47))
    assert torch.equal(same_q, q) and torch.equal(second, first) and first.any()
    assert torch.equal(same_k[:7], k[:7]) and torch.equal(same_k[47:], k[47:]), "what others need"


def test_every_token_is_turned_by_the_factors_of_its_own_row():
    positions, lengths = torch.tensor([3, 3, 70]), torch.tensor([SWITCH, SWITCH + 1, 71])
    cos, _ = phi().rope(positions, lengths, torch.float32)
    assert not torch.allclose(cos[0], cos[1])
    for at in range(3):
        alone, _ = phi().rope(positions[at : at + 1], lengths[at : at + 1], torch.float32)
        assert torch.equal(cos[at], alone[0])


def test_sparsemixer_weighs_each_choice_among_its_near_equals_only():
    model = phi(router_jitter_noise=0.1)
    logits = torch.tensor([[1.0, 0.95, -3.0, 0.5], [2.0, -1.0, 1.0, 0.999]])
    ids, weights = model.route(logits)
    assert ids.tolist() == [[0, 1], [0, 2]]
    near = torch.softmax(torch.tensor([1.0, 0.95]), 0)[0], torch.softmax(torch.tensor([1.0, 0.999]), 0)[0]
    torch.testing.assert_close(weights, torch.tensor([[near[0], 1.0], [1.0, near[1]]]))


@pytest.mark.parametrize("normalized", [True, False])
def test_qwen3_normalizes_routing_weights_where_its_config_says_so(normalized):
    values = known_config("qwen3-30b-a3b") | {"norm_topk_prob": normalized}
    _, weights = family(ModelArch.from_config(values), values).route(torch.randn(5, 128))
    assert torch.allclose(weights.sum(-1), torch.ones(5)) == normalized
