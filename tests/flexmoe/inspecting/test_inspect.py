"""What `inspect` says of checkpoints that run, and of what is none or is broken: right, complete, and in the run's own words."""

import json

import pytest
import torch

from cost_model.model.families import SUPPORTED_MODEL_TYPES
from cost_model.model.known_shapes import SHAPES
from flexmoe.cli.inspect import main
from flexmoe.errors import FlexMoEError
from flexmoe.inspecting.inspection import inspect
from flexmoe.models.loader import load_model
from tests.support.headers import write_file, write_headers
from tests.support.packed import CONFIGS
from tests.support.tokenizers import HARMONY_TEMPLATE, HARMONY_TOKENS, build_reasoning_tokenizer, build_tokenizer

QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "mlp_only_layers": [0],
    "dtype": "bfloat16",
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "sliding_window": 128,
    "dtype": "bfloat16",
}
PHI = MIXTRAL | {"model_type": "phimoe", "attention_bias": True, "lm_head_bias": True, "sliding_window": None}
INCOMPLETE = "the download is probably incomplete, fetch it again"
READ = (
    "Read are fp8 in blocks, mxfp4, compressed-tensors (pack-quantized, float-quantized, mxfp4-pack-quantized), gptq and awq; or "
    "use the original checkpoint"
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("config", [QWEN, MIXTRAL, PHI], ids=["qwen3", "mixtral", "phi"])
def test_every_layout_of_every_family_is_taken_and_its_bytes_are_those_of_the_shape(tmp_path, config, stacked, shards):
    found = inspect(write_headers(tmp_path, config, stacked=stacked, shards=shards))
    assert found.runs and found.files == shards and found.model_type == config["model_type"]
    assert sum(kind.nbytes for kind in found.stored.values()) == found.arch.total_bytes
    assert sum(kind.nbytes for kind in found.stored.values()) == 2 * found.arch.parameters
    sparse, arch = found.arch.num_layers - len(found.arch.dense_layers), found.arch
    assert found.stored["experts"].nbytes == sparse * arch.num_experts * arch.expert_bytes
    assert ("dense MLPs" in found.stored) == bool(arch.dense_layers) and "not read" not in found.stored


@pytest.mark.parametrize("name", sorted(path.stem for path in SHAPES.glob("*.json")))
def test_every_known_model_is_taken_in_every_layout_with_all_its_bytes(tmp_path, name):
    config = json.loads((SHAPES / f"{name}.json").read_text())
    config |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "mlp_only_layers": [], "moe_layer_end_index": -1}
    # The shapes have no factors of LongRoPE.
    config = {field: value for field, value in config.items() if field not in ("layer_types", "rope_scaling")}
    for stacked in (False, True)[: 1 if "quantization_config" in config else 2]:
        found = inspect(write_headers(tmp_path / str(stacked), config, stacked=stacked))
        assert found.runs, found.faults
        assert sum(kind.nbytes for kind in found.stored.values()) == found.arch.total_bytes
        assert found.arch.active_parameters <= found.arch.parameters


def test_a_part_of_a_larger_model_and_layers_that_predict_further_are_taken(tmp_path):
    def larger(tensors):
        further = {n.replace("layers.2", "layers.3"): each for n, each in tensors.items() if "layers.2." in n}
        return {f"language_model.{name}": each for name, each in (tensors | further).items()}

    found = inspect(write_headers(tmp_path, QWEN | {"num_nextn_predict_layers": 1}, edit=larger))
    assert found.runs, found.faults
    assert found.stored["not read"].tensors == 4 * 3 + 9
    read = sum(kind.nbytes for name, kind in found.stored.items() if name != "not read")
    assert read == found.arch.total_bytes


@pytest.mark.parametrize("form", CONFIGS)
def test_every_packed_format_is_taken_with_what_is_packed_of_it(tmp_path, form):
    found = inspect(write_headers(tmp_path, QWEN | {"quantization_config": CONFIGS[form]}))
    assert found.runs, found.faults
    assert sum(kind.nbytes for kind in found.stored.values()) == found.arch.total_bytes
    assert {kind for kind, each in found.stored.items() if each.packed} == {"experts", "dense MLPs", "attention"}


def test_what_is_printed_of_a_checkpoint_that_runs(tmp_path, capsys):
    build_reasoning_tokenizer(tmp_path, HARMONY_TOKENS, HARMONY_TEMPLATE)
    write_headers(tmp_path, QWEN | {"quantization_config": CONFIGS["int4"]})
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"checkpoint: {tmp_path}",
        "model_type: qwen3_moe",
        "layers: 3, 1 of them dense; 3 layers see all tokens",
        "experts: 4 in a layer, 2 for a token, 32 wide; hidden size 64",
        "attention: 4 query heads, 2 KV heads of size 32",
        "parameters: 0.00 billion, of which a token uses 0.00 billion",
        "context: 512 tokens; KV cache: 768 bytes a token, 408 as int8 (--compress-cache)",
        "weights: 0.2 MiB in 1 file; packed: int4 in groups of 32 (attention, expert, dense), all else is not",
        "  experts          27648 bytes  48 tensors, I32, BF16 (packed)",
        "  dense MLPs       10368 bytes  6 tensors, I32, BF16 (packed)",
        "  attention        41472 bytes  24 tensors, I32, BF16 (packed)",
        "  routers           1024 bytes  2 tensors, BF16",
        "  norms             1280 bytes  13 tensors, BF16",
        "  embedding        40960 bytes  1 tensors, BF16",
        "  head             40960 bytes  1 tensors, BF16",
        "tokenizer: tokenizer.json (TokenizersBackend)",
        "chat template: chat_template.jinja; reasoning in the channels of harmony",
        "a run takes it",
        "note: the scales of packed matrices have not been read, as a run does; --scales reads them",
        f"next: python -m flexmoe.run --model {tmp_path} -i requests.jsonl -o out.jsonl --dry-run",
    ]


def test_the_json_has_what_is_printed(tmp_path, capsys):
    write_headers(tmp_path, MIXTRAL)
    assert main([str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["runs"] and record["refused"] == [] and record["weights"]["packed"] is None
    assert record["shape"]["windows"] == [[128, 2]] and record["shape"]["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert record["shape"]["int8_kv_bytes_per_token"] == 2 * 2 * 2 * (16 + 2)
    unused = 2 * 2 * 3 * 64 * 32
    assert record["shape"]["active_parameters"] == record["shape"]["parameters"] - unused
    assert record["next"][1] == f"python -m flexmoe.quantize {tmp_path} OUT --format int4"
    assert record["notes"][0].startswith("there is no tokenizer (none of tokenizer.json")


def test_a_checkpoint_of_a_hundred_billion_weights_is_read_without_its_weights(tmp_path):
    config = json.loads((SHAPES / "qwen3-30b-a3b.json").read_text())
    found = inspect(write_headers(tmp_path, config, shards=4))
    assert found.runs and 30e9 < found.arch.parameters < 31e9 and 3e9 < found.arch.active_parameters < 4e9
    assert found.stored["experts"].tensors == 48 * 128 * 3


@pytest.mark.parametrize("damage, code", [(torch.inf, 65), (1.0, 0)])
def test_scales_are_read_where_that_is_asked_for(tmp_path, capsys, damage, code):
    write_headers(tmp_path, QWEN | {"quantization_config": CONFIGS["int4"]})
    assert main([str(tmp_path)]) == 0
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    name = next(name for name in header if name.endswith("weight_scale"))
    at = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
    value = torch.tensor([damage], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    path.write_bytes(raw[:at] + value + raw[at + 2 :])
    assert main([str(tmp_path), "--scales"]) == code
    assert ("has scales that are not finite" in capsys.readouterr().out) == bool(code)


def with_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def unknown(d):
    write_headers(d, QWEN)
    (d / "config.json").write_text(json.dumps(QWEN | {"model_type": "qwen9_moe"}))


def encoder(d):
    (d / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 64, "hidden_act": "gelu"}))
    write_file(d / "model.safetensors", {"embeddings.LayerNorm.weight": (torch.float32, (64,))})


def vision(d):
    write_headers(d, QWEN)
    (d / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe", "text_config": QWEN}))


def gguf(d):
    (d / "config.json").write_text(json.dumps(QWEN))
    (d / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def gguf_alone(d):
    (d / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def pickles(d):
    (d / "config.json").write_text(json.dumps(QWEN))
    (d / "pytorch_model.bin").write_bytes(b"PK")


def quantized(**values):
    return lambda d: (
        write_headers(d, QWEN) and (d / "config.json").write_text(json.dumps(QWEN | {"quantization_config": values}))
    )


def adapter(d):
    (d / "adapter_config.json").write_text("{}")
    write_file(d / "adapter_model.safetensors", {"lora_A.weight": (torch.float32, (4, 4))})


def lost_shard(d):
    write_headers(d, QWEN, shards=3)
    (d / "model-00002-of-00003.safetensors").unlink()


def stopped(d):
    lost_shard(d)
    (d / ".cache/huggingface/download").mkdir(parents=True)
    (d / ".cache/huggingface/download/x.00.incomplete").write_bytes(b"")


def pointer(d):
    write_headers(d, QWEN, shards=2)
    (d / "model-00001-of-00002.safetensors").write_text(POINTER)


def pointer_config(d):
    write_headers(d, QWEN)
    (d / "config.json").write_text(POINTER)


def cut(d):
    path = write_headers(d, QWEN) / "model.safetensors"
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1)


def empty_file(d):
    (write_headers(d, QWEN, shards=2) / "model-00002-of-00002.safetensors").write_bytes(b"")


def no_index(d):
    (write_headers(d, QWEN, shards=2) / "model.safetensors.index.json").unlink()


def wrong_index(d):
    write_headers(d, QWEN, shards=2)
    with_index(d, lambda table: table.update({"lm_head.weight": "model-00002-of-00002.safetensors"}))


def consolidated(d):
    (d / "config.json").write_text(json.dumps(QWEN))
    write_file(d / "consolidated.safetensors", {"norm.weight": (torch.bfloat16, (64,))})


def cache(d):
    (d / "snapshots").mkdir()
    (d / "refs").mkdir()


def no_json(d):
    (write_headers(d, QWEN) / "config.json").write_text("<html>")


def integers(d):
    write_headers(d, QWEN, edit=lambda ts: ts | {"model.layers.1.self_attn.q_proj.weight": (torch.int8, (128, 64))})


def other_sizes(d):
    write_headers(d, QWEN, edit=lambda ts: ts | {"model.layers.1.self_attn.q_proj.weight": (torch.bfloat16, (64, 64))})


def fewer(d):
    write_headers(d, QWEN, edit=lambda ts: {n: t for n, t in ts.items() if ".1.self_attn.q_proj" not in n})


def bad_sampling(d):
    (write_headers(d, QWEN) / "generation_config.json").write_text('{"top_p": 7}')


def bad_end(d):
    (write_headers(d, QWEN) / "generation_config.json").write_text('{"eos_token_id": "x"}')


RUN = "{d} cannot be run: "
FAMILIES = f"supported families: {', '.join(SUPPORTED_MODEL_TYPES)}."
REFUSED = {
    "unknown family": (unknown, [RUN + f"model_type 'qwen9_moe' is not supported; {FAMILIES}"]),
    "encoder": (
        encoder,
        [
            RUN + f"model_type 'bert' is not supported; {FAMILIES}",
            RUN + "hidden_act is 'gelu'; only 'silu' is supported.",
        ],
    ),
    "vision and language": (vision, [RUN + f"model_type 'qwen3_vl_moe' is not supported; {FAMILIES}"]),
    "GGUF": (
        gguf,
        [
            "'{d}' has its weights only as GGUF (.gguf), which is not read: download the model's safetensors, in 16 bits or "
            "packed"
        ],
    ),
    "GGUF without a config": (
        gguf_alone,
        [
            "'{d}' has its weights only as GGUF (.gguf), which is not read: download the model's safetensors, in 16 bits or "
            "packed"
        ],
    ),
    "pickles": (
        pickles,
        [
            "'{d}' has its weights only as pickles (.bin, .pt), which are never loaded because they can run code: convert to "
            "safetensors with save_pretrained, or download the safetensors files"
        ],
    ),
    "bitsandbytes": (
        quantized(quant_method="bitsandbytes", load_in_4bit=True),
        [
            RUN
            + "config.json has a quantization_config that cannot be run: the quantization method 'bitsandbytes' is not "
            f"read. {READ}"
        ],
    ),
    "NVFP4": (
        quantized(
            quant_method="compressed-tensors",
            format="nvfp4-pack-quantized",
            config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}},
            ignore=["lm_head", "re:.*gate$"],
        ),
        [
            RUN + "config.json has a quantization_config that cannot be run: compressed-tensors with format "
            f"'nvfp4-pack-quantized' is not read, but pack-quantized, float-quantized and mxfp4-pack-quantized are. {READ}"
        ],
    ),
    "NVFP4 of ModelOpt": (
        quantized(quant_method="modelopt", quant_algo="NVFP4"),
        [
            RUN
            + "config.json has a quantization_config that cannot be run: the quantization method 'modelopt' is not read. "
            f"{READ}"
        ],
    ),
    "adapter": (
        adapter,
        [
            "'{d}' is an adapter (adapter_config.json), which needs its base model: merge the two with peft's "
            "merge_and_unload, save the result with save_pretrained, and give that directory",
        ],
    ),
    "no files": (
        lambda d: None,
        [f"'{{d}}' has no config.json, so it is not a checkpoint or {INCOMPLETE}"],
    ),
    "no weights": (
        lambda d: (d / "config.json").write_text(json.dumps(QWEN)),
        [f"'{{d}}' has neither model.safetensors nor model.safetensors.index.json, so {INCOMPLETE}"],
    ),
    "a shard is missing": (
        lost_shard,
        [f"the file '{{d}}/model-00002-of-00003.safetensors' is missing (or a dangling link): {INCOMPLETE}"],
    ),
    "a download was stopped": (
        stopped,
        [f"the file '{{d}}/model-00002-of-00003.safetensors' is missing (or a dangling link): {INCOMPLETE}"],
    ),
    "pointer": (
        pointer,
        [
            "'{d}/model-00001-of-00002.safetensors' is a Git-LFS pointer, not the file itself: run `git lfs pull` in the directory"
        ],
    ),
    "pointer instead of the config": (
        pointer_config,
        ["'{d}/config.json' is a Git-LFS pointer, not the file itself: run `git lfs pull` in the directory"],
    ),
    "truncated": (
        cut,
        [
            "'{d}/model.safetensors' is truncated: its header describes 373259 bytes but the file has 373258, which ends within "
            f"tensor 'model.norm.weight'; {INCOMPLETE}"
        ],
    ),
    "empty file": (empty_file, [f"'{{d}}/model-00002-of-00002.safetensors' is empty: {INCOMPLETE}"]),
    "no index": (
        no_index,
        [f"'{{d}}' has safetensors shards but no model.safetensors.index.json, so {INCOMPLETE}"],
    ),
    "wrong index": (
        wrong_index,
        [
            "tensor 'lm_head.weight' is in shard '{d}/model-00001-of-00002.safetensors', but the index "
            "model.safetensors.index.json places it in 'model-00002-of-00002.safetensors': the index and the shards are "
            "probably from different downloads",
            "the index '{d}/model.safetensors.index.json' places tensor 'lm_head.weight' in "
            "'model-00002-of-00002.safetensors', but that shard does not contain it: the index and the shards are probably "
            "from different downloads",
        ],
    ),
    "the publisher's names": (
        consolidated,
        [
            "'{d}' has its weights under their publisher's names (consolidated.safetensors), which are not read: download the "
            "files of transformers (model*.safetensors)"
        ],
    ),
    "cache of the hub": (
        cache,
        ["'{d}' is a folder of the hub's cache: give the directory below '{d}/snapshots'"],
    ),
    "no JSON": (
        no_json,
        [
            "'{d}/config.json' is not valid JSON (Expecting value: line 1 column 1 (char 0)): the file is damaged or "
            + INCOMPLETE
        ],
    ),
    "integers": (
        integers,
        [
            "tensor 'model.layers.1.self_attn.q_proj.weight' in '{d}/model.safetensors' is int8, but weights must be stored as "
            "bfloat16, float16 or float32: it looks quantized, and config.json has no quantization_config for it"
        ],
    ),
    "other sizes": (
        other_sizes,
        [
            "tensor 'model.layers.1.self_attn.q_proj.weight' in '{d}/model.safetensors' has shape [64, 64], but config.json "
            "asks for [128, 64]: the config.json and the weights probably belong to different models"
        ],
    ),
    "a tensor is missing": (
        fewer,
        [
            "the tensors of '{d}' are not those that its config.json describes (1 ('model.layers.1.self_attn.q_proj.weight') "
            f"missing): supported are {', '.join(sorted(SUPPORTED_MODEL_TYPES))} with the names of the hub or packed by transformers; the "
            f"config.json may belong to another model, the checkpoint may be quantized, or {INCOMPLETE}"
        ],
    ),
    "sampling defaults": (
        bad_sampling,
        [
            "generation_config.json: top_p is 7; give a number above 0 and at most 1; repair it, or ignore it with "
            "generation_config='none'"
        ],
    ),
    "ends": (
        bad_end,
        ["eos_token_id in generation_config.json is 'x'; it must be a token id or a list of token ids"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_refuses_is_told_in_its_words(tmp_path, case):
    make, expected = REFUSED[case]
    make(tmp_path)
    found = inspect(tmp_path)
    said, wanted = [str(fault) for fault in found.faults], [each.replace("{d}", str(tmp_path)) for each in expected]
    assert said == wanted and not found.runs
    if case in ("sampling defaults", "ends"):
        return  # the job refuses these, when it reads the row's defaults
    with pytest.raises(FlexMoEError) as refused:
        load_model(str(tmp_path))
    assert str(refused.value) == said[0] and type(refused.value) is type(found.faults[0])


def test_every_reason_is_told_and_not_only_the_first(tmp_path, capsys):
    config = QWEN | {
        "hidden_act": "gelu",
        "rope_scaling": {"rope_type": "unheard-of"},
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    write_headers(tmp_path, QWEN, shards=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").write_text(POINTER)
    (tmp_path / "generation_config.json").write_text('{"top_p": 7, "eos_token_id": "x"}')
    assert main([str(tmp_path)]) == 65
    out = capsys.readouterr().out
    assert "a run refuses it, for 7 reasons:" in out
    for part in (
        "hidden_act",
        "rope type 'unheard-of'",
        "bitsandbytes",
        "00001-of-00003",
        "Git-LFS",
        "top_p",
        "eos_token_id",
    ):
        assert part in out, part


def test_a_stopped_download_is_noted_and_to_be_resumed(tmp_path, capsys):
    stopped(tmp_path)
    assert main([str(tmp_path)]) == 65
    out = capsys.readouterr().out.splitlines()
    assert "note: a download has begun a file and not finished: it runs still, or was stopped" in out
    assert out[-1] == "next: run the same download again: it resumes"


@pytest.mark.parametrize("name, code", [("nowhere", 66), ("file", 65)])
def test_what_is_no_directory_is_one_sentence(tmp_path, capsys, name, code):
    (tmp_path / "file").write_text("x")
    assert main([str(tmp_path / name)]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tokenizer_that_cannot_be_used_is_no_reason_to_refuse(tmp_path):
    write_headers(tmp_path, QWEN)
    build_tokenizer(tmp_path, "{% for %}")
    found = inspect(tmp_path)
    assert (
        found.runs
        and found.texts.problems
        == ("the chat template cannot be read: expected token 'end of statement block', got 'end of statement block'",)
        or "the chat template cannot be read" in found.texts.problems[0]
    )
    (tmp_path / "tokenizer.json").write_text(POINTER)
    assert "is a Git-LFS pointer" in inspect(tmp_path).texts.problems[0]
