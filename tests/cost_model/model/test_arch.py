import json
import subprocess
import sys
from dataclasses import replace

import pytest

from cost_model.model.arch import ModelArch
from cost_model.model.known_shapes import SHAPE_OF_HUB_ID, SHAPES
from cost_model.model.weight_units import experts_per_unit, head_chunks, head_rows, units_of
from policies.common.errors import DataError, InputMissingError, UsageError
from policies.common.memory_units import GIB
from tests.support.paths import ROOT

MIXTRAL = ModelArch.from_name("mixtral-8x7b")
PHI = ModelArch.from_name("phi-3.5-moe")
QWEN = ModelArch.from_name("qwen3-30b-a3b")
MIXED = replace(QWEN, dense_layers=(0, 7), dense_ffn=6144)


def config(**changes):
    return json.loads((SHAPES / "mixtral-8x7b.json").read_text()) | changes


def active_params(arch):
    return arch.parameters - arch.num_layers * (arch.num_experts - arch.top_k) * arch.expert_params


# Known models.


def test_mixtral_8x7b_has_the_known_numbers():
    assert MIXTRAL.parameters == 46_702_792_704
    assert MIXTRAL.total_bytes / GIB == pytest.approx(86.99, abs=0.005)
    assert MIXTRAL.expert_bytes == 336 * 2**20
    assert MIXTRAL.kv_bytes_per_token() == 131_072
    assert MIXTRAL.kv_bytes_per_token(1) == 65_536
    assert MIXTRAL.kv_bytes_per_token_layer() == 4096
    assert MIXTRAL.flops_per_token == pytest.approx(25.5e9, rel=0.01)


def test_mixtral_8x22b_has_the_known_numbers():
    arch = ModelArch.from_name("mistralai/Mixtral-8x22B-v0.1")
    assert arch.parameters == pytest.approx(140.6e9, rel=0.001)
    assert (arch.num_layers, arch.num_heads, arch.head_dim, arch.max_position) == (56, 48, 128, 65536)
    assert ModelArch.from_name("mistralai/Mixtral-8x22B-Instruct-v0.1").vocab_size == 32768


@pytest.mark.parametrize(
    "name, parameters, active, kv_bytes_per_token",
    [
        ("microsoft/Phi-3.5-MoE-instruct", 41_873_153_344, 6.6e9, 2 * 32 * 8 * 128 * 2),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624, 3.35e9, 2 * 48 * 4 * 128 * 2),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560, 22.2e9, 2 * 94 * 4 * 128 * 2),
    ],
)
def test_the_other_families_have_the_known_numbers(name, parameters, active, kv_bytes_per_token):
    arch = ModelArch.from_name(name)
    assert arch.parameters == parameters
    assert active_params(arch) == pytest.approx(active, rel=0.01)
    assert arch.kv_bytes_per_token() == kv_bytes_per_token
    assert arch.flops_per_token == pytest.approx(2 * (active_params(arch) - arch.embed_params), rel=0.001)
    assert sum(unit.stored_bytes for unit in units_of(arch)) == arch.total_bytes


def test_the_small_experts_of_qwen3_are_9_mib_and_move_in_groups():
    assert QWEN.expert_bytes == 9 * 2**20
    assert experts_per_unit(QWEN) == 8
    assert len(units_of(QWEN)) == 1 + 48 * (1 + 16) + head_chunks(QWEN)


def test_later_qwen3_models_differ_from_the_first_in_their_context_alone():
    for size in ("30B-A3B", "235B-A22B"):
        first = ModelArch.from_name(f"Qwen/Qwen3-{size}")
        for variant in ("Instruct-2507", "Thinking-2507"):
            later = ModelArch.from_name(f"Qwen/Qwen3-{size}-{variant}")
            assert (first.max_position, later.max_position) == (40_960, 262_144)
            assert units_of(later) == units_of(first) and later.fingerprint() == first.fingerprint()
    assert ModelArch.from_name("Qwen/Qwen3-30B-A3B-Base").max_position == 32_768


def test_every_known_name_has_a_shape_in_any_case():
    shapes = {path.stem for path in SHAPES.glob("*.json")}
    assert set(SHAPE_OF_HUB_ID.values()) == shapes
    for name in (*SHAPE_OF_HUB_ID, *shapes):
        assert ModelArch.from_name(name.upper()) == replace(ModelArch.from_name(name), name=name.upper())
    assert ModelArch.from_name("mistralai/Mixtral-8x7B-Instruct-v0.1").name == "mistralai/Mixtral-8x7B-Instruct-v0.1"


@pytest.mark.parametrize("name", ["gpt-2", "", "../shapes/mixtral-8x7b", "mixtral-8x7b.json"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UsageError, match="mixtral-8x22b, .*mixtral-8x7b, .*phi-3.5-moe, .*qwen/qwen3-235b-a22b"):
        ModelArch.from_name(name)


# Units.


def test_units_come_in_schedule_order_with_all_bytes():
    units = units_of(MIXTRAL)
    assert [str(unit.id) for unit in units[:3]] == ["embed", "layers.0.attention", "layers.0.expert.0"]
    assert [unit.layer for unit in units] == sorted(unit.layer for unit in units)
    assert (units[0].layer, units[-1].layer, str(units[-1].id)) == (-1, 32, "head.0")
    assert len({str(unit.id) for unit in units}) == len(units) == 1 + 32 * 9 + 1
    assert sum(unit.stored_bytes for unit in units) == MIXTRAL.total_bytes


def test_units_are_made_once_for_a_shape():
    assert units_of(ModelArch.from_name("mixtral-8x7b")) is units_of(MIXTRAL)
    assert units_of(replace(MIXTRAL, dtype_bytes=4))[0].stored_bytes == 2 * units_of(MIXTRAL)[0].stored_bytes


def test_a_dense_layer_is_attention_without_router_and_one_mlp():
    units = {str(unit.id): unit.stored_bytes for unit in units_of(MIXED)}
    assert [name for name in units if name.startswith("layers.7.")] == ["layers.7.attention", "layers.7.expert.0"]
    assert units["layers.7.expert.0"] == MIXED.expert_bytes_in(7) == 3 * 2048 * 6144 * 2
    assert units["layers.6.attention"] - units["layers.7.attention"] == 2048 * 128 * 2
    assert units["layers.7.attention"] == MIXED.attention_bytes_in(7)
    assert sum(units.values()) == MIXED.total_bytes


def test_what_differs_between_layers_is_asked_per_layer():
    dense, sparse = 7, 8
    assert (MIXED.experts_in(dense), MIXED.top_k_in(dense), MIXED.ffn_in(dense)) == (1, 1, 6144)
    assert (MIXED.experts_in(sparse), MIXED.top_k_in(sparse), MIXED.ffn_in(sparse)) == (128, 8, 768)
    assert (MIXED.is_dense(dense), MIXED.is_dense(sparse)) == (True, False)
    assert MIXED.expert_params_in(sparse) == MIXED.expert_params == QWEN.expert_params
    assert MIXED.attention_params_in(sparse) == MIXED.attention_params == QWEN.attention_params
    router_and_experts = 2048 * 128 + 8 * MIXED.expert_params
    assert QWEN.flops_per_token - MIXED.flops_per_token == 2 * 2 * (router_and_experts - MIXED.dense_params)


@pytest.mark.parametrize("shape", [MIXTRAL, PHI, QWEN, MIXED], ids=["mixtral", "phi", "qwen", "mixed"])
@pytest.mark.parametrize("changes", [{}, {"vocab_size": 256_001}, {"ffn": 64, "head_dim": 2}, {"vocab_size": 1}])
def test_no_head_chunk_is_larger_than_the_largest_other_unit(shape, changes):
    arch = replace(shape, **changes)
    heads = [unit for unit in units_of(arch) if unit.kind == "head"]
    limit_bytes = max(unit.stored_bytes for unit in units_of(arch) if unit.kind in ("attention", "expert"))
    assert max(unit.stored_bytes for unit in heads) <= limit_bytes
    head_params = arch.embed_params + arch.norm_params + (arch.vocab_size if arch.head_bias else 0)
    assert sum(unit.stored_bytes for unit in heads) == head_params * arch.dtype_bytes
    fewest = -(-sum(unit.stored_bytes for unit in heads) // limit_bytes)
    assert fewest <= len(heads) <= fewest + 1


def test_a_large_dense_mlp_makes_room_for_larger_head_chunks():
    assert (head_chunks(QWEN.grouped(1)), head_chunks(MIXED.grouped(1))) == (17, 9)
    assert MIXED.expert_bytes_in(0) > MIXED.attention_bytes_in(8) > MIXED.expert_bytes


@pytest.mark.parametrize("vocab_size", [1, 7, 32_000, 256_001])
def test_head_rows_cover_the_vocabulary_once(vocab_size):
    arch = replace(MIXTRAL, vocab_size=vocab_size, hidden=64, ffn=16, head_dim=2)
    ranges = [head_rows(arch, index) for index in range(head_chunks(arch))]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(vocab_size))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_a_tied_table_is_one_set_of_parameters_and_two_units():
    tied = replace(MIXTRAL, tied=True)
    assert MIXTRAL.parameters - tied.parameters == tied.embed_params
    assert sum(unit.stored_bytes for unit in units_of(tied)) == MIXTRAL.total_bytes


# Transformers.

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "num_local_experts": 6,
    "dtype": "bfloat16",
}
QWEN_SIZES = SIZES | {"moe_intermediate_size": 40, "num_experts_per_tok": 3, "head_dim": 32}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "family, options",
    [
        ("Mixtral", SIZES | {"head_dim": 32}),
        ("Phimoe", SIZES),
        ("Phimoe", SIZES | {"attention_bias": True}),
        ("Phimoe", SIZES | {"lm_head_bias": True}),
        ("Qwen3Moe", QWEN_SIZES),
        ("Qwen3Moe", QWEN_SIZES | {"attention_bias": True, "mlp_only_layers": [0, 2]}),
        ("Qwen3Moe", QWEN_SIZES | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "intermediate_size": 400}),
    ],
)
def test_every_unit_has_the_parameters_of_transformers(family, options, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = getattr(transformers, f"{family}Config")(**options, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(hf_config)
    model.tie_weights()
    arch = ModelArch.from_config(hf_config.to_dict() | {"dtype": "bfloat16"})
    parameters = dict(model.named_parameters())
    assert arch.parameters == sum(parameter.numel() for parameter in parameters.values())
    assert (arch.tied, arch.dtype_bytes) == (tied, 2)
    assert bytes_by_kind(arch) == hf_bytes_by_kind(arch, parameters)
    assert arch.flops_per_token == hf_flops_per_token(arch, parameters)


def bytes_by_kind(arch):
    totals = {}
    for unit in units_of(arch):
        totals[unit.layer, unit.kind] = totals.get((unit.layer, unit.kind), 0) + unit.stored_bytes
    return totals


def hf_bytes_by_kind(arch, parameters):
    totals = {(arch.num_layers, "head"): parameters["model.embed_tokens.weight"].numel() * 2 if arch.tied else 0}
    for name, parameter in parameters.items():
        layer, kind = arch.num_layers, "head"
        if name.startswith("model.embed_tokens"):
            layer, kind = -1, "embed"
        elif name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            is_expert = ".mlp." in name and ".mlp.gate.weight" not in name and ".mlp.router." not in name
            kind = "expert" if is_expert else "attention"
        totals[layer, kind] = totals.get((layer, kind), 0) + parameter.numel() * 2
    return totals


def hf_flops_per_token(arch, parameters):
    """Of matrices (experts lie packed, three-dimensional) each token passes all, or its chosen share; tables once."""
    matrices = {name: p for name, p in parameters.items() if p.dim() > 1 and "embed_tokens" not in name}
    shares = {name: arch.top_k if p.dim() == 3 else 1 for name, p in matrices.items()}
    passed = sum(shares[n] * p.numel() // (p.shape[0] if p.dim() == 3 else 1) for n, p in matrices.items())
    return 2 * (passed + (arch.embed_params if arch.tied else 0))


# Checks of the shape itself.


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_layers": True}, "num_layers"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"dense_layers": (0,)}, "dense_ffn"),
        ({"dense_ffn": 64}, "dense_ffn"),
        ({"dense_layers": (1, 0), "dense_ffn": 64}, "dense_layers"),
        ({"dense_layers": (0, 0), "dense_ffn": 64}, "dense_layers"),
        ({"dense_layers": (32,), "dense_ffn": 64}, "dense_layers"),
        ({"dense_layers": [0], "dense_ffn": 64}, "dense_layers"),
        ({"dense_layers": ("0",), "dense_ffn": 64}, "dense_layers"),
        ({"dense_layers": tuple(range(32)), "dense_ffn": 64}, "every layer of the model is dense"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, field):
    with pytest.raises(DataError, match=field):
        replace(MIXTRAL, **changes)


def test_from_dir_reads_the_config(tmp_path):
    with pytest.raises(InputMissingError, match="config.json"):
        ModelArch.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config(num_hidden_layers=2)))
    assert ModelArch.from_dir(tmp_path) == replace(MIXTRAL, num_layers=2, name=tmp_path.name)
    for text in ("{", "[]", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError):
            ModelArch.from_dir(tmp_path)


@pytest.mark.parametrize(
    "addition, fault",
    [('"hidden_size": 64', "the key 'hidden_size' appears twice"), ('"rms_norm_eps": NaN', "NaN is not finite")],
)
def test_a_config_that_readers_disagree_about_is_refused(tmp_path, addition, fault):
    text = json.dumps({key: value for key, value in config().items() if key != "rms_norm_eps"})
    (tmp_path / "config.json").write_text(f"{text[:-1]}, {addition}}}")
    with pytest.raises(DataError, match=fault):
        ModelArch.from_dir(tmp_path)


def test_fingerprint_holds_the_shape_and_nothing_else():
    assert MIXTRAL.fingerprint() == {
        "model_type": "mixtral",
        "hidden": 4096,
        "num_layers": 32,
        "num_experts": 8,
        "top_k": 2,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn": 14336,
        "vocab_size": 32000,
    }
    assert replace(MIXTRAL, name="copy", dtype_bytes=4).fingerprint() == MIXTRAL.fingerprint()


def test_fingerprint_gains_what_else_the_units_depend_on():
    assert {"attention_bias": True, "head_bias": True}.items() <= PHI.fingerprint().items()
    assert MIXED.fingerprint() == QWEN.fingerprint() | {"dense_layers": [0, 7], "dense_ffn": 6144}
    assert json.loads(json.dumps(MIXED.fingerprint())) == MIXED.fingerprint()


def test_expected_experts_touched_grows_from_top_k_to_all():
    assert MIXTRAL.expected_experts_touched(0) == 0
    assert MIXTRAL.expected_experts_touched(1) == pytest.approx(2)
    assert MIXTRAL.expected_experts_touched(64) == pytest.approx(8, rel=1e-6)
    assert replace(MIXTRAL, top_k=8).expected_experts_touched(1) == 8


def test_importing_the_shapes_does_not_import_torch():
    code = "import sys, policies, cost_model; sys.exit(any(name in sys.modules for name in ('torch', 'pulp')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
