import json
import math

import pytest

from cost_model.model.arch import ModelArch
from cost_model.model.known_shapes import SHAPES
from policies.common.errors import DataError

SHAPE_OF_FAMILY = {"mixtral": "mixtral-8x7b", "phimoe": "phi-3.5-moe", "qwen3_moe": "qwen3-30b-a3b"}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 64,
    "long_factor": [2.0] * 64,
    "short_mscale": 1.2,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 4096,
}


def config(family="mixtral", **changes):
    return json.loads((SHAPES / f"{SHAPE_OF_FAMILY[family]}.json").read_text()) | changes


def without(*fields, family="mixtral"):
    return {name: value for name, value in config(family).items() if name not in fields}


def arch(family="mixtral", **changes):
    return ModelArch.from_config(config(family, **changes))


families = pytest.mark.parametrize("family", SHAPE_OF_FAMILY)


# All families.


@families
def test_quirks_of_configs_are_normalized(family):
    heads, hidden = config(family)["num_attention_heads"], config(family)["hidden_size"]
    assert arch(family, head_dim=None).head_dim == hidden // heads
    assert arch(family, head_dim=64).head_dim == 64
    assert arch(family, num_key_value_heads=None).num_kv_heads == heads
    assert not ModelArch.from_config(without("tie_word_embeddings", family=family)).tied
    assert arch(family, tie_word_embeddings=True).tied


@pytest.mark.parametrize(
    "family, num_kv_heads, norm_eps, rope_theta",
    [("mixtral", 8, 1e-5, 1e6), ("phimoe", 8, 1e-5, 1e6), ("qwen3_moe", 4, 1e-6, 1e4)],
)
def test_absent_fields_take_the_defaults_of_transformers(family, num_kv_heads, norm_eps, rope_theta):
    found = ModelArch.from_config(without("num_key_value_heads", "rms_norm_eps", "rope_theta", family=family))
    assert (found.num_kv_heads, found.norm_eps, found.rope_theta) == (num_kv_heads, norm_eps, rope_theta)
    transformers = pytest.importorskip("transformers")
    default = transformers.AutoConfig.for_model(family)
    assert (default.num_key_value_heads, default.rms_norm_eps) == (num_kv_heads, norm_eps)
    assert default.rope_parameters["rope_theta"] == rope_theta


@families
def test_rope_theta_is_found_in_every_place(family):
    bare = without("rope_theta", "rope_scaling", family=family)
    nested = {"rope_theta": 5e5, "rope_type": "default"}
    assert ModelArch.from_config(bare | {"rope_parameters": nested}).rope_theta == 5e5
    assert ModelArch.from_config(bare | {"rope_scaling": nested}).rope_theta == 5e5
    assert arch(family, rope_theta=123).rope_theta == 123.0


@families
def test_dtype_is_found_under_both_names(family):
    bare = without("torch_dtype", family=family)
    assert ModelArch.from_config(bare | {"torch_dtype": "float32"}).dtype_bytes == 4
    assert ModelArch.from_config(bare | {"dtype": "float16"}).dtype_bytes == 2
    assert ModelArch.from_config(bare).dtype_bytes == 4


@families
def test_a_config_as_transformers_saves_it_now_is_the_same_shape(family):
    transformers = pytest.importorskip("transformers")
    hub = config(family) | ({"rope_scaling": LONGROPE} if family == "phimoe" else {})
    saved = json.loads(transformers.AutoConfig.for_model(**hub).to_json_string())
    assert "rope_parameters" in saved and "rope_theta" not in saved
    assert ModelArch.from_config(saved) == ModelArch.from_config(hub)


def test_an_unknown_family_is_refused_with_the_supported_ones():
    for bad in (config(model_type="gpt2"), without("model_type"), config(model_type=["mixtral"]), {}):
        with pytest.raises(DataError, match="supported families: mixtral, phimoe, qwen3_moe"):
            ModelArch.from_config(bad)


@families
@pytest.mark.parametrize("value", [None, 0, -1, 2.5, math.nan, "8", True])
def test_a_bad_size_is_named(family, value):
    sizes = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_experts_per_tok",
        "vocab_size",
        "max_position_embeddings",
    ]
    qwen = family == "qwen3_moe"
    sizes += ["moe_intermediate_size", "num_experts"] if qwen else ["intermediate_size", "num_local_experts"]
    for field in sizes:
        with pytest.raises(DataError, match=field):
            arch(family, **{field: value})


@families
@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_key_value_heads": 5}, "num_kv_heads 5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_experts_per_tok": 999}, "top_k is 999"),
        ({"head_dim": 3}, "head_dim is 3"),
        ({"head_dim": None, "num_attention_heads": 24}, "head_dim"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"torch_dtype": ""}, "torch_dtype"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic'"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": 0}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "rope type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_config_that_contradicts_itself_or_asks_for_more_is_refused(family, changes, named):
    with pytest.raises(DataError, match=named):
        arch(family, **changes)


def test_a_config_that_is_no_object_is_refused():
    for bad in ([], None, "mixtral", 3):
        with pytest.raises(DataError, match="must be a JSON object"):
            ModelArch.from_config(bad)


# One family each.


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_mixtral_and_phi_attend_through_the_window_of_the_config(family):
    assert arch(family, sliding_window=4096).sliding_window == 4096
    assert ModelArch.from_config(without("sliding_window", family=family)).sliding_window is None
    with pytest.raises(DataError, match="sliding_window"):
        arch(family, sliding_window=0)


def test_qwen3_has_a_window_only_where_it_is_switched_on():
    assert arch("qwen3_moe", sliding_window=512).sliding_window is None
    assert arch("qwen3_moe", sliding_window=512, use_sliding_window=True).sliding_window == 512
    assert arch("qwen3_moe", sliding_window=None, use_sliding_window=True).sliding_window is None
    unsaid = without("sliding_window", family="qwen3_moe") | {"use_sliding_window": True}
    assert ModelArch.from_config(unsaid).sliding_window == 4096
    with pytest.raises(DataError, match="use_sliding_window"):
        arch("qwen3_moe", use_sliding_window="no")


def test_phi_has_the_biases_that_its_config_asks_for():
    assert (arch("phimoe").attention_bias, arch("phimoe").head_bias, arch("phimoe").norm_bias) == (True, True, True)
    bare = ModelArch.from_config(without("attention_bias", "lm_head_bias", family="phimoe"))
    assert (bare.attention_bias, bare.head_bias, bare.norm_bias) == (False, False, True)
    for field in ("attention_bias", "lm_head_bias"):
        with pytest.raises(DataError, match=field):
            arch("phimoe", **{field: 1})


def test_mixtral_has_no_biases_whatever_its_config_says():
    assert arch("mixtral", attention_bias=True, lm_head_bias=True) == arch("mixtral")


def test_phi_may_stretch_its_rotary_embedding_in_both_spellings():
    old = config("phimoe", rope_scaling=LONGROPE)
    now = without("rope_scaling", "rope_theta", family="phimoe")
    stretched = {name: value for name, value in LONGROPE.items() if name != "type"} | {"rope_type": "longrope"}
    now["rope_parameters"] = stretched | {"rope_theta": 10000.0}
    assert ModelArch.from_config(old) == ModelArch.from_config(now) == arch("phimoe")
    for family in ("mixtral", "qwen3_moe"):
        with pytest.raises(DataError, match="rope type 'longrope'; only 'default'"):
            arch(family, rope_scaling=LONGROPE)


def test_qwen3_counts_its_experts_under_either_name():
    either = without("num_experts", family="qwen3_moe") | {"num_local_experts": 64}
    assert ModelArch.from_config(either).num_experts == 64
    assert arch("qwen3_moe", num_local_experts=128).num_experts == 128
    with pytest.raises(DataError, match="num_experts is 128 and num_local_experts is 64"):
        arch("qwen3_moe", num_local_experts=64)
    with pytest.raises(DataError, match="the config lacks num_experts"):
        ModelArch.from_config(without("num_experts", family="qwen3_moe"))


def test_phi_switches_to_its_long_factors_past_its_original_context():
    assert arch("phimoe").rope_switch == 4096
    assert arch("phimoe", rope_scaling=LONGROPE | {"original_max_position_embeddings": 64}).rope_switch == 64
    above = {name: value for name, value in LONGROPE.items() if name != "original_max_position_embeddings"}
    assert arch("phimoe", rope_scaling=above, original_max_position_embeddings=128).rope_switch == 128
    assert ModelArch.from_config(without("rope_scaling", family="phimoe")).rope_switch is None
    with pytest.raises(DataError, match="original_max_position_embeddings"):
        arch("phimoe", rope_scaling=above, original_max_position_embeddings=None)


@pytest.mark.parametrize(
    "changes, dense_layers",
    [
        ({}, ()),
        ({"mlp_only_layers": None, "decoder_sparse_step": None}, ()),
        ({"mlp_only_layers": [5, 0, 5]}, (0, 5)),
        ({"decoder_sparse_step": 2}, (0, 2, 4)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [5]}, (0, 1, 3, 4, 5)),
    ],
)
def test_qwen3_mixes_dense_layers_in(changes, dense_layers):
    found = arch("qwen3_moe", num_hidden_layers=6, **changes)
    assert (found.dense_layers, found.dense_ffn) == (dense_layers, 6144 if dense_layers else 0)


def test_the_width_of_dense_layers_means_nothing_where_there_are_none():
    assert arch("qwen3_moe", intermediate_size=5472) == arch("qwen3_moe")
    assert ModelArch.from_config(without("intermediate_size", family="qwen3_moe")) == arch("qwen3_moe")
    with pytest.raises(DataError, match="intermediate_size"):
        arch("qwen3_moe", intermediate_size=None, mlp_only_layers=[0])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"mlp_only_layers": [48]}, "mlp_only_layers .* from 0 to 47"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"mlp_only_layers": [1.0]}, "mlp_only_layers"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"mlp_only_layers": list(range(48))}, "every layer of the model is dense"),
        ({"decoder_sparse_step": 49}, "every layer of the model is dense"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"attention_bias": 0}, "attention_bias"),
        ({"num_experts": 0}, "num_experts"),
    ],
)
def test_a_qwen3_config_that_cannot_be_is_refused(changes, named):
    with pytest.raises(DataError, match=named):
        arch("qwen3_moe", **changes)
