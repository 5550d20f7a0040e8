"""A checkpoint is packed: what is written, what becomes of a job that was stopped, and what is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from cost_model.model.packing import packed_as
from flexmoe.cli.inspect import main as inspect
from flexmoe.cli.main import main
from flexmoe.errors import DataError, InputMissingError, StorageError, UsageError
from flexmoe.models.loader import load_model
from flexmoe.quantizing import beside, outputs
from flexmoe.quantizing import quantize as job
from flexmoe.quantizing.checksums import check_checkpoint
from flexmoe.quantizing.quantize import quantize
from policies.common import file_io
from tests.support.drawn import drawn
from tests.support.exactness import Case, check
from tests.support.packed import FAMILIES, MORE_FAMILIES
from tests.support.paths import ROOT
from tests.support.tiny import PACKED, SHARDED, Variant, make, transformers_greedy
from tests.support.tiny_families import use_long_factors
from tests.support.tiny_models import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")
FORMATS = {"int4": 32, "int8": 0, "fp8": None, "fp8-block": 32, "mxfp4": None}
#: The layout of the hub in one file and in several, and that of transformers.
SAVES = {"mixtral": SHARDED, "phimoe": PACKED, "qwen3_moe": {}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Checkpoints by family, with files beside them: experts in bfloat16, the rest in float32, which ids are compared in."""
    root, made = tmp_path_factory.mktemp("plain"), {}

    def of(family):
        if family not in made:
            directory = root / family
            variant = make(
                replace((FAMILIES | MORE_FAMILIES)[family], save=SAVES.get(family, {})),
                directory,
                lengths=(5, 33, 1, 70),
            )
            for file in directory.glob("*.safetensors"):
                tensors = load_file(file)
                halved = {name: t.bfloat16() if "experts" in name else t for name, t in tensors.items()}
                save_file(halved, file, {"format": "pt"})
            for name in ("vocab.txt", "chat_template.jinja", "LICENSE", "README.md", "pytorch_model.bin"):
                (directory / name).write_text(f"the {name}")
            made[family] = variant
        return made[family]

    return of


def read(directory):
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def unpacked(variant, directory):
    """The model with the values that compressed-tensors reads, and what transformers generates of it."""
    config = json.loads((directory / "config.json").read_text())
    scheme = QuantizationConfig.model_validate(config.pop("quantization_config")).config_groups["group_0"]
    compressor, tensors, values = BaseCompressor.get_value_from_registry(scheme.format), read(directory), {}
    for name in tensors:
        module, field = name.rsplit(".", 1)
        if field == "weight_scale":
            own = {
                f: t
                for f in ("weight", "weight_packed", "weight_shape")
                if (t := tensors.get(f"{module}.{f}")) is not None
            }
            values[f"{module}.weight"] = compressor.decompress(own | {field: tensors[name]}, scheme)["weight"]
    left = {name: t for name, t in tensors.items() if name.rsplit(".", 1)[0] + ".weight" not in values}
    (directory / "values").mkdir()
    save_file(
        left | values | {n: t for n, t in tensors.items() if n.endswith("bias")},
        directory / "values" / "model.safetensors",
        {"format": "pt"},
    )
    (directory / "values" / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(
        directory / "values", dtype=torch.float32, experts_implementation="eager"
    ).eval()
    if config["model_type"] == "phimoe":
        use_long_factors(model)
    greedy = [transformers_greedy(model, prompt, eos_token_id=None) for prompt in variant.prompts]
    return Variant(directory, model, variant.prompts, greedy, variant.eos_ids)


def packed(source, family, form, out, **more):
    return quantize(source(family).directory, out, form.removesuffix("-block"), FORMATS[form], **more)


PAIRS = [(family, form) for family in FAMILIES for form in FORMATS]


@pytest.mark.parametrize(
    "family, form",
    [pytest.param(*pair, marks=[] if number in (0, 7, 14) else pytest.mark.slow) for number, pair in enumerate(PAIRS)],
)
def test_ids_are_those_of_the_values_that_compressed_tensors_reads(family, form, source, tmp_path, monkeypatch):
    packed(source, family, form, tmp_path / "out")
    variant = unpacked(source(family), tmp_path / "out")
    case = Case(placement=(0, 50, 50, 0, 100, 0), batches=(2, 2), staged=False, eos=False)
    check(variant, case, "cpu", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize("form", FORMATS)
def test_further_families_are_packed_too(family, form, source, tmp_path, monkeypatch):
    packed(source, family, form, tmp_path / "out")
    variant = unpacked(source(family), tmp_path / "out")
    case = Case(placement=(0, 50, 50, 0, 100, 0), batches=(2, 2), staged=False, eos=False)
    check(variant, case, "cpu", tmp_path, monkeypatch)


@pytest.mark.parametrize("recipe", ["granite", "phi3"])
def test_matrices_that_lie_together_are_not_packed(recipe, tmp_path):
    variant = make(RECIPES[recipe], tmp_path / "plain", lengths=(1, 2))
    with pytest.raises(UsageError, match="lie together in one tensor"):
        quantize(variant.directory, tmp_path / "out", "fp8", None)


@pytest.mark.parametrize("family, form", drawn(PAIRS))
def test_experts_and_projections_are_packed_and_the_rest_is_copied(family, form, source, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "SHARD_BYTES", 30_000)
    made = packed(source, family, form, tmp_path / "out")
    loaded, kinds = load_model(str(tmp_path / "out")), {"attention", "expert"}
    assert loaded.arch.packed == made.packed and kinds <= set(made.packed.kinds) <= kinds | {"dense"}
    was, now = read(source(family).directory), read(tmp_path / "out")
    kept = {name: t for name, t in was.items() if "_proj" not in name and ".experts." not in name}
    for name, tensor in kept.items():
        there = now[name.replace("mlp.router", "block_sparse_moe.gate")]
        assert there.dtype == tensor.dtype and torch.equal(there, tensor), name
    assert not any("_scale" in name for name in now if "_proj" not in name and ".experts." not in name)
    assert made.source_bytes == sum(t.nbytes for t in was.values())
    assert made.packed_bytes == sum(t.nbytes for t in now.values())
    assert 0 < made.relative_error < 0.13
    beside = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert beside == {
        "checksums.jsonl",
        "config.json",
        "generation_config.json",
        "vocab.txt",
        "chat_template.jinja",
        "LICENSE",
        "model.safetensors.index.json",
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the chat_template.jinja"
    assert os.listdir(tmp_path) == ["out"]


def test_tensors_of_an_expert_lie_beside_each_other_and_all_are_aligned(source, tmp_path):
    packed(source, "mixtral", "int4", tmp_path / "out")
    tensors = load_model(str(tmp_path / "out")).checkpoint.tensors
    assert all(info.offset % info.dtype.itemsize == 0 for info in tensors.values())
    own = [info for name, info in tensors.items() if ".1.block_sparse_moe.experts." in name and "shape" not in name]
    assert sum(info.nbytes for info in own) == max(i.offset + i.nbytes for i in own) - min(i.offset for i in own)


@pytest.mark.parametrize("dequantize", [False, True])
def test_transformers_loads_it(dequantize, source, tmp_path):
    packed(source, "qwen3_moe", "int4", tmp_path / "out")
    given = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **given).eval()
    variant = unpacked(source("qwen3_moe"), tmp_path / "out")
    ids = torch.tensor([variant.prompts[1]])
    with torch.no_grad():
        logits, expected = model(ids).logits, variant.model(ids).logits
    # in float32 it does not round values to the dtype of their scales
    assert (logits - expected).norm() < 0.02 * expected.norm()


class Stop(Exception):
    """What ends a job in the middle."""


def stopped(source, out, monkeypatch, error, writes=110, form="int4"):
    """A job that fails in the middle of a file, after several are whole."""
    write, calls = file_io.write_at, iter(range(writes))

    def failing(descriptor, data, offset):
        if next(calls, None) is None:
            raise error
        write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "SHARD_BYTES", 30_000)
        patch.setattr(file_io, "write_at", failing)
        with pytest.raises((StorageError, Stop)) as raised:
            packed(source, "mixtral", form, out)
    return raised.value


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def whole(source, tmp_path_factory, monkeypatch):
    """The files of a job that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "SHARD_BYTES", 30_000)
        packed(source, "mixtral", "int4", out)
    return files(out)


def test_a_full_disk_leaves_nothing_under_the_name_and_the_job_resumes(source, tmp_path, monkeypatch, whole):
    error = stopped(source, tmp_path / "out", monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert isinstance(error, StorageError) and "No space left on device" in str(error)
    assert os.listdir(tmp_path) == [".out.quantizing"]
    part = tmp_path / ".out.quantizing" / "checkpoint"
    there = {path.name: path.stat().st_ino for path in part.iterdir()}
    assert len(there) > 1 and all(name.endswith(".safetensors") for name in there)
    monkeypatch.setattr(outputs, "SHARD_BYTES", 30_000)
    packed(source, "mixtral", "int4", tmp_path / "out")
    assert files(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]
    assert all((tmp_path / "out" / name).stat().st_ino == inode for name, inode in there.items())


def fails_once(monkeypatch, where, name, number):
    """The call of that number fails as on a full disk, the others do what they do."""
    function, calls = getattr(where, name), iter(range(1, number + 1))

    def failing(*args):
        if next(calls, None) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args)

    monkeypatch.setattr(where, name, failing)


@pytest.mark.parametrize(
    "where, name, number",
    [(file_io, "sync", 4), (file_io, "write_all", 3), (file_io, "rename", 3), (beside, "write_file", 2)],
    ids=["sync", "journal", "rename", "config"],
)
def test_a_disk_that_is_full_at_any_step_leaves_nothing_under_the_name(
    where, name, number, source, tmp_path, monkeypatch, whole
):
    monkeypatch.setattr(outputs, "SHARD_BYTES", 30_000)
    fails_once(monkeypatch, where, name, number)
    with pytest.raises(StorageError, match="No space left on device"):
        packed(source, "mixtral", "int4", tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.quantizing"]
    packed(source, "mixtral", "int4", tmp_path / "out")
    assert files(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
from flexmoe.quantizing import outputs
from flexmoe.quantizing.quantize import quantize
from policies.common import file_io
outputs.SHARD_BYTES = 30_000
write, calls = file_io.write_at, iter(range(110))
def killing(descriptor, data, offset):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    write(descriptor, data[: len(data) // 2], offset)
    write(descriptor, data, offset)
file_io.write_at = killing
quantize(sys.argv[1], sys.argv[2], "int4", 32)
"""


def test_a_killed_job_resumes_to_the_same_bytes(source, tmp_path, monkeypatch, whole):
    command = [sys.executable, "-c", KILLED, str(source("mixtral").directory), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    work = tmp_path / ".out.quantizing"
    assert not (tmp_path / "out").exists() and list((work / "checkpoint").glob("*.tmp-*"))
    with (work / "journal.jsonl").open("ab") as journal:
        journal.write(b'0123 {"file": "model-')  # it was being written
    monkeypatch.setattr(outputs, "SHARD_BYTES", 30_000)
    packed(source, "mixtral", "int4", tmp_path / "out")
    assert files(tmp_path / "out") == whole and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("place", [3, 0.3, 0.999])
def test_a_flipped_byte_of_what_was_written_before_is_named(place, source, tmp_path, monkeypatch):
    stopped(source, tmp_path / "out", monkeypatch, Stop())
    file = sorted((tmp_path / ".out.quantizing" / "checkpoint").iterdir())[1]
    data = bytearray(file.read_bytes())
    at = place if place >= 1 else int(place * len(data))
    data[at] ^= 4
    tensors = read_extents(file) if place < 1 else {}
    file.write_bytes(data)
    monkeypatch.setattr(outputs, "SHARD_BYTES", 30_000)
    with pytest.raises(DataError) as refused:
        packed(source, "mixtral", "int4", tmp_path / "out")
    name = next((name for name, (first, last) in tensors.items() if first <= at < last), "the header")
    assert repr(name) in str(refused.value) and str(file) in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [3, 0.3, 0.999])
def test_a_flipped_byte_of_a_finished_checkpoint_is_named(place, source, tmp_path, capsys):
    made = packed(source, "mixtral", "int4", tmp_path / "out").directory
    assert inspect([str(made), "--checksums"]) == 0
    (file,) = made.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    at = place if place >= 1 else int(place * len(data))
    name = "the header"
    if place < 1:
        name = next(name for name, (first, last) in read_extents(file).items() if first <= at < last)
    data[at] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError) as refused:
        check_checkpoint(made)
    assert repr(name) in str(refused.value) and str(file) in str(refused.value)
    assert inspect([str(made), "--checksums"]) == 65
    assert place < 1 or inspect([str(made)]) == 65  # without hashes only what is no checkpoint any more
    capsys.readouterr()


@pytest.mark.parametrize(
    "text",
    [
        b"[]\n",
        b'{"file": 3}\n',
        b'{"file": "../x", "stretches": []}\n',
        b'{"file": "a", "stretches": [["t", -1, 2, "d"]]}\n',
    ],
    ids=["list", "no stretches", "another directory", "negative"],
)
def test_hashes_that_are_none_are_refused(text, source, tmp_path):
    made = packed(source, "mixtral", "int4", tmp_path / "out").directory
    (made / "checksums.jsonl").write_bytes(text)
    with pytest.raises(DataError, match="does not hold hashes of weights"):
        check_checkpoint(made)
    (made / "checksums.jsonl").unlink()
    with pytest.raises(InputMissingError):
        check_checkpoint(made)


def read_extents(file):
    from flexmoe.checkpoint.safetensors import read_tensors

    return {name: (info.offset, info.offset + info.nbytes) for name, info in read_tensors(file).items()}


def test_a_file_that_was_cut_short_is_named(source, tmp_path, monkeypatch):
    stopped(source, tmp_path / "out", monkeypatch, Stop())
    file = sorted((tmp_path / ".out.quantizing" / "checkpoint").iterdir())[0]
    os.truncate(file, 5000)
    monkeypatch.setattr(outputs, "SHARD_BYTES", 30_000)
    with pytest.raises(DataError, match="is not what was written there"):
        packed(source, "mixtral", "int4", tmp_path / "out")


def test_a_damaged_line_of_the_journal_costs_the_files_after_it(source, tmp_path, monkeypatch, whole):
    stopped(source, tmp_path / "out", monkeypatch, Stop())
    journal = tmp_path / ".out.quantizing" / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"weight", b"weighs", 1)
    journal.write_bytes(b"\n".join(lines))
    monkeypatch.setattr(outputs, "SHARD_BYTES", 30_000)
    packed(source, "mixtral", "int4", tmp_path / "out")
    assert files(tmp_path / "out") == whole


def test_what_was_begun_in_another_format_is_not_resumed(source, tmp_path, monkeypatch):
    stopped(source, tmp_path / "out", monkeypatch, Stop())
    with pytest.raises(UsageError, match="another model, or in another format"):
        packed(source, "mixtral", "int8", tmp_path / "out")


def test_a_disk_without_room_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "free_disk_bytes", lambda directory: 1000)
    with pytest.raises(StorageError, match="the disk of .* has 1000 bytes left"):
        packed(source, "mixtral", "int4", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.safetensors"))


def test_what_is_there_is_not_replaced(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="already exists"):
        packed(source, "mixtral", "int4", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["mine"]


def test_a_packed_checkpoint_is_not_packed_again(source, tmp_path):
    packed(source, "mixtral", "int8", tmp_path / "out")
    with pytest.raises(DataError, match="is packed already, in int8"):
        quantize(tmp_path / "out", tmp_path / "again", "int4", 32)


@pytest.mark.parametrize(
    "form, group, sentence",
    [
        ("int4", 128, "matrices of 64 and 96 inputs, .* group_size can be 32$"),
        ("int4", 64, "matrices of 96 inputs, .* group_size can be 32$"),
        ("int3", None, "choose int4, int8, fp8, mxfp4"),
        ("mxfp4", 64, "groups of 32 by definition"),
        ("int4", -1, "group_size is -1"),
    ],
)
def test_groups_that_do_not_fit_are_refused_with_those_that_do(form, group, sentence, source, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        quantize(source("mixtral").directory, tmp_path / "out", form, group)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named(source, tmp_path):
    for path in source("qwen3_moe").directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name][2, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="experts.3.up_proj.weight.* not finite"):
        quantize(tmp_path, tmp_path / "out", "fp8")


def test_the_command_says_what_was_made(source, tmp_path, capsys):
    directory, out = str(source("mixtral").directory), str(tmp_path / "out")
    assert main(["quantize", directory, out, "--format", "int4", "--group-size", "32"]) == 0
    said = capsys.readouterr().out
    assert "packed: int4 in groups of 32 (attention, expert)" in said and out in said and "root mean square" in said
    assert main(["quantize", directory, str(tmp_path / "two"), "--format", "int4", "--group-size", "128"]) == 2
    assert "--group-size can be 32" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_planner_counts_is_what_is_written(family, source, tmp_path):
    plain = load_model(str(source(family).directory)).arch
    for form in ("int4", "int8", "fp8", "mxfp4"):
        made = quantize(source(family).directory, tmp_path / form, form)
        assert made.packed == packed_as(plain, form).packed == load_model(str(tmp_path / form)).arch.packed
