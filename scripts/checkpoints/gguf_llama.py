"""A dense Llama in a GGUF file, as a Hugging Face model: config, weights and tokenizer.

It reads the `llama` architecture with a byte-level BPE that splits numbers into digits, as SmolLM has it, in any of
GGUF's quantizations. What else the file asks for is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexmoe.errors import DataError, InputMissingError, UsageError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
#: `tokenizer.ggml.token_type` of special tokens.
_CONTROL = 3

Metadata = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLlama:
    """A model as it is in the file.

    Args:
        config: arguments of transformers' `LlamaConfig`; those of a Mixtral are spelled alike.
        weights: float32, by their names in transformers' `LlamaForCausalLM`; no head if it is the embedding.
        tokenizer: with the chat template of the file, if it has one.
        generation_config: where a completion ends.
    """

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerFast
    generation_config: GenerationConfig


def read_gguf(path: Path) -> DenseLlama:
    """Read a whole model into memory.

    Raises:
        UsageError: the package `gguf` is not installed.
        InputMissingError: the file cannot be read.
        DataError: it is no GGUF file, or asks for something that is not done here.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError(
            "GGUF files need the package gguf, which is not installed; pip install gguf brings it"
        ) from error
    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise InputMissingError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError) as error:
        raise DataError(f"{path} is no whole GGUF file: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    try:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = _config(metadata, tied="output.weight" not in tensors)
        weights = dict(_weight(tensor, config) for tensor in tensors.values())
        _check(weights, LlamaConfig(**config))
        return DenseLlama(
            config=config, weights=weights, tokenizer=_tokenizer(metadata), generation_config=_generation(metadata)
        )
    except KeyError as error:
        raise DataError(f"{path} has no {error.args[0]}, which a model of the llama architecture needs") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    _only(metadata, "general.architecture", "llama")
    _only(metadata, "llama.rope.scaling.type", "none", absent="none")
    heads = metadata["llama.attention.head_count"]
    hidden = metadata["llama.embedding_length"]
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    _only(metadata, "llama.rope.dimension_count", head_dim, absent=head_dim)
    return {
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata["llama.context_length"],
        # 32 bits in the file; the shortest number that it may have been
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)},
        "tie_word_embeddings": tied,
    } | {f"{name}_token_id": _special_id(metadata, name) for name in ("bos", "eos", "pad")}


def _only(metadata: Metadata, key: str, known: object, absent: object = None) -> None:
    found = metadata.get(key, absent)
    if found != known:
        raise DataError(f"{key} is {found!r}, and only {known!r} can be read")


def _special_id(metadata: Metadata, name: str) -> int | None:
    return metadata.get(f"tokenizer.ggml.{_SPECIAL[name]}_token_id")


def _weight(tensor: Any, config: Mapping[str, Any]) -> tuple[str, torch.Tensor]:
    """Name and value of a tensor in transformers' model."""
    from gguf.quants import dequantize

    value = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(*reversed(tensor.shape.tolist())).float()
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    match tensor.name.split("."):
        case [top, "weight"] if top in _TOP:
            return f"{_TOP[top]}.weight", value
        case ["blk", layer, part, "weight"] if part in _OF_LAYER:
            if part in heads:  # llama.cpp rotates neighbours, transformers the two halves of a head
                value = value.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
            return f"model.layers.{layer}.{_OF_LAYER[part]}.weight", value
    raise DataError(f"the tensor {tensor.name} belongs to no dense Llama without biases")


def _check(weights: Mapping[str, torch.Tensor], config: LlamaConfig) -> None:
    """Refuses weights that are not exactly those of the config."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    found = {name: tuple(t.shape) for name, t in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            has, asked = (shapes.get(name, "none") for shapes in (found, wanted))
            raise DataError(f"the shape of {name} is {has}, and the metadata ask for {asked}")


def _tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    _only(metadata, "tokenizer.ggml.model", "gpt2")
    _only(metadata, "tokenizer.ggml.pre", "smollm")
    _only(metadata, "tokenizer.ggml.add_bos_token", False, absent=False)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    fast = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, kinds) if kind == _CONTROL])
    special = {f"{name}_token": tokens[id] for name in _SPECIAL if (id := _special_id(metadata, name)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _generation(metadata: Metadata) -> GenerationConfig:
    ids = {f"{name}_token_id": _special_id(metadata, name) for name in ("bos", "eos", "pad")}
    return GenerationConfig(**{name: id for name, id in ids.items() if id is not None})
