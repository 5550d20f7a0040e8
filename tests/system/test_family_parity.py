"""Every family's float32 greedy ids are transformers', from both layouts, wherever things live; see `test_exactness`."""

import random

import pytest
import torch
from safetensors import safe_open

from tests.support.exactness import CHOICES, DEVICES, Case, check, make_llm, quick_of
from tests.support.tiny import GEN_LEN, LONGEST_ROW, MARGIN, make, router_margin
from tests.support.tiny_families import RECIPES, SWITCH, drawn

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")

#: Prompts of the drawn configs: of one token, around the switch of the LongRoPE, and longer than a chunk.
LENGTHS = (1, 5, SWITCH - 6, SWITCH, 17, SWITCH + 1, 33, 100)


def cases(count, seed):
    """Random ways to run; `CHOICES` has the values of every field."""
    rng = random.Random(seed)
    names = [name for name in CHOICES if name != "variant"]
    return [Case(variant="", **{name: rng.choice(CHOICES[name]) for name in names}) for _ in range(count)]


#: Three ways of each family; together the quick ones have all that the others have.
WAYS = quick_of([(name, case) for at, name in enumerate(RECIPES) for case in cases(3, at)], paired=())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, case", WAYS, ids=str)
def test_greedy_ids_of_every_family_equal_transformers(name, case, device, variants, tmp_path, monkeypatch):
    check(variants(name), case, device, tmp_path, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
def test_logits_of_every_position_are_transformers(name, device, variants, tmp_path, monkeypatch):
    variant = variants(name)
    llm = make_llm(variant, Case(placement=(0, 50, 0, 0, 0, 0), prefill_tokens=37), device, tmp_path, monkeypatch)
    try:
        for prompt in variant.prompts[:8]:
            with torch.no_grad():
                out = variant.model(torch.tensor([prompt]), output_router_logits=True)
            close = torch.isclose(llm.logits(prompt), out.logits[0], atol=2e-3, rtol=1e-4).all(-1)
            for at in (~close).nonzero()[:, 0].tolist():
                margin = router_margin(variant.model, [layer[at] for layer in out.router_logits])
                print(f"{name} prompt of {len(prompt)}, position {at}: excused, router margin {margin:.2e}")
                assert margin < MARGIN
    finally:
        llm.close()


def check_drawn(seed, tmp_path, monkeypatch):
    variant = make(drawn(seed), tmp_path / "checkpoint", LENGTHS)
    (case,) = cases(1, 1000 + seed)
    check(variant, case, "cpu", tmp_path, monkeypatch, longest=max(LENGTHS) + GEN_LEN)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_ids_of_random_configs_equal_transformers(seed, tmp_path, monkeypatch):
    check_drawn(seed, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 159))
def test_greedy_ids_of_many_random_configs_equal_transformers(seed, tmp_path, monkeypatch):
    check_drawn(seed, tmp_path, monkeypatch)


LAYER = "model.layers.0."
ON_DISK = {
    "mixtral-8x22b": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.7.w1.weight"),
    "mixtral-packed": ("mlp.gate.weight", "mlp.experts.gate_up_proj"),
    "qwen3": ("mlp.gate.weight", "mlp.experts.15.gate_proj.weight"),
    "qwen3-packed": ("mlp.gate.weight", "mlp.experts.gate_up_proj"),
    "phi": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.15.w2.weight"),
    "phi-packed": ("mlp.router.weight", "mlp.experts.down_proj"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_names_on_disk_are_those_of_the_layout(name, variants):
    found = set()
    for file in sorted(variants(name).directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    layer = "model.layers.1." if name == "qwen3-packed" else LAYER  # layer 0 of that one is dense
    assert {layer + tensor for tensor in ON_DISK[name]} <= found
    packed = {tensor for tensor in found if tensor.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert bool(packed) == name.endswith("-packed")
    assert ("lm_head.bias" in found) == name.startswith("phi")
    assert (LAYER + "input_layernorm.bias" in found) == name.startswith("phi")
    assert (LAYER + "self_attn.q_norm.weight" in found) == name.startswith("qwen3")
    dense = {"qwen3": "model.layers.1.mlp.up_proj.weight", "qwen3-packed": "model.layers.0.mlp.up_proj.weight"}
    assert name not in dense or dense[name] in found


@pytest.mark.parametrize(
    "placement, schedule",
    [
        pytest.param(placement, schedule, marks=pytest.mark.slow if (at + late) % 2 else ())
        for at, placement in enumerate([(100, 0, 100, 0, 100, 0), (30, 30, 30, 30, 30, 30), (0, 0, 0, 0, 0, 0)])
        for late, schedule in enumerate(("rolling", "static"))
    ],
    ids=str,
)
def test_a_row_that_outgrows_the_original_context_is_computed_anew_once(
    placement, schedule, variants, tmp_path, monkeypatch
):
    variant = variants("phi")
    crossing = sum(len(prompt) <= SWITCH < len(prompt) + GEN_LEN - 1 for prompt in variant.prompts)
    case = Case(placement=placement, schedule=schedule, eos=False)
    metrics = check(variant, case, "cpu", tmp_path, monkeypatch)
    assert metrics["restarts"] == crossing > 0
    assert metrics["prompt_tokens"] == sum(map(len, variant.prompts))
    assert LONGEST_ROW > 2 * SWITCH
