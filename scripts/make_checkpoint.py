"""Write a synthetic Mixtral checkpoint with the files, names and layout of `save_pretrained`, and a real tokenizer.

    python -m scripts.make_checkpoint build/demo-model --size demo

The weights are random, so its completions mean nothing; but they depend on the whole prompt, and the same seed gives
the same model in both layouts and however it is cut into shards. Weights are made one shard at a time, so memory stays
near the shard size (times three for a packed float32 one), not the model's.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, MixtralConfig

from flexmoe.errors import FlexMoEError, StorageError, UsageError
from scripts.make_tokenizer import check_vocab_size, train_tokenizer

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
    ),
    "demo": dict(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_local_experts=8, num_experts_per_tok=2,
        num_attention_heads=8, num_key_value_heads=2, vocab_size=4096,
    ),
    "bench": dict(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=16, num_local_experts=8, num_experts_per_tok=2,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=32000,
    ),
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_SHARD_BYTES = 200_000_000


def make_checkpoint(
    out: str | os.PathLike[str],
    config_kwargs: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    seed: int = 0,
    tokenizer: bool = True,
) -> Path:
    """Write a checkpoint; it appears under its name only when it is complete.

    Args:
        out: the directory to make; it must not exist, or be empty.
        config_kwargs: arguments of `transformers.MixtralConfig`, for example one of `SIZES`.
        dtype: of the weights at rest.
        packed: the packed layout (`save_original_format=False`) instead of the per-expert layout of the hub.
        shard_bytes: no shard is larger than this, unless it holds a single tensor.
        seed: decides every weight, together with the weight's name.
        tokenizer: also train and save a byte-level BPE tokenizer, no larger than the model's vocabulary.

    Returns:
        The directory.

    Raises:
        UsageError: the shape contradicts itself, or `out` is already there.
        StorageError: writing failed; nothing is left behind.
    """
    out = Path(out)
    config = _config(config_kwargs, dtype, tokenizer)
    unfinished = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
            raise UsageError(f"{str(out)!r} already exists: remove it or choose another directory")
        unfinished.mkdir(parents=True)
        config.save_pretrained(unfinished)
        GenerationConfig.from_model_config(config).save_pretrained(unfinished)
        if tokenizer:
            train_tokenizer(config.vocab_size, config.max_position_embeddings).save_pretrained(unfinished)
        _write_weights(unfinished, config, dtype=dtype, packed=packed, shard_bytes=shard_bytes, seed=seed)
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"writing the checkpoint {str(out)!r} failed: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def tensor_shapes(config: MixtralConfig, *, packed: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor on disk by name, in the order in which a sweep needs them."""
    hidden, ffn, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    head_dim = _head_dim(config)
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        for name, shape in (attention | {"o_proj": (hidden, queries)}).items():
            shapes[f"{prefix}self_attn.{name}.weight"] = shape
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if packed:
            shapes[f"{prefix}mlp.gate.weight"] = (experts, hidden)
            shapes[f"{prefix}mlp.experts.gate_up_proj"] = (experts, 2 * ffn, hidden)
            shapes[f"{prefix}mlp.experts.down_proj"] = (experts, hidden, ffn)
            continue
        shapes[f"{prefix}block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, shape in {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}.items():
                shapes[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _config(config_kwargs: Mapping[str, Any], dtype: torch.dtype, tokenizer: bool) -> MixtralConfig:
    if dtype not in DTYPES.values():
        raise UsageError(f"weights cannot be stored as {dtype}: choose one of {', '.join(DTYPES)}")
    defaults = dict(max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    try:
        config = MixtralConfig(**(defaults | dict(config_kwargs)), architectures=["MixtralForCausalLM"], dtype=dtype)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UsageError("no Mixtral has this shape: " + " ".join(str(error.__cause__ or error).split())) from error
    for key in SIZES["tiny"]:
        if getattr(config, key) < 1:
            raise UsageError(f"{key} is {getattr(config, key)}, but must be at least 1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise UsageError(f"{heads} heads cannot share {kv_heads} KV heads evenly: make one a multiple of the other")
    if config.num_experts_per_tok > config.num_local_experts:
        raise UsageError(
            f"top-k is {config.num_experts_per_tok} but there are {config.num_local_experts} experts: lower top-k"
        )
    if config.head_dim is None and config.hidden_size % heads:
        raise UsageError(
            f"hidden {config.hidden_size} is no multiple of {heads} heads: change one, or give a head size"
        )
    if _head_dim(config) < 2 or _head_dim(config) % 2:
        raise UsageError(f"the head size is {_head_dim(config)}, but rotary embeddings need an even one")
    if tokenizer:
        check_vocab_size(config.vocab_size)
    return config


def _head_dim(config: MixtralConfig) -> int:
    return config.hidden_size // config.num_attention_heads if config.head_dim is None else config.head_dim


def _write_weights(
    directory: Path, config: MixtralConfig, *, dtype: torch.dtype, packed: bool, shard_bytes: int, seed: int
) -> None:
    shapes = tensor_shapes(config, packed=packed)
    shards = list(_cut(shapes, dtype.itemsize, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        # not bound to a name: one shard must be gone from memory before the next is made
        save_file(
            {name: _weight(name, shapes[name], dtype, seed) for name in names},
            directory / file,
            metadata={"format": "pt"},
        )
        # safetensors makes its files private to the user; the directory's other files follow the umask
        shutil.copymode(directory / "config.json", directory / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        _write_index(directory, shapes, dtype, weight_map)


def _write_index(
    directory: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, weight_map: dict[str, str]
) -> None:
    parameters = sum(math.prod(shape) for shape in shapes.values())
    metadata = {"total_parameters": parameters, "total_size": parameters * dtype.itemsize}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _cut(shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
    """Cut the names into runs of at most `shard_bytes`, or of a single larger tensor."""
    names: list[str] = []
    used_bytes = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if names and used_bytes + nbytes > shard_bytes:
            yield names
            names, used_bytes = [], 0
        names.append(name)
        used_bytes += nbytes
    yield names


def _weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One tensor of a layout; a packed one is put together from the matrices of the per-expert layout."""
    prefix, found, projection = name.partition(".mlp.experts.")
    if found:
        expert = f"{prefix}.block_sparse_moe.experts"
        parts = ("w1", "w3") if projection == "gate_up_proj" else ("w2",)
        packed = torch.empty(shape, dtype=dtype)
        rows = shape[1] // len(parts)
        for number in range(shape[0]):
            for place, part in enumerate(parts):
                matrix = _random(f"{expert}.{number}.{part}.weight", (rows, shape[2]), seed)
                packed[number, place * rows : (place + 1) * rows] = matrix
        return packed
    return _random(name.replace(".mlp.", ".block_sparse_moe."), shape, seed).to(dtype)


def _random(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Float32 values decided by seed and name.

    A standard deviation of 1/sqrt(inputs) keeps activations near one at any width (0.0156 at Mixtral's 4096, where
    real weights have about 0.02): narrow models with a fixed 0.02 would repeat a constant token.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if len(shape) == 1:
        return torch.empty(shape).normal_(1.0, 0.1, generator=generator)
    return torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)


def _count(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


def _size_bytes(text: str) -> int:
    """`200MB`, `1GiB` or a plain number of bytes."""
    match = re.fullmatch(r"(\d+)\s*(?:([KMG])(i?)B)?", text.strip())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 200MB or 1GiB")
    base = 1024 if match[3] else 1000
    return int(match[1]) * base ** (" KMG".index(match[2]) if match[2] else 0)


_SHAPE_FLAGS = {
    "--hidden": "hidden_size", "--ffn": "intermediate_size", "--layers": "num_hidden_layers",
    "--experts": "num_local_experts", "--top-k": "num_experts_per_tok", "--heads": "num_attention_heads",
    "--kv-heads": "num_key_value_heads", "--vocab": "vocab_size", "--head-dim": "head_dim",
    "--sliding-window": "sliding_window", "--max-position": "max_position_embeddings",
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_checkpoint",
        description="Write a synthetic Mixtral checkpoint, e.g. python -m scripts.make_checkpoint OUT --size demo",
    )
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    parser.add_argument("--size", choices=sorted(SIZES), default="demo", help="the shape to start from (default: demo)")
    for flag, key in _SHAPE_FLAGS.items():
        parser.add_argument(flag, dest=key, type=_count(1), metavar="N", help=f"replaces the size's {key}")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--packed", action="store_true", help="the packed layout instead of one tensor per expert")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--shard-size", type=_size_bytes, default=DEFAULT_SHARD_BYTES, help="default: 200MB")
    parser.add_argument("--seed", type=_count(0), default=0)
    parser.add_argument("--tokenizer", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    args = _parser().parse_args(argv)
    config_kwargs: dict[str, Any] = dict(SIZES[args.size], tie_word_embeddings=args.tied)
    config_kwargs |= {key: value for key in _SHAPE_FLAGS.values() if (value := getattr(args, key)) is not None}
    try:
        out = make_checkpoint(
            args.out,
            config_kwargs,
            dtype=DTYPES[args.dtype],
            packed=args.packed,
            shard_bytes=args.shard_size,
            seed=args.seed,
            tokenizer=args.tokenizer,
        )
    except FlexMoEError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return error.exit_code
    shard_bytes = [shard.stat().st_size for shard in out.glob("*.safetensors")]
    print(f"{out}: {sum(shard_bytes) / 1e6:.0f} MB of {args.dtype} weights in {len(shard_bytes)} file(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
