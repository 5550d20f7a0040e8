"""Checkpoints of several dtypes, or with tensors at odd bytes, compute what the same values in one dtype do, in every tier."""

import random
import struct
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmoe import LLM
from flexmoe.errors import DataError
from flexmoe.models.loader import DTYPES, load_model
from flexmoe.weights import supply
from flexmoe.weights.stream import WeightStream
from policies import Policy, Workload
from tests.support.drawn import drawn
from tests.support.tiny import RECIPES, make

#: Percents of the weights in device memory and in host memory; the rest is on disk.
PLACES = {"disk, all tiers": ((0, 0), (30, 30)), "device, host": ((100, 0), (0, 100))}
PLACED = pytest.mark.parametrize(
    "placements",
    [name if name == "disk, all tiers" else pytest.param(name, marks=pytest.mark.slow) for name in PLACES],
    indirect=True,
)
PROMPT = list(range(20, 60))
KINDS = {
    "embedding": "embed_tokens",
    "norm": "norm",
    "attention": "self_attn",
    "router": "gate.weight",
    "expert": "experts",
    "head": "lm_head",
}
FLOATS = (*DTYPES.values(), torch.float64)
PLAIN = ("gqa-4-to-1", "gqa-8-to-2", "tied")


@pytest.fixture
def placements(request):
    return PLACES[request.param]


@pytest.fixture(scope="module", params=PLAIN)
def plain(request, tmp_path_factory):
    """A checkpoint's directory and its float32 tensors, whose values every dtype holds; both layouts, and a tied one."""
    directory, tensors = tmp_path_factory.mktemp("plain"), {}
    make(RECIPES[request.param], directory, lengths=(3,) * 2)
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return directory, {name: (t * 64).round().clamp(-120, 120) / 64 for name, t in tensors.items()}


def write(plain, tensors, directory, pad=0):
    """The checkpoint with these tensors; its file's header is longer by ``pad`` bytes."""
    directory.mkdir()
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_bytes((plain[0] / name).read_bytes())
    file = directory / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    file.write_bytes(struct.pack("<Q", size + pad) + raw[8 : 8 + size] + b" " * pad + raw[8 + size :])
    return directory


def logits(model, placement, dtype, tmp_path, group=None):
    policy = Policy.from_percent(
        (*placement, 100, 0, 100, 0), gpu_batch_size=2, num_gpu_batches=2, prompt_len=16, gen_len=8
    )
    options = {"device": "cpu", "offload_dir": tmp_path / "offload", "workload": Workload(prompt_len=16, gen_len=8)}
    policy = replace(policy, experts_per_unit=group)
    with LLM(model, policy=policy, dtype=dtype, longest_row=len(PROMPT), **options) as llm:
        return llm.logits(PROMPT)


@pytest.mark.parametrize(
    "plain, compute, staged, placements",
    drawn(list(product(PLAIN, DTYPES, (False, True), PLACES)), pairs=[(0, 2), (1, 2), (2, 3)]),
    indirect=["plain", "placements"],
)
def test_drawn_mixes_of_dtypes_compute_what_one_dtype_does(plain, compute, staged, placements, tmp_path, monkeypatch):
    if staged:
        monkeypatch.setattr(supply, "WeightStream", _staged_stream)
    rng = random.Random(f"{compute} {len(plain[1])} {placements}")
    one = write(plain, {name: t.to(DTYPES[compute]) for name, t in plain[1].items()}, tmp_path / "one")
    for turn, placement in enumerate(placements):
        most, kind, group = rng.choice(FLOATS[:3]), rng.choice([*KINDS, "any"]), rng.choice([None, 1, 2])

        def drawn(name, most=most, kind=kind):
            return rng.choice(FLOATS) if kind == "any" or KINDS[kind] in name else most

        mixed = {name: tensor.to(drawn(name)) for name, tensor in plain[1].items()}
        mixed = write(plain, mixed, tmp_path / f"mixed{turn}", pad=rng.randrange(8))
        got, want = (logits(model, placement, compute, tmp_path, group) for model in (mixed, one))
        assert _alike(got, want, compute, exact=staged), (most, kind, placement, group)


@pytest.mark.parametrize(
    "plain, kind, placements",
    drawn(list(product(PLAIN, KINDS, PLACES)), pairs=[(0, 2)]),
    indirect=["plain", "placements"],
)
def test_what_only_float32_holds_is_not_rounded_on_its_way_to_float32(plain, kind, placements, tmp_path):
    fine = {name: t + (2.0**-12 if KINDS[kind] in name else 0) for name, t in plain[1].items()}
    one = write(plain, fine, tmp_path / "one")
    mixed = {name: t if KINDS[kind] in name else t.bfloat16() for name, t in fine.items()}
    mixed = write(plain, mixed, tmp_path / "mixed")
    for placement in placements:
        got, want = (logits(model, placement, "float32", tmp_path) for model in (mixed, one))
        assert _alike(got, want, "float32"), placement


@PLACED
@pytest.mark.parametrize(
    "pad", [pytest.param(pad, marks=() if pad in (1, 2, 4) else pytest.mark.slow) for pad in range(8)]
)
def test_tensors_at_any_byte_are_read(plain, pad, placements, tmp_path):
    dtype = random.Random(pad).choice(list(DTYPES))
    tensors = {name: t.to(DTYPES[dtype]) for name, t in plain[1].items()}
    even, odd = write(plain, tensors, tmp_path / "even"), write(plain, tensors, tmp_path / "odd", pad)
    for placement in placements:
        got, want = (logits(model, placement, dtype, tmp_path) for model in (odd, even))
        assert _alike(got, want, dtype), placement


def test_only_the_routers_of_another_dtype_are_cast_and_the_plan_counts_one_dtype(plain, tmp_path):
    tensors = {name: t.bfloat16() for name, t in plain[1].items()}
    routers = {name: t for name, t in plain[1].items() if name.endswith("gate.weight")}
    one = load_model(str(write(plain, tensors, tmp_path / "one")))
    mixed = load_model(str(write(plain, tensors | routers, tmp_path / "mixed")))
    assert mixed.stored_dtype == torch.bfloat16 and mixed.arch == replace(one.arch, name=mixed.arch.name)
    source, plain_source = mixed.source(tmp_path), one.source(tmp_path)
    for unit in mixed.family.parts(mixed.checkpoint.tensors):
        got, want = source.layout(unit), plain_source.layout(unit)
        assert (got.stored_bytes, got.device_bytes) == (want.stored_bytes, want.device_bytes)
        cast = sum(not extent.path.endswith(".safetensors") for extent in got.extents)
        assert cast == (unit.kind == "attention")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantized_weights_among_others_are_refused(plain, dtype, tmp_path):
    name = next(name for name in plain[1] if "experts" in name)
    directory = write(plain, plain[1] | {name: plain[1][name].to(dtype)}, tmp_path / "quantized")
    with pytest.raises(DataError, match="looks quantized, and config.json has no quantization_config"):
        load_model(str(directory))


def test_a_file_that_became_shorter_is_found_out_while_it_is_cast(plain, tmp_path):
    mixed = {name: t.double() if "norm" in name else t for name, t in plain[1].items()}
    model = load_model(str(write(plain, mixed, tmp_path / "short")))
    file = tmp_path / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(DataError, match="it changed or is truncated"):
        logits(model, (0, 0), "float32", tmp_path)


def _alike(got, want, dtype, *, exact=False):
    """What is read straight into its slot lies as in its file; there the order of a product's sums may be another."""
    near = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.15}[dtype]
    return torch.equal(got, want) if exact else torch.allclose(got, want, rtol=0, atol=near)


def _staged_stream(store, order, slots, staging_slots, **options):
    return WeightStream(store, order, slots, max(1, staging_slots), **options, staged=True)
