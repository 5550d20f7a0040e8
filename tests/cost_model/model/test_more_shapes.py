"""Shapes of the families in `tests.support.tiny_models` have the weights, the FLOPs and the defaults of transformers."""

import json
from copy import deepcopy

import pytest

from cost_model.model.arch import ModelArch
from cost_model.model.families import FAMILIES
from cost_model.model.known_shapes import SHAPE_OF_HUB_ID, SHAPES, known_config
from cost_model.model.weight_units import units_of
from policies.common.errors import DataError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.support.tiny_models import RECIPES, drawn  # noqa: E402

#: Sizes that every config has, and how a family spells its experts.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
_QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
EXPERTS = {
    "qwen2_moe": _QWEN,
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": _DEEPSEEK,
    "dots1": _DEEPSEEK,
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "llama": {},
    "mistral": {},
    "qwen3": {},
    "phi3": {},
}


def counterpart(recipe):
    """The shape of a config as transformers saves it, and the model on no device."""
    config = transformers.AutoConfig.for_model(recipe.family, **deepcopy(recipe.base | recipe.config))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = dict(model.named_parameters())
    weights |= {name: t for name, t in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return ModelArch.from_config(json.loads(config.to_json_string())), weights


def flops(arch, weights):
    """Of matrices (experts lie packed, three-dimensional) each token passes all, or its chosen share; tables once."""
    matrices = {name: t for name, t in weights.items() if t.dim() > 1 and "embed_tokens" not in name}
    matrices = {name: t for name, t in matrices.items() if not name.endswith("e_score_correction_bias")}
    passed = sum(t.numel() * arch.top_k // t.shape[0] if t.dim() == 3 else t.numel() for t in matrices.values())
    return 2 * (passed + (arch.embed_params if arch.tied else 0))


@pytest.mark.parametrize("recipe", [*RECIPES.values(), *map(drawn, range(12))], ids=lambda recipe: recipe.family)
def test_weights_and_flops_are_those_of_transformers(recipe):
    arch, weights = counterpart(recipe)
    assert arch.parameters == sum(t.numel() for t in weights.values())
    assert arch.flops_per_token == flops(arch, weights)
    at_rest = sum(unit.stored_bytes for unit in units_of(arch)) - arch.tied * arch.embed_params * arch.dtype_bytes
    assert at_rest == arch.total_bytes == 4 * arch.parameters


@pytest.mark.parametrize("family", EXPERTS)
def test_absent_fields_take_the_defaults_of_transformers(family):
    given = {"model_type": family, **SIZES, **EXPERTS[family]}
    whole = json.loads(transformers.AutoConfig.for_model(**given | {"pad_token_id": 0}).to_json_string())
    assert ModelArch.from_config(given) == ModelArch.from_config(whole)


@pytest.mark.parametrize(
    "name, parameters, active",
    [
        ("glm-4.5-air", 106.85, 12.8),
        ("glm-4.5", 352.8, 32.8),
        ("minimax-m2", 228.7, 10.4),
        ("olmoe-1b-7b", 6.92, 1.2),
        ("qwen1.5-moe-a2.7b", 14.3, 2.4),
        ("qwen2-57b-a14b-instruct", 57.4, 13.7),
        ("ernie-4.5-21b-a3b", 21.8, 3.35),
        ("granite-3.0-1b-a400m", 1.33, 0.43),
        ("dots.llm1", 142.8, 13.4),
        ("llama-2-70b", 68.98, 68.7),
        ("llama-3.1-8b", 8.03, 7.5),
        ("llama-3.1-70b", 70.55, 69.5),
        ("llama-3.2-1b", 1.24, 1.24),
        ("mistral-7b-v0.3", 7.25, 7.1),
        ("qwen3-32b", 32.76, 32.0),
        ("phi-4", 14.66, 14.2),
    ],
)
def test_known_shapes_have_the_published_sizes(name, parameters, active):
    """Billions of weights, without layers for further tokens, and of those that a token passes, without the embedding."""
    arch = ModelArch.from_name(name)
    assert arch.parameters / 1e9 == pytest.approx(parameters, rel=0.005)
    assert arch.flops_per_token / 2e9 == pytest.approx(active, rel=0.02)


def test_every_hub_id_has_a_shape():
    assert {known_config(name)["model_type"] for name in SHAPE_OF_HUB_ID} <= set(FAMILIES)
    assert set(SHAPE_OF_HUB_ID.values()) <= {path.stem for path in SHAPES.glob("*.json")}


def test_a_shared_mlp_is_packed_as_dense_layers_are():
    values = known_config("glm-4.5-air")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "gate"]}
    plain, packed = ModelArch.from_config(values), ModelArch.from_config(values | {"quantization_config": fp8})
    assert packed.packed.kinds == ("attention", "expert", "dense")
    scales = 4 * (plain.projection_params + 3 * plain.hidden * plain.shared_ffn) // 128**2
    floats = plain.attention_params - plain.projection_params - 3 * plain.hidden * plain.shared_ffn
    wide = plain.router_params + plain.num_experts
    sizes = (floats - wide) * 2 + 4 * wide + plain.projection_params + 3 * plain.hidden * plain.shared_ffn + scales
    assert packed.attention_bytes_in(1) == sizes


@pytest.mark.parametrize(
    "name, changes, named",
    [
        ("glm-4.5-air", {"n_group": 3}, "of 3 groups of 128 experts"),
        ("glm-4.5-air", {"first_k_dense_replace": 46}, "first_k_dense_replace"),
        ("glm-4.5-air", {"partial_rotary_factor": 0.51}, "turns 65 dimensions of a head of 128"),
        ("olmoe-1b-7b", {"clip_qkv": 8.0}, "clip_qkv"),
        ("qwen1.5-moe-a2.7b", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        ("ernie-4.5-21b-a3b", {"use_bias": True}, "use_bias"),
        ("ernie-4.5-21b-a3b", {"moe_layer_interval": 2}, "moe_layer_interval"),
        ("ernie-4.5-21b-a3b", {"moe_layer_end_index": 20}, "moe_layer_end_index"),
        ("granite-3.0-3b-a800m", {"logits_scaling": 0}, "logits_scaling"),
        ("granite-3.0-3b-a800m", {"quantization_config": {"quant_method": "gptq"}}, "packed weights of granitemoe"),
        ("phi-4", {"quantization_config": {"quant_method": "gptq"}}, "packed weights of phi3"),
        ("llama-3.1-8b", {"mlp_bias": True}, "mlp_bias"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ("llama-3.1-8b", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ("qwen3-8b", {"layer_types": ["full_attention", "chunked_attention"] * 18}, "for each layer"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, changes, named):
    with pytest.raises(DataError, match=named):
        ModelArch.from_config(known_config(name) | changes)


KINDS = ("full_attention", "sliding_attention")


@pytest.mark.parametrize(
    "name, changes, windowed",
    [
        ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 10}, range(10, 36)),
        ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, range(36)),
        ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 36}, ()),
        ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 64, "layer_types": KINDS * 18}, range(1, 36, 2)),
        ("qwen3-8b", {"sliding_window": 64, "max_window_layers": 10}, ()),
        ("qwen1.5-moe-a2.7b", {"use_sliding_window": True, "max_window_layers": 21}, range(0, 21, 2)),
        ("qwen1.5-moe-a2.7b", {"use_sliding_window": True, "sliding_window": None}, ()),
    ],
)
def test_layers_with_a_window_are_those_of_transformers(name, changes, windowed):
    config = (
        known_config(name)
        | changes
        | ({"layer_types": list(changes["layer_types"])} if "layer_types" in changes else {})
    )
    arch = ModelArch.from_config(config)
    assert [layer for layer in range(arch.num_layers) if arch.window_in(layer) is not None] == [*windowed]
