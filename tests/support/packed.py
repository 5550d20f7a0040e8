"""Tiny checkpoints in every packed format, and the same models with the values that these stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cost_model.model.arch import ModelArch
from flexmoe.formats.bits import packed_words
from flexmoe.formats.packed_matrix import CODECS, PackedMatrix
from tests.support.tiny import BASE, GEN_LEN, Recipe, Variant, make, transformers_greedy
from tests.support.tiny_families import COMMON, RECIPES, use_long_factors
from tests.support.tiny_models import DEEPSEEK, correct

GROUP = 32
_LINEAR = {"targets": ["Linear"]}
_WEIGHTS = {"strategy": "group", "group_size": GROUP, "symmetric": True}


def _compressed(layout: str, **weights: object) -> dict:
    groups = {"group_0": {**_LINEAR, "weights": weights, "input_activations": None}}
    ignored = ["lm_head", "re:.*gate$"]
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ignored}


#: `quantization_config` by format.
CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 16], "modules_to_not_convert": ["lm_head", "gate"]},
    "fp8-channel": _compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
    "int4": _compressed("pack-quantized", num_bits=4, type="int", **_WEIGHTS),
    "int4-zeros": _compressed("pack-quantized", num_bits=4, type="int", **_WEIGHTS | {"symmetric": False}),
    "int8": _compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "mxfp4": _compressed("mxfp4-pack-quantized", num_bits=4, type="float", **_WEIGHTS),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
}
#: Shapes whose matrices every format holds, with everything that a family may have.
FAMILIES = {
    "mixtral": Recipe({"sliding_window": 40}, {"max_shard_size": "200KB"}, base=BASE),
    "phimoe": replace(RECIPES["phi"], save={}),
    "qwen3_moe": Recipe(
        RECIPES["qwen3"].config | {"moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16},
        {},
        RECIPES["qwen3"].edit,
        "qwen3_moe",
        COMMON,
    ),
}
#: Of the families in `tests.support.tiny_models`, those of which FP8 uploads are common, with a shared expert or without.
MORE_FAMILIES = {
    "glm4_moe": Recipe(
        DEEPSEEK | {"moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16, "attention_bias": True},
        {},
        correct,
        "glm4_moe",
        COMMON,
    ),
    "minimax_m2": Recipe(
        {"intermediate_size": 32, "num_local_experts": 16, "num_experts_per_tok": 4, "head_dim": 16, "rotary_dim": 8},
        {},
        correct,
        "minimax_m2",
        COMMON,
    ),
}


def plain(family: str, directory: Path) -> Variant:
    """The unpacked model of a family."""
    return make((FAMILIES | MORE_FAMILIES)[family], directory, lengths=(5, 33, 1, 70))


def packed(variant: Variant, form: str, directory: Path) -> Variant:
    """The model with its matrices packed; what is expected of it is computed by transformers with the values they stand for."""
    write_packed(variant, form, directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory / "values", dtype=torch.float32, experts_implementation="eager"
    ).eval()
    if model.config.model_type == "phimoe":
        use_long_factors(model)
    greedy = [
        transformers_greedy(model, prompt, eos_token_id=None, max_new_tokens=GEN_LEN) for prompt in variant.prompts
    ]
    return Variant(directory, model, variant.prompts, greedy, variant.eos_ids)


def write_packed(variant: Variant, form: str, directory: Path) -> None:
    """The packed checkpoint, and in `values` below it one of the values that it stands for."""
    tensors = {
        name: t for file in sorted(variant.directory.glob("*.safetensors")) for name, t in load_file(file).items()
    }
    config = json.loads((variant.directory / "config.json").read_text())
    own = config | {"quantization_config": CONFIGS[form]}
    arch, stored, values = ModelArch.from_config(own), {}, {}
    for name, weight in tensors.items():
        if not _is_packed(name):
            stored[name] = values[name] = weight
            continue
        module = name.removesuffix(".weight")
        fields = _packed_fields(arch.packed, weight)
        named = {f.suffix: fields[f.name] for f in CODECS[arch.packed.codec].fields(arch.packed, *weight.shape)}
        stored |= {f"{module}.{suffix}": tensor for suffix, tensor in named.items()}
        matrix = PackedMatrix(arch.packed, fields, tuple(weight.shape))
        values[name] = matrix.unpack(torch.empty(weight.shape))
        if form == "gptq":
            stored[f"{module}.g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
        if form.startswith("int"):
            stored[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    _save(directory, stored, own)
    _save(directory / "values", values, config)


def _is_packed(name: str) -> bool:
    return name.endswith(".weight") and ("_proj." in name or ".experts." in name)


def _packed_fields(packed, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Numbers that are near the weight where that is easy, and scales; the model need only be one that can be computed."""
    rows, columns = weight.shape
    of_rows, of_columns = packed.groups(rows, columns)
    generator = torch.Generator().manual_seed(rows * columns)
    if packed.codec == "fp8":
        scale = 0.002 + 0.004 * torch.rand(of_rows, of_columns, generator=generator)
        spread = scale.repeat_interleave(packed.rows or rows, 0)[:rows]
        spread = spread.repeat_interleave(packed.columns or columns, 1)[:, :columns]
        return {"packed": (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn), "scale": scale}
    if packed.codec == "mxfp4":
        exponents = torch.randint(122, 126, (rows, of_columns), generator=generator, dtype=torch.uint8)
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
        return {"packed": codes, "scale": exponents}
    high, size = (1 << packed.bits) - 1, packed.columns or columns
    groups = weight.float().view(rows, of_columns, size)
    scale = (groups.abs().amax(-1) / (high // 2)).to(torch.bfloat16 if packed.codec == "integer" else torch.float16)
    numbers = (groups / scale.float()[..., None]).round().add((high + 1) // 2).clamp(0, high)
    numbers = numbers.view(rows, columns).to(torch.uint8)
    zeros = torch.randint(high // 2, high // 2 + 3, (rows, of_columns), generator=generator, dtype=torch.uint8)
    if packed.codec == "integer":
        fields = {"packed": packed_words(numbers, packed.bits, 1), "scale": scale}
        return fields | ({"zero": packed_words(zeros, packed.bits, 0)} if packed.zeros else {})
    order = torch.arange(8) if packed.codec == "gptq" else torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    if packed.codec == "gptq":
        words = packed_words(numbers.T, packed.bits, 0)
    else:
        words = packed_words(numbers.T.unflatten(1, (-1, 8))[:, :, order].flatten(1), packed.bits, 1)
    zero = packed_words((zeros.T - packed.zero_shift).unflatten(1, (-1, 8))[:, :, order].flatten(1), packed.bits, 1)
    return {"packed": words, "zero": zero, "scale": scale.T.contiguous()}


def _save(directory: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
