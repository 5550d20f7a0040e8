"""The command line: ``python -m flexmoe.probe -o machine.json``. The table goes to stdout, progress to stderr."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cost_model.hardware.hardware import Gpu, Hardware
from flexmoe.job.output_files import check_writable
from flexmoe.probing.measure import probe
from policies.common.command_line import Parser, guarded, program_name, say
from policies.common.directories import OFFLOAD_DIR
from policies.common.memory_units import MIB

_DESCRIPTION = """\
Measure this machine once, in one to seven minutes, with the runtime's own disk reads, copies, GEMMs and attention.

  python -m flexmoe.probe -o machine.json
  python -m cost_model --model DIR --hardware machine.json …

At most a tenth of the free disk space is written for it (no more than 2 GiB, gone afterwards), and its buffers take at
most an eighth of the available memory (no more than 1 GiB; libraries add up to as much again).
"""
_EPILOG = """\
exit codes: 0 ok, 1 internal, 2 usage, 4 too little memory, 74 I/O error or disk full, 130 interrupted
"""
#: Field endings, what they are shown in, and how many of them make one of that.
_UNITS = {
    "_core_s_per_byte": ("core-s/GB", 1e-9),
    "flops_per_s": ("GFLOP/s", 1e9),
    "bytes_per_s": ("GB/s", 1e9),
    "_bytes": ("GB", 1e9),
    "_core_s": ("core-us", 1e-6),
    "unpack_s": ("ps", 1e-12),
    "int8_attention": ("x that of 16 bits", 1),
    "beside_compute": ("x the rate alone", 1),
    "_s": ("us", 1e-6),
}
_SHOWN_TOKENS = (1, 8, 64, 512, 4096)


def parser() -> argparse.ArgumentParser:
    """The argument parser of ``python -m flexmoe.probe``."""
    p = Parser(
        prog=program_name("probe", "flexmoe.probe"),
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help="where the JSON goes")
    p.add_argument("--device", default="auto", help="auto, cuda or cpu (default auto)")
    p.add_argument(
        "--dir",
        type=Path,
        default=OFFLOAD_DIR,
        help="directory on the disk that the disk tier will use (default %(default)s)",
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
    logging.getLogger("flexmoe.progress").setLevel(logging.INFO)
    check_writable(args.output_file)
    hardware = probe(args.device, args.dir)
    hardware.save(args.output_file)
    say(*table(hardware), f"machine: {args.output_file}")
    return 0


def table(hardware: Hardware) -> list[str]:
    """One line for each measured value: name, value, unit."""
    lines = [
        hardware.name,
        *(_line(*row) for row in _numbers(hardware)),
        *(_line(*row) for row in _numbers(hardware.gpu)),
    ]
    for name, curve in (("disk_read", hardware.disk_read_curve), ("h2d", hardware.gpu.h2d_curve)):
        lines += [_line(f"{name}, units of {size / MIB:g} MiB", rate / 1e9, "GB/s") for size, rate in curve]
    for name in ("experts", "grouped_experts", "dense"):
        for size, rates in getattr(hardware.gpu, name).items():
            for elements, row in zip(rates.weight_elements, rates.flops_per_s, strict=True):
                for tokens, rate in zip(rates.tokens, row, strict=True):
                    if tokens in _SHOWN_TOKENS:
                        what = f"{name}, {size} bytes x {elements / 1e6:.2f} M weights, {tokens:.0f} tokens"
                        lines.append(_line(what, rate / 1e9, "GFLOP/s"))
    return lines


def _line(name: str, value: float, unit: str) -> str:
    return f"{name:<52} {value:>12.4g} {unit}"


def _numbers(values: Hardware | Gpu) -> Iterator[tuple[str, float, str]]:
    """(name, value, unit) of the fields that are plain numbers."""
    for name in values.__dataclass_fields__:
        value = getattr(values, name)
        ending = next((ending for ending in _UNITS if name.endswith(ending)), None)
        if ending is not None and value is not None:
            unit, scale = _UNITS[ending]
            for what, number in value.items() if isinstance(value, Mapping) else (("", value),):
                yield f"{name}, {what}" if what else name, number / scale, unit
        elif name == "cores":
            yield name, value, ""
