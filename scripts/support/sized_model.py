"""What benchmarks of one synthetic model share: its flags, its checkpoint, and where the record goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.make_checkpoint import SIZES, make_checkpoint


def add_flags(parser: argparse.ArgumentParser, *, size: str, workdir: Path = Path("build")) -> None:
    """Declares ``--size``, ``--workdir`` and ``--out``.

    Args:
        parser: of the benchmark's command line.
        size, workdir: the defaults.
    """
    parser.add_argument("--size", choices=list(SIZES), default=size, help=f"of the model; default {size}")
    parser.add_argument("--workdir", type=Path, default=workdir, metavar="DIR", help="of the checkpoint")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="JSON record, with a table beside it")


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The checkpoint of the size that is asked for; it is made where it is not there."""
    directory: Path = args.workdir / f"checkpoint-{args.size}"
    if not (directory / "config.json").exists():
        make_checkpoint(directory, SIZES[args.size])
    return directory
