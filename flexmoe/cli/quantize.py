"""The command line: ``python -m flexmoe.quantize DIR OUT --format int4``. The result goes to stdout, progress to stderr."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cost_model.model.packing import FORMATS
from flexmoe.quantizing.quantize import quantize
from policies.common.command_line import Parser, count, guarded, program_name, say
from policies.common.memory_units import in_units

_DESCRIPTION = """\
Pack the weights of a checkpoint once, into a checkpoint of compressed-tensors, which FlexMoE, transformers and vLLM load.

  python -m flexmoe.quantize DIR OUT --format int4

Experts and attention projections are packed. Router, norms, embeddings and head stay as they are, and tokenizer, configs and
chat template are copied. One file after another is made by all cores, in bounded memory. The same command resumes after it
was stopped; until all is there nothing has the name OUT.
"""
_EPILOG = """\
formats: int4 and int8 (pack-quantized, symmetric), fp8 (float-quantized, e4m3), mxfp4 (mxfp4-pack-quantized)
exit codes: 0 ok, 1 internal, 2 usage, 65 bad checkpoint, 66 missing input, 74 I/O error or disk full, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser of ``python -m flexmoe.quantize``."""
    p = Parser(
        prog=program_name("quantize", "flexmoe.quantize"),
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="DIR", help="a checkpoint of bfloat16, float16 or float32 weights, or a hub id")
    p.add_argument("out", metavar="OUT", type=Path, help="the directory to make")
    p.add_argument("--format", choices=list(FORMATS), required=True, help="what the weights are packed in")
    p.add_argument(
        "--group-size",
        type=_group,
        metavar="N",
        help="inputs that share a scale, or 'channel' for all of an output (default 128, or 64 or 32 where a "
        "width of the model is no multiple of it); with fp8 N x N weights share one "
        "(default channel); mxfp4 has groups of 32",
    )
    p.add_argument("-v", "--verbose", action="store_true", help="log what is done, to stderr")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        int: the exit code, one of `policies.common.errors`.
    """
    return guarded("flexmoe", lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s"
    )
    for name in ("flexmoe.progress", "flexmoe.quantizing.quantize"):
        logging.getLogger(name).setLevel(logging.INFO)
    made = quantize(args.model, args.out, args.format, args.group_size, bar=sys.stderr.isatty())
    say(
        f"packed: {made.packed.describe()}",
        f"weights: {in_units(made.packed_bytes)} of {in_units(made.source_bytes)}; those that are packed differ by "
        f"{100 * made.relative_error:.2f} % (root mean square)",
        f"checkpoint: {made.directory}",
    )
    return 0


def _group(text: str) -> int:
    """A number of inputs, or 0 for all of them."""
    return 0 if text == "channel" else count(text)
