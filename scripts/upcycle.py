"""Make a real language model that is a mixture of experts: a small dense Llama, read from a GGUF file, "upcycled".

    python -m scripts.upcycle model.gguf OUT                 # a Mixtral of 8 experts
    python -m scripts.upcycle model.gguf OUT --experts 0     # the dense Llama that it is made of

Every expert of a layer is a copy of the dense MLP, and the router is random. The weights of the chosen experts add up to
one, so the mixture computes what the dense model does, up to rounding: the text is the dense model's, while routing,
loads of experts and checkpoint are those of a Mixtral.
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig

from flexmoe.errors import FlexMoEError
from scripts.checkpoints.gguf_llama import DenseLlama, read_gguf
from scripts.checkpoints.shapes import model_config, tensor_shapes
from scripts.checkpoints.writing import DTYPES, write_weights, written_whole

_OF_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def upcycle(
    gguf: str | Path,
    out: str | Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with the tokenizer of the file; it appears under its name only when it is complete.

    Args:
        gguf: a file of the llama architecture.
        out: the directory to make; it must not exist, or be empty.
        experts: of every layer; 0 keeps the model dense.
        top_k: experts of a token.
        dtype: of the weights at rest.
        seed: of the routers.

    Returns:
        The directory.

    Raises:
        FlexMoEError: the file cannot be read, the numbers of experts contradict each other, or writing failed.
    """
    dense, out = read_gguf(Path(gguf)), Path(out)
    if experts:
        config = model_config(
            dense.config | {"num_local_experts": experts, "num_experts_per_tok": top_k, "sliding_window": None}, dtype
        )
        shapes, tensor = tensor_shapes(config), _mixed(dense, experts, seed)
    else:
        config = LlamaConfig(**dense.config, architectures=["LlamaForCausalLM"], dtype=dtype)
        shapes, tensor = {name: tuple(t.shape) for name, t in dense.weights.items()}, dense.weights.__getitem__
    with written_whole(out) as directory:
        config.save_pretrained(directory)
        dense.generation_config.save_pretrained(directory)
        dense.tokenizer.save_pretrained(directory)
        write_weights(directory, shapes, lambda name: tensor(name).to(dtype, copy=True), dtype)
    return out


def _mixed(dense: DenseLlama, experts: int, seed: int) -> Callable[[str], torch.Tensor]:
    """The tensor of a name of the Mixtral, in float32."""

    def tensor(name: str) -> torch.Tensor:
        if name.endswith("block_sparse_moe.gate.weight"):
            hidden = dense.config["hidden_size"]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            return torch.randn(experts, hidden, generator=generator) * hidden**-0.5
        return dense.weights[
            re.sub(r"block_sparse_moe\.experts\.\d+\.(w\d)", lambda m: f"mlp.{_OF_EXPERT[m[1]]}", name)
        ]

    return tensor


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.upcycle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", metavar="GGUF", help="a model of the llama architecture")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    parser.add_argument("--experts", type=int, default=8, help="of every layer; 0 keeps the model dense (default: 8)")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token (default: 2)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of the routers")
    args = parser.parse_args(argv)
    try:
        dtype = DTYPES[args.dtype]
        out = upcycle(args.gguf, args.out, experts=args.experts, top_k=args.top_k, dtype=dtype, seed=args.seed)
    except FlexMoEError as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return error.exit_code
    size_bytes = sum(shard.stat().st_size for shard in out.glob("*.safetensors"))
    print(f"{out}: {size_bytes / 1e6:.0f} MB of {args.dtype} weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
