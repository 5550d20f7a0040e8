"""Write a synthetic checkpoint of any family with the files, names and layout of `save_pretrained`, and a real tokenizer.

    python -m scripts.make_checkpoint build/demo-model --size demo
    python -m scripts.make_checkpoint build/skewed --size qwen3-like --router-skew 1
    python -m scripts.make_checkpoint build/gpt-oss --size gpt-oss-like --mxfp4

The weights are random, so its completions mean nothing; but they depend on the whole prompt, and the same seed gives
the same model in both layouts and however it is cut into shards. Weights are made one shard at a time, so memory stays
near the shard size (twice that while a shard is written), not the model's.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from flexmoe.errors import FlexMoEError, UsageError
from flexmoe.models.registry import FAMILIES
from scripts.checkpoints.mxfp4 import QUANTIZATION, packed_shapes, packed_tensor
from scripts.checkpoints.router_skew import RouterSkew
from scripts.checkpoints.shapes import (
    SIZES,
    as_family,
    model_arch,
    model_config,
    tensors_on_disk,
    with_changes,
)
from scripts.checkpoints.tokenizer import check_vocab_size, train_tokenizer
from scripts.checkpoints.values import Values
from scripts.checkpoints.writing import DEFAULT_SHARD_BYTES, DTYPES, write_weights, written_whole


def make_checkpoint(
    out: str | os.PathLike[str],
    config_kwargs: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = False,
    mxfp4: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    seed: int = 0,
    tokenizer: bool = True,
    router_skew: float = 0.0,
    router_topics: int = 1,
) -> Path:
    """Write a checkpoint; it appears under its name only when it is complete.

    Args:
        out: the directory to make; it must not exist, or be empty.
        config_kwargs: arguments of the family's config in transformers, and its `model_type` (Mixtral without one); for
            example one of `SIZES`.
        dtype: of the weights at rest.
        packed: the packed layout (`save_original_format=False`) instead of the per-expert layout of the hub.
        mxfp4: experts of gpt-oss in MXFP4, as its checkpoints on the hub have them.
        shard_bytes: no shard is larger than this, unless it holds a single tensor.
        seed: decides every weight, together with the weight's name.
        tokenizer: also train and save a byte-level BPE tokenizer, no larger than the model's vocabulary.
        router_skew: exponent of the Zipf law that the routers' choices follow, see `router_skew.RouterSkew`; 0: no experts are
            preferred.
        router_topics: contiguous parts of the vocabulary that have favourites of their own.

    Returns:
        The directory.

    Raises:
        UsageError: the shape contradicts itself, or `out` is already there.
        StorageError: writing failed; nothing is left behind.
    """
    out = Path(out)
    config = _config(config_kwargs, dtype, tokenizer)
    values = Values(seed, _skew(config, router_skew, router_topics, seed))
    tensors = tensors_on_disk(config, packed=packed)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if mxfp4:
        shapes = packed_shapes(shapes, config.model_type)
        config.quantization_config = QUANTIZATION

    def tensor(name: str) -> torch.Tensor:
        return packed_tensor(name, shapes[name], seed) if name not in tensors else values.tensor(tensors[name], dtype)

    with written_whole(out) as directory:
        config.save_pretrained(directory)
        GenerationConfig.from_model_config(config).save_pretrained(directory)
        if tokenizer:
            train_tokenizer(config.vocab_size, config.max_position_embeddings).save_pretrained(directory)
        whole = dict.fromkeys(shapes.keys() - tensors.keys(), torch.uint8)
        write_weights(directory, shapes, tensor, dtype, shard_bytes, whole)
    return out


def _config(config_kwargs: Mapping[str, Any], dtype: torch.dtype, tokenizer: bool) -> PreTrainedConfig:
    if dtype not in DTYPES.values():
        raise UsageError(f"weights cannot be stored as {dtype}: choose one of {', '.join(DTYPES)}")
    config = model_config(config_kwargs, dtype)
    if tokenizer:
        check_vocab_size(config.vocab_size)
    return config


def _skew(config: PreTrainedConfig, exponent: float, topics: int, seed: int) -> RouterSkew | None:
    if exponent > 0:
        return RouterSkew(model_arch(config), exponent=exponent, topics=topics, seed=seed)
    if topics > 1:
        raise UsageError(f"{topics} topics need favourites to differ in: give a router skew above 0 as well")
    return None


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


def _exponent(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no exponent of at least 0")
    return value


_SHAPE_FLAGS = {
    "--hidden": "hidden_size",
    "--ffn": "intermediate_size",
    "--layers": "num_hidden_layers",
    "--experts": "num_local_experts",
    "--top-k": "num_experts_per_tok",
    "--heads": "num_attention_heads",
    "--kv-heads": "num_key_value_heads",
    "--vocab": "vocab_size",
    "--head-dim": "head_dim",
    "--sliding-window": "sliding_window",
    "--max-position": "max_position_embeddings",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_checkpoint",
        description="Write a synthetic checkpoint, e.g. python -m scripts.make_checkpoint OUT --size demo",
    )
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    parser.add_argument("--size", choices=sorted(SIZES), default="demo", help="the shape to start from (default: demo)")
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), help="of the model; default: that of the size, most are Mixtrals"
    )
    for flag, key in _SHAPE_FLAGS.items():
        parser.add_argument(flag, dest=key, type=_count(1), metavar="N", help=f"replaces the size's {key}")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--packed", action="store_true", help="the packed layout instead of one tensor per expert")
    parser.add_argument("--mxfp4", action="store_true", help="experts of gpt-oss in MXFP4, as on the hub")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--shard-size", type=_size_bytes, default=DEFAULT_SHARD_BYTES, help="default: 200MB")
    parser.add_argument("--seed", type=_count(0), default=0)
    parser.add_argument(
        "--router-skew",
        type=_exponent,
        default=0.0,
        metavar="S",
        help="routers choose experts by about a Zipf law of this exponent, in another order in every layer (default: 0, alike)",
    )
    parser.add_argument(
        "--router-topics",
        type=_count(1),
        default=1,
        metavar="N",
        help="the vocabulary falls into N contiguous parts with favourites of their own; a text stays in its part (default: 1)",
    )
    parser.add_argument("--tokenizer", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    args = _parser().parse_args(argv)
    size = SIZES[args.size]
    config_kwargs = as_family(size, args.family or size.get("model_type", "mixtral"))
    changes = {key: value for key in _SHAPE_FLAGS.values() if (value := getattr(args, key)) is not None}
    config_kwargs = with_changes(config_kwargs, changes | {"tie_word_embeddings": args.tied})
    try:
        out = make_checkpoint(
            args.out,
            config_kwargs,
            dtype=DTYPES[args.dtype],
            packed=args.packed,
            mxfp4=args.mxfp4,
            shard_bytes=args.shard_size,
            seed=args.seed,
            tokenizer=args.tokenizer,
            router_skew=args.router_skew,
            router_topics=args.router_topics,
        )
    except FlexMoEError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return error.exit_code
    shard_bytes = [shard.stat().st_size for shard in out.glob("*.safetensors")]
    print(
        f"{out}: {sum(shard_bytes) / 1e6:.0f} MB of {args.dtype}{' and MXFP4' * args.mxfp4} weights in {len(shard_bytes)} file(s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
