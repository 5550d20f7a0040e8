"""Synthetic checkpoints are what transformers itself would have written."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Mxfp4Config

from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.errors import StorageError, UsageError
from flexmoe.llm import LLM
from flexmoe.models.registry import FAMILIES
from flexmoe.params import SamplingParams
from scripts.checkpoints import writing
from scripts.checkpoints.shapes import as_family, model_config, tensor_shapes, with_changes
from scripts.make_checkpoint import SIZES, main, make_checkpoint
from tests.support.tiny import transformers_greedy

TINY = SIZES["tiny"]


def tensors_of(directory):
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def load(directory):
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("made") / "tiny", TINY)


#: One model of each family, with what only that family has.
OF_FAMILY = {
    "mixtral": {"head_dim": 32, "sliding_window": 16},
    "phimoe": {"intermediate_size": 40},
    "qwen3_moe": {"head_dim": 24, "mlp_only_layers": [1], "intermediate_size": 48, "attention_bias": True},
    "ernie4_5_moe": {"tie_word_embeddings": False},
    "hunyuan_v1_moe": {"head_dim": 16},
}
#: The first families and two of the others in the quick tests.
QUICK = {"mixtral", "phimoe", "qwen3_moe", "gpt_oss", "llama"}
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["per_expert", "packed"])
EVERY_FAMILY = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
EVERY_FAMILY_QUICKLY_IN_ONE_LAYOUT = pytest.mark.parametrize(
    "family, packed",
    [
        pytest.param(name, packed, marks=() if name in QUICK and packed == at % 2 else pytest.mark.slow)
        for at, name in enumerate(sorted(FAMILIES, key=lambda name: (name not in QUICK, name)))
        for packed in (False, True)
    ],
)


def of_family(family, **changes):
    return as_family(TINY, family) | OF_FAMILY.get(family, {}) | changes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@LAYOUTS
@EVERY_FAMILY
def test_names_shapes_and_dtypes_on_disk_are_those_of_save_pretrained(tmp_path, family, packed, tied):
    kwargs = of_family(family, tie_word_embeddings=tied)
    made = make_checkpoint(tmp_path / "made", kwargs, packed=packed, tokenizer=False)
    load(made).bfloat16().save_pretrained(tmp_path / "saved", save_original_format=not packed)
    saved, ours = tensors_of(tmp_path / "saved"), tensors_of(made)
    assert saved.keys() == ours.keys()
    for name, tensor in saved.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    shapes = tensor_shapes(model_config(kwargs, torch.bfloat16), packed=packed)
    assert ("lm_head.weight" in shapes) != tied
    Checkpoint.open(made).check(shapes, FAMILIES)


@EVERY_FAMILY
def test_both_layouts_and_any_sharding_hold_the_same_model(tmp_path, family):
    whole = make_checkpoint(tmp_path / "whole", of_family(family), tokenizer=False)
    packed = make_checkpoint(tmp_path / "packed", of_family(family), packed=True, shard_bytes=100_000, tokenizer=False)
    assert len(list(packed.glob("*.safetensors"))) > 3
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(load(packed)(ids).logits, load(whole)(ids).logits)


@EVERY_FAMILY_QUICKLY_IN_ONE_LAYOUT
def test_transformers_and_flexmoe_compute_the_same_from_what_was_written(tmp_path, family, packed, one_thread):
    made = make_checkpoint(tmp_path / "made", of_family(family), dtype=torch.float32, packed=packed, router_skew=1.0)
    model, prompt = load(made), [1, *range(40, 60)]
    llm = LLM(made, policy=None, device="cpu", dtype="float32", offload_dir=tmp_path / "offload", longest_row=40)
    try:
        with torch.no_grad():
            assert torch.allclose(llm.logits(prompt), model(torch.tensor([prompt])).logits[0], atol=2e-3, rtol=1e-4)
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True))
    finally:
        llm.close()
    assert list(output.outputs[0].token_ids) == transformers_greedy(model, prompt, eos_token_id=None)


def test_mxfp4_experts_are_read_alike_by_transformers_and_flexmoe(tmp_path, one_thread):
    made = make_checkpoint(
        tmp_path / "made", of_family("gpt_oss"), dtype=torch.float32, mxfp4=True, shard_bytes=100_000
    )
    stored = tensors_of(made)
    assert stored["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (4, 192, 2, 16)
    assert stored["model.layers.0.mlp.experts.down_proj_scales"].shape == (4, 64, 3)
    model = AutoModelForCausalLM.from_pretrained(
        made, dtype=torch.float32, experts_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    assert 0.05 < model.model.layers[0].mlp.experts.gate_up_proj.std() < 0.25  # about 1/sqrt(64)
    prompt = [1, *range(40, 60)]
    llm = LLM(made, policy=None, device="cpu", dtype="float32", offload_dir=tmp_path / "offload", longest_row=40)
    try:
        with torch.no_grad():
            assert torch.allclose(llm.logits(prompt), model(torch.tensor([prompt])).logits[0], atol=2e-3, rtol=1e-4)
    finally:
        llm.close()


def test_mxfp4_experts_are_gpt_oss_s_only(tmp_path):
    with pytest.raises(UsageError, match="only gpt_oss"):
        make_checkpoint(tmp_path / "made", TINY, mxfp4=True)
    with pytest.raises(UsageError, match="not whole blocks of 32"):
        make_checkpoint(tmp_path / "made", of_family("gpt_oss", hidden_size=48), mxfp4=True)


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 10**9])
def test_index_lists_every_tensor_where_it_is(tmp_path, shard_bytes):
    made = make_checkpoint(tmp_path / "made", TINY, shard_bytes=shard_bytes, tokenizer=False)
    checkpoint = Checkpoint.open(made)
    files = {info.path for info in checkpoint.tensors.values()}
    assert files == set(made.glob("*.safetensors"))
    index = made / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1) == (shard_bytes < 10**9)
    if index.exists():
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total
    if shard_bytes == 30_000:
        sizes = [sum(i.nbytes for i in checkpoint.tensors.values() if i.path == file) for file in files]
        alone = [file for file in files if sum(i.path == file for i in checkpoint.tensors.values()) == 1]
        assert sum(size > shard_bytes for size in sizes) <= len(alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dtype_is_stored_and_written_into_the_config(tmp_path, dtype):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "made", TINY, dtype=dtype, tokenizer=False))
    assert {info.dtype for info in checkpoint.tensors.values()} == {dtype}
    assert checkpoint.config["dtype"] == str(dtype).removeprefix("torch.")
    assert checkpoint.config["architectures"] == ["MixtralForCausalLM"]


def test_seed_decides_the_weights(tiny, tmp_path):
    same = make_checkpoint(tmp_path / "same", TINY, tokenizer=False)
    other = make_checkpoint(tmp_path / "other", TINY, tokenizer=False, seed=1)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert torch.equal(tensors_of(tiny)[name], tensors_of(same)[name])
    assert not torch.equal(tensors_of(tiny)[name], tensors_of(other)[name])
    assert not torch.equal(tensors_of(tiny)[name], tensors_of(tiny)[name.replace("w3", "w1")])


def test_greedy_completions_depend_on_the_prompt(tiny):
    model, tokenizer = load(tiny), AutoTokenizer.from_pretrained(tiny)
    prompts = ["The harbour at dawn", "Why is the sky blue?", "Dear Margaret,", "def main():", "Zero came late"]
    completions = set()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        generated = model.generate(**ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        new = tuple(generated[0, ids.input_ids.shape[1] :].tolist())
        assert len(set(new)) > 1
        completions.add(new)
    assert len(completions) == len(prompts)


def test_tokenizer_round_trips_any_text_and_starts_with_bos(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = MixtralConfig.from_pretrained(tiny)
    assert 259 <= len(tokenizer) <= config.vocab_size
    for kind in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{kind}_token_id") == getattr(config, f"{kind}_token_id")
    text = "  Günther paid 3 € for a 🥨 ,\n\tand don't ask <why>."
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("The weather report tomorrow").input_ids) < 20


def test_chat_template_renders_a_conversation(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s>[INST] Hi [/INST]Ho</s>[INST] ? [/INST]"


def test_sizes_are_what_they_are_meant_to_be():
    def size_bytes(size):
        return 2 * sum(map(math.prod, tensor_shapes(model_config(SIZES[size], torch.bfloat16)).values()))

    assert 250e6 <= size_bytes("demo") <= 350e6
    assert 2.9e9 <= size_bytes("bench") <= 3.1e9
    assert 1.2e9 <= size_bytes("qwen3-like") <= 1.4e9
    assert size_bytes("phi-like") <= 100e6


def test_a_size_of_one_family_has_the_same_numbers_in_another():
    qwen = as_family(SIZES["demo"], "qwen3_moe")
    assert (qwen["num_experts"], qwen["moe_intermediate_size"], qwen["norm_topk_prob"]) == (8, 1536, True)
    assert as_family(qwen, "mixtral") == SIZES["demo"] | {"model_type": "mixtral"}
    dense = with_changes(qwen | {"intermediate_size": 900}, {"intermediate_size": 40})
    assert (dense["moe_intermediate_size"], dense["intermediate_size"]) == (40, 900)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"num_experts_per_tok": 5}, "more than the 4 experts"),
        ({"num_attention_heads": 6}, "no multiple"),
        ({"head_dim": 7}, "even"),
        ({"head_dim": 0}, "at least 1"),
        ({"vocab_size": 100}, "vocabulary"),
        ({"num_key_value_heads": 0}, "at least 1"),
        ({"hidden_size": "wide"}, "no mixtral model"),
        ({"model_type": "gpt2"}, "no family 'gpt2'.*qwen3_moe"),
        ({"model_type": "phimoe", "num_experts_per_tok": 1}, "sparsemixer"),
    ],
)
def test_shape_that_contradicts_itself_is_a_usage_error(tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        make_checkpoint(tmp_path / "made", TINY | changes)
    assert not any(tmp_path.iterdir())


def test_existing_directory_is_never_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        make_checkpoint(tmp_path, TINY)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_empty_directory_is_filled(tmp_path):
    (tmp_path / "made").mkdir()
    Checkpoint.open(make_checkpoint(tmp_path / "made", TINY, tokenizer=False))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(StorageError if isinstance(failure, OSError) else KeyboardInterrupt):
        make_checkpoint(tmp_path / "made", TINY, shard_bytes=100_000, tokenizer=False)
    assert not any(tmp_path.iterdir())


def test_command_line_replaces_parts_of_a_size(tmp_path, capsys):
    out = tmp_path / "made"
    flags = "--size tiny --layers 1 --experts 8 --vocab 300 --head-dim 8 --sliding-window 9 --tied --dtype float32"
    assert main([str(out), *flags.split(), "--packed", "--shard-size", "50KB", "--no-tokenizer"]) == 0
    config = Checkpoint.open(out).config
    assert (config["num_hidden_layers"], config["num_local_experts"], config["vocab_size"]) == (1, 8, 300)
    assert (config["head_dim"], config["sliding_window"], config["tie_word_embeddings"]) == (8, 9, True)
    assert config["hidden_size"] == TINY["hidden_size"]
    assert not (out / "tokenizer.json").exists()
    assert "float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--size tiny --family qwen3_moe --ffn 32", {"model_type": "qwen3_moe", "moe_intermediate_size": 32}),
        ("--size tiny --family phimoe", {"model_type": "phimoe", "lm_head_bias": True, "intermediate_size": 96}),
        ("--size phi-like --layers 1 --vocab 300", {"model_type": "phimoe", "num_hidden_layers": 1}),
        ("--size tiny --router-skew 1 --router-topics 2", {"model_type": "mixtral"}),
    ],
)
def test_command_line_makes_every_family(tmp_path, flags, expected):
    assert main([str(tmp_path / "made"), *flags.split(), "--no-tokenizer"]) == 0
    assert Checkpoint.open(tmp_path / "made").config.items() >= expected.items()


def test_command_line_maps_errors_to_one_sentence_and_an_exit_code(tmp_path, capsys):
    assert main([str(tmp_path / "made"), "--size", "tiny", "--kv-heads", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file" / "made"), "--size", "tiny"]) == StorageError.exit_code


@pytest.mark.parametrize(
    "flag",
    [["--layers", "0"], ["--shard-size", "lots"], ["--shard-size", "0"], ["--dtype", "int8"], ["--router-skew", "-1"]],
)
def test_command_line_refuses_impossible_values(tmp_path, flag):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "made"), *flag])
    assert caught.value.code == 2
