import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cost_model.arch import SHAPE_OF_HUB_ID, SHAPES, ModelArch
from policies.errors import DataError, InputMissingError, UsageError

GIB = 2**30
MIXTRAL = ModelArch.from_name("mixtral-8x7b")


def config(**changes):
    return json.loads((SHAPES / "mixtral-8x7b.json").read_text()) | changes


def without(field):
    return {name: value for name, value in config().items() if name != field}


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


def test_every_known_name_has_a_shape():
    for name in SHAPE_OF_HUB_ID:
        assert ModelArch.from_name(name).model_type == "mixtral"
    assert ModelArch.from_name("mistralai/Mixtral-8x7B-Instruct-v0.1").name == "mistralai/Mixtral-8x7B-Instruct-v0.1"


@pytest.mark.parametrize("name", ["gpt-2", "", "../shapes/mixtral-8x7b", "mixtral-8x7b.json"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UsageError, match="mixtral-8x22b, .*mixtral-8x7b"):
        ModelArch.from_name(name)


def test_units_come_in_schedule_order_with_all_bytes():
    units = MIXTRAL.units()
    assert [unit.name for unit in units[:3]] == ["embed", "layers.0.attention", "layers.0.expert.0"]
    assert [unit.layer for unit in units] == sorted(unit.layer for unit in units)
    assert (units[0].layer, units[-1].layer, units[-1].name) == (-1, 32, "head.0")
    assert len({unit.name for unit in units}) == len(units) == 1 + 32 * 9 + 1
    assert sum(unit.stored_bytes for unit in units) == MIXTRAL.total_bytes


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 256_001}, {"ffn": 64, "head_dim": 2}, {"vocab_size": 1}])
def test_no_head_chunk_is_larger_than_the_largest_other_unit(changes):
    arch = replace(MIXTRAL, **changes)
    heads = [unit for unit in arch.units() if unit.kind == "head"]
    limit_bytes = max(arch.expert_bytes, arch.attention_bytes)
    assert max(unit.stored_bytes for unit in heads) <= limit_bytes
    assert sum(unit.stored_bytes for unit in heads) == (arch.embed_params + arch.hidden) * arch.dtype_bytes
    fewest = -(-sum(unit.stored_bytes for unit in heads) // limit_bytes)
    assert fewest <= len(heads) <= fewest + 1


@pytest.mark.parametrize("vocab_size", [1, 7, 32_000, 256_001])
def test_head_rows_cover_the_vocabulary_once(vocab_size):
    arch = replace(MIXTRAL, vocab_size=vocab_size, hidden=64, ffn=16, head_dim=2)
    ranges = [arch.head_rows(index) for index in range(arch.num_head_chunks)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(vocab_size))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_a_tied_table_is_one_set_of_parameters_and_two_units():
    tied = replace(MIXTRAL, tied=True)
    assert MIXTRAL.parameters - tied.parameters == tied.embed_params
    assert sum(unit.stored_bytes for unit in tied.units()) == MIXTRAL.total_bytes


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_transformers(tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, num_local_experts=4, vocab_size=512, tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(hf_config)
    model.tie_weights()
    arch = ModelArch.from_config(hf_config.to_dict() | {"dtype": "bfloat16"})
    assert arch.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (arch.tied, arch.rope_theta, arch.dtype_bytes) == (tied, 1e6, 2)


def test_quirks_of_configs_are_normalized():
    assert ModelArch.from_config(config(head_dim=None)).head_dim == 128
    assert ModelArch.from_config(config(head_dim=64)).head_dim == 64
    assert ModelArch.from_config(config(num_key_value_heads=None)).num_kv_heads == 32
    assert ModelArch.from_config(without("num_key_value_heads")).num_kv_heads == 8
    assert ModelArch.from_config(config(sliding_window=4096)).sliding_window == 4096
    assert ModelArch.from_config(without("sliding_window")).sliding_window is None
    assert not ModelArch.from_config(without("tie_word_embeddings")).tied


def test_rope_theta_is_found_in_both_places():
    nested = without("rope_theta") | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert ModelArch.from_config(nested).rope_theta == 5e5
    assert ModelArch.from_config(config(rope_theta=1e4)).rope_theta == 1e4
    assert ModelArch.from_config(without("rope_theta")).rope_theta == 1e6


def test_dtype_is_found_under_both_names():
    assert ModelArch.from_config(config(torch_dtype="float32")).dtype_bytes == 4
    assert ModelArch.from_config(without("torch_dtype") | {"dtype": "float16"}).dtype_bytes == 2
    assert ModelArch.from_config(without("torch_dtype")).dtype_bytes == 4


def test_an_unknown_family_is_refused_with_the_supported_ones():
    for bad in (config(model_type="llama"), without("model_type"), config(model_type=["mixtral"])):
        with pytest.raises(DataError, match="supported families: mixtral"):
            ModelArch.from_config(bad)


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_local_experts",
     "num_experts_per_tok", "vocab_size", "max_position_embeddings"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 0, -1, 2.5, "8", True])
def test_a_bad_field_is_named(field, value):
    with pytest.raises(DataError, match=field):
        ModelArch.from_config(config(**{field: value}))


@pytest.mark.parametrize(
    "changes",
    [{"num_key_value_heads": 5}, {"num_experts_per_tok": 9}, {"head_dim": 3}, {"sliding_window": 0},
     {"num_attention_heads": 24}, {"torch_dtype": "int8"}, {"tie_word_embeddings": 1}, {"rms_norm_eps": 0},
     {"rope_theta": "big"}, {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_parameters": [1]},
     {"rope_parameters": {"rope_type": "yarn"}}, {"hidden_act": "gelu"}],
)  # fmt: skip
def test_a_config_that_contradicts_itself_or_asks_for_more_is_refused(changes):
    with pytest.raises(DataError):
        ModelArch.from_config(config(**changes))


def test_from_dir_reads_the_config(tmp_path):
    with pytest.raises(InputMissingError, match="config.json"):
        ModelArch.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config(num_hidden_layers=2)))
    assert ModelArch.from_dir(tmp_path) == replace(MIXTRAL, num_layers=2, name=tmp_path.name)
    for text in ("{", "[]", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError):
            ModelArch.from_dir(tmp_path)


def test_fingerprint_holds_the_shape_and_nothing_else():
    assert MIXTRAL.fingerprint() == {
        "model_type": "mixtral", "hidden": 4096, "num_layers": 32, "num_experts": 8, "top_k": 2, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 128, "ffn": 14336, "vocab_size": 32000,
    }  # fmt: skip
    assert replace(MIXTRAL, name="copy", dtype_bytes=4).fingerprint() == MIXTRAL.fingerprint()


def test_expected_experts_touched_grows_from_top_k_to_all():
    assert MIXTRAL.expected_experts_touched(0) == 0
    assert MIXTRAL.expected_experts_touched(1) == pytest.approx(2)
    assert MIXTRAL.expected_experts_touched(64) == pytest.approx(8, rel=1e-6)
    assert replace(MIXTRAL, top_k=8).expected_experts_touched(1) == 8


def test_importing_the_shapes_does_not_import_torch():
    code = "import sys, policies, cost_model; sys.exit(any(name in sys.modules for name in ('torch', 'pulp')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
