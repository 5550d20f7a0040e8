"""What the checkpoint reader accepts, and the one sentence with which it refuses everything else."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.errors import DataError, InputMissingError
from flexmoe.models.registry import FAMILIES

SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SHAPE))


@pytest.fixture(scope="module")
def sharded_template(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(directory, max_shard_size="60KB")
    return directory


@pytest.fixture
def sharded(sharded_template, tmp_path):
    return Path(shutil.copytree(sharded_template, tmp_path / "sharded"))


@pytest.fixture
def single(tmp_path):
    """A directory of one file with two small tensors, simple enough to rewrite byte by byte."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, tmp_path / SINGLE)
    return tmp_path


def write_file(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def edit_index(directory: Path, edit) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def refusal(directory: Path, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        Checkpoint.open(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items()}


# Layouts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("per_expert", [True, False], ids=["per_expert", "packed"])
def test_extents_read_with_pread_equal_what_safetensors_loads(tmp_path, dtype, shard_size, per_expert):
    MixtralForCausalLM(MixtralConfig(**SHAPE)).to(dtype).save_pretrained(
        tmp_path, max_shard_size=shard_size, save_original_format=per_expert
    )
    assert (len(shards(tmp_path)) > 1) == (shard_size == "40KB")
    expected = {name: tensor for shard in shards(tmp_path) for name, tensor in load_file(shard).items()}
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, info in checkpoint.tensors.items():
        fd = os.open(info.path, os.O_RDONLY)
        raw = os.pread(fd, info.nbytes, info.offset)
        os.close(fd)
        tensor = torch.frombuffer(bytearray(raw), dtype=info.dtype).view(info.shape)
        assert info.dtype == dtype and torch.equal(tensor, expected[name]), name
    checkpoint.check(shapes_of(checkpoint), FAMILIES)


def test_save_pretrained_writes_per_expert_names_by_default(model, tmp_path):
    model.save_pretrained(tmp_path)
    shapes = shapes_of(Checkpoint.open(tmp_path))
    assert shapes["model.layers.0.block_sparse_moe.gate.weight"] == (4, 32)
    assert shapes["model.layers.0.block_sparse_moe.experts.0.w1.weight"] == (48, 32)
    assert shapes["model.layers.1.block_sparse_moe.experts.3.w2.weight"] == (32, 48)
    assert shapes["model.layers.1.block_sparse_moe.experts.3.w3.weight"] == (48, 32)
    assert not any(".mlp." in name for name in shapes)


def test_save_pretrained_writes_packed_names_without_the_original_format(model, tmp_path):
    model.save_pretrained(tmp_path, save_original_format=False)
    shapes = shapes_of(Checkpoint.open(tmp_path))
    assert shapes["model.layers.0.mlp.gate.weight"] == (4, 32)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (4, 96, 32)
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (4, 32, 48)
    assert not any("block_sparse_moe" in name for name in shapes)


def test_configuration_is_read_and_an_absent_generation_config_is_empty(sharded):
    checkpoint = Checkpoint.open(str(sharded))
    assert checkpoint.directory == sharded
    assert checkpoint.config["num_local_experts"] == 4
    assert checkpoint.generation_config["eos_token_id"] == 2
    (sharded / "generation_config.json").unlink()
    assert Checkpoint.open(sharded).generation_config == {}


def test_shards_may_be_symlinks_as_in_the_hub_cache(sharded, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(list(sharded.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert Checkpoint.open(sharded).tensors


def test_padding_metadata_and_empty_tensors_are_accepted(single):
    header = {"__metadata__": {"format": "pt"}, "b": entry(0, 8, [2]), "none": entry(8, 8, [0, 5])}
    write_file(single / SINGLE, json.dumps(header).encode() + b"   ", bytes(8))
    tensors = Checkpoint.open(single).tensors
    assert list(tensors) == ["b", "none"]
    assert tensors["none"].nbytes == 0 and tensors["none"].shape == (0, 5)


# Files that are not there


def test_missing_directory_is_missing_input(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere", InputMissingError)


def test_missing_config_is_missing_input(single):
    (single / "config.json").unlink()
    assert "config.json" in refusal(single, InputMissingError)


def test_file_instead_of_a_directory_is_refused(single):
    assert "not a directory" in refusal(single / SINGLE)


def test_directory_without_weights_says_incomplete_download(single):
    (single / SINGLE).unlink()
    sentence = refusal(single)
    assert SINGLE in sentence and "incomplete" in sentence


def test_pickled_weights_are_refused_with_the_way_out(single):
    (single / SINGLE).rename(single / "pytorch_model.bin")
    assert "convert to safetensors" in refusal(single)


def test_shards_without_an_index_say_incomplete_download(sharded):
    (sharded / INDEX).unlink()
    sentence = refusal(sharded)
    assert INDEX in sentence and "incomplete" in sentence


def test_missing_shard_says_incomplete_download(sharded):
    shards(sharded)[1].unlink()
    sentence = refusal(sharded)
    assert "model-00002-of" in sentence and "missing" in sentence and "incomplete" in sentence


def test_dangling_link_counts_as_a_missing_shard(sharded):
    shard = shards(sharded)[1]
    shard.unlink()
    shard.symlink_to("gone")
    sentence = refusal(sharded)
    assert shard.name in sentence and "dangling" in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_shard_is_missing_input(single):
    (single / SINGLE).chmod(0)
    assert "permissions" in refusal(single, InputMissingError)


# The index


def test_tensor_that_the_index_lists_but_the_shard_lacks_is_named(sharded):
    shard = shards(sharded)[0].name
    edit_index(sharded, lambda weight_map: weight_map.update({"model.ghost": shard}))
    sentence = refusal(sharded)
    assert "'model.ghost'" in sentence and shard in sentence and INDEX in sentence


def test_tensor_that_the_index_does_not_list_is_named(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    sentence = refusal(sharded)
    assert "'model.norm.weight'" in sentence and "does not list it" in sentence and "model-0" in sentence


def test_tensor_that_the_index_places_in_another_shard_is_named(sharded):
    first, second = (shard.name for shard in shards(sharded)[:2])

    def swap(weight_map):
        name = next(name for name, shard in weight_map.items() if shard == first)
        weight_map[name] = second

    edit_index(sharded, swap)
    assert "places it in" in refusal(sharded)


def test_buffers_are_ignored_wherever_the_index_places_them_and_weights_are_not(sharded):
    """Drawn: a buffer in any shard, listed there, elsewhere or not at all; a weight in its place is always found out."""
    rng, files = random.Random(3), [shard.name for shard in shards(sharded)]
    expected = shapes_of(Checkpoint.open(sharded))
    names = [
        "model.layers.{}.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.{}.position_ids",
    ]
    names += ["model.embeddings.position_ids", "model.layers.{}.self_attn.rotary_emb.cos_cached"]
    for turn in range(12):
        copy = Path(shutil.copytree(sharded, sharded.parent / f"copy{turn}"))
        buffer, file, listed = rng.choice(names).format(rng.randrange(2)), rng.choice(files), rng.choice([None, *files])

        def put(name, copy=copy, file=file, listed=listed):
            save_file(load_file(copy / file) | {name: torch.ones(8)}, copy / file, metadata={"format": "pt"})
            if listed is not None:
                edit_index(copy, lambda weight_map: weight_map.update({name: listed}))

        put(buffer)
        Checkpoint.open(copy).check(expected, FAMILIES)
        put(f"model.layers.0.other{turn}.weight")
        with pytest.raises(DataError, match=f"other{turn}"):
            Checkpoint.open(copy).check(expected, FAMILIES)


def test_a_shard_of_another_download_is_found_out_by_a_needed_tensor(sharded):
    first, second = shards(sharded)[:2]
    shutil.copy(first, second)
    assert "different downloads" in refusal(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..",
        "",
        "nul\0.safetensors",
        "\ud800.safetensors",
        "a" * 300 + ".safetensors",
        "config.json",
        None,
        7,
    ],
)
def test_index_may_only_name_plain_files_beside_it(sharded, shard):
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    sentence = refusal(sharded)
    assert "'model.norm.weight'" in sentence and "plain name" in sentence


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": "x"}'])
def test_index_without_a_weight_map_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    assert "weight_map" in refusal(sharded)


# JSON files

BAD_JSON = {
    "malformed": b'{"a": ',
    "duplicate key": b'{"a": 1, "a": 2}',
    "nested duplicate key": b'{"x": {"a": 1, "a": 2}}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "overflow to infinity": b'{"a": 1e999}',
    "not an object": b"[1, 2]",
    "not UTF-8": b'{"a": "\xff"}',
    "huge integer": b'{"a": ' + b"9" * 5000 + b"}",
    "deeply nested": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "empty": b"",
    "Git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
}


@pytest.mark.parametrize("raw", BAD_JSON.values(), ids=BAD_JSON.keys())
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
def test_json_that_readers_could_disagree_on_is_refused(sharded, file, raw):
    (sharded / file).write_bytes(raw)
    assert file in refusal(sharded)


def test_duplicate_key_is_named(sharded):
    (sharded / "config.json").write_bytes(BAD_JSON["duplicate key"])
    assert "'a' appears twice" in refusal(sharded)


# One safetensors file


def test_truncated_shard_gives_both_sizes_and_the_tensor(sharded):
    shard = shards(sharded)[0]
    whole = shard.stat().st_size
    os.truncate(shard, whole - 100)
    sentence = refusal(sharded)
    assert shard.name in sentence and str(whole) in sentence and str(whole - 100) in sentence
    assert "tensor" in sentence and "incomplete" in sentence


def test_shard_cut_within_its_header_gives_both_sizes(sharded):
    shard = shards(sharded)[0]
    os.truncate(shard, 50)
    sentence = refusal(sharded)
    assert shard.name in sentence and "50 bytes" in sentence and "incomplete" in sentence


def test_file_longer_than_its_header_says_is_refused(single):
    size = (single / SINGLE).stat().st_size
    with open(single / SINGLE, "ab") as file:
        file.write(b"tail")
    sentence = refusal(single)
    assert "longer" in sentence and str(size) in sentence and str(size + 4) in sentence


def test_git_lfs_pointer_instead_of_a_shard_says_git_lfs_pull(sharded):
    shards(sharded)[1].write_bytes(BAD_JSON["Git-LFS pointer"])
    sentence = refusal(sharded)
    assert "model-00002-of" in sentence and "git lfs pull" in sentence


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty"),
        (b"\x02\0\0", "too few"),
        (b"<!DOCTYPE html><html>Not found</html>", "error page"),
        ((2**60).to_bytes(8, "little") + b"{}", "format allows"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "format allows"),
        ((99_000_000).to_bytes(8, "little") + b"{}", "truncated"),
        (bytes(8), "does not start with '{'"),
        ((4).to_bytes(8, "little") + b"  {}", "does not start with '{'"),
        ((4).to_bytes(8, "little") + b"{]]]", "not valid JSON"),
    ],
)
def test_file_that_is_not_safetensors_is_refused(single, raw, says):
    (single / SINGLE).write_bytes(raw)
    sentence = refusal(single)
    assert SINGLE in sentence and says in sentence


def test_fifo_is_refused_and_not_waited_for(single):
    (single / SINGLE).unlink()
    os.mkfifo(single / SINGLE)
    assert "not a regular file" in refusal(single)


BAD_HEADERS = {
    "overlapping offsets": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "overlaps"),
    "the same bytes twice": ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, "overlaps"),
    "gap": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, "gap"),
    "gap at the start": ({"a": entry(4, 12, [2])}, "gap"),
    "size is not the shape's": ({"a": entry(0, 12, [2])}, "takes 8"),
    "shape product overflows": ({"a": entry(0, 12, [2**62, 2**62])}, "takes"),
    "end before begin": ({"a": entry(12, 0, [3])}, "data_offsets"),
    "negative begin": ({"a": entry(-4, 8, [3])}, "data_offsets"),
    "three offsets": ({"a": entry(0, 12, [3]) | {"data_offsets": [0, 4, 12]}}, "data_offsets"),
    "fractional offset": ({"a": entry(0, 12.0, [3])}, "data_offsets"),
    "offset past any file": ({"a": entry(0, 2**70, [3])}, "data_offsets"),
    "offset out of the file": ({"a": entry(0, 4 * 10**12, [10**12])}, "truncated"),
    "negative size": ({"a": entry(0, 12, [-1, -3])}, "shape"),
    "boolean size": ({"a": entry(0, 4, [True])}, "shape"),
    "shape is a string": ({"a": entry(0, 4, "1")}, "shape"),
    "too many dimensions": ({"a": entry(0, 4, [1] * 10_000)}, "shape"),
    "unknown dtype": ({"a": entry(0, 12, [3], "F4")}, "'F4'"),
    "dtype is a list": ({"a": entry(0, 12, [3], ["F32"])}, "dtype"),
    "missing field": ({"a": {"dtype": "F32", "shape": [3]}}, "data_offsets"),
    "additional field": ({"a": entry(0, 12, [3]) | {"stride": 1}}, "exactly"),
    "entry is a number": ({"a": 12}, "exactly"),
    "metadata is a number": ({"__metadata__": 1, "a": entry(0, 12, [3])}, "__metadata__"),
    "metadata holds a list": ({"__metadata__": {"x": []}, "a": entry(0, 12, [3])}, "__metadata__"),
    "duplicate tensor": (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "twice"),
    "NaN": (b'{"a": NaN}', "not finite"),
    "deeply nested": (b'{"a": ' + b"[" * 1_000_000, "too deeply"),
    "no tensors": ({}, "no tensors"),
}


@pytest.mark.parametrize(("header", "says"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_damaged_header_is_refused(single, header, says):
    write_file(single / SINGLE, header, b"" if header == {} else bytes(12))
    sentence = refusal(single)
    assert says in sentence
    assert header == {} or SINGLE in sentence


# Against the model


def test_missing_and_unexpected_tensors_are_counted_and_three_are_named(sharded):
    checkpoint = Checkpoint.open(sharded)
    expected = shapes_of(checkpoint)
    wanted = {f"model.layers.9.self_attn.x{i}.weight": (1,) for i in range(5)}
    gone = [name for name in expected if name.startswith("model.layers.1.self_attn.")]
    for name in gone:
        del expected[name]
    with pytest.raises(DataError) as caught:
        checkpoint.check(expected | wanted, FAMILIES)
    sentence = str(caught.value)
    assert "5 ('model.layers.9.self_attn.x0.weight'" in sentence and "x2" in sentence and "x3" not in sentence
    assert f"{len(gone)} ('model.layers.1" in sentence and "unexpected" in sentence and "config.json" in sentence
    assert all(family in sentence for family in FAMILIES)


def test_tensors_outside_the_layers_and_inv_freq_buffers_may_be_left_over(single):
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "lm_head.weight": torch.ones(2)}
    save_file({"a": torch.ones(2), **extras}, single / SINGLE)
    Checkpoint.open(single).check({"a": (2,)}, FAMILIES)


def test_wrong_shape_names_the_file_and_both_shapes(single):
    with pytest.raises(DataError) as caught:
        Checkpoint.open(single).check({"a": (3, 2)}, FAMILIES)
    sentence = str(caught.value)
    assert "'a'" in sentence and SINGLE in sentence and "[2, 3]" in sentence and "[3, 2]" in sentence


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.bool], ids=str)
def test_dtype_that_is_not_a_plain_float_is_refused(single, dtype):
    save_file({"a": torch.ones(2).to(dtype)}, single / SINGLE)
    checkpoint = Checkpoint.open(single)
    with pytest.raises(DataError) as caught:
        checkpoint.check({"a": (2,)}, FAMILIES)
    sentence = str(caught.value)
    assert "'a'" in sentence and SINGLE in sentence and "bfloat16" in sentence and "quantized" in sentence


def test_errors_carry_the_exit_codes_of_sysexits():
    assert (DataError.exit_code, InputMissingError.exit_code) == (65, 66)
