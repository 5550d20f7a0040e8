"""The command line: ``python -m flexmoe.inspect DIR``. What was found goes to stdout."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cost_model.model.arch import ModelArch
from flexmoe.cli.inspect_record import advice, notes, record, shape_record
from flexmoe.inspecting.contents import total_bytes
from flexmoe.inspecting.inspection import Inspection, inspect
from policies.common.command_line import Parser, guarded, program_name, say
from policies.common.memory_units import in_units

_DESCRIPTION = """\
Say what a checkpoint directory is, whether a run would take it, and if not every reason why. No weights are loaded.

  python -m flexmoe.inspect DIR

Configs and the headers of all weight files are read, with the checks of a run and in its words.
"""
_EPILOG = """\
exit codes: 0 a run takes it, 1 internal, 2 usage, 65 bad checkpoint, 66 missing input, 74 I/O error
"""
_REASONING = {"think": "<think> blocks", "harmony": "the channels of harmony"}


def parser() -> argparse.ArgumentParser:
    """The argument parser of ``python -m flexmoe.inspect``."""
    p = Parser(
        prog=program_name("inspect", "flexmoe.inspect"),
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("directory", metavar="DIR", type=Path, help="the directory of a checkpoint")
    p.add_argument("--json", action="store_true", help="print a JSON object instead")
    p.add_argument(
        "--scales",
        action="store_true",
        help="read the scales of packed matrices, too, as a run does before it loads weights",
    )
    p.add_argument(
        "--checksums",
        action="store_true",
        help="read all weights of a checkpoint that flexmoe.quantize has made, and hold them against its hashes",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        int: the exit code, one of `policies.common.errors`; that of the first reason where a run would refuse.
    """
    return guarded("flexmoe", lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    found = inspect(args.directory, scales=args.scales, checksums=args.checksums)
    say(*([json.dumps(record(found), indent=1)] if args.json else lines(found)))
    return found.faults[0].exit_code if found.faults else 0


def lines(found: Inspection) -> list[str]:
    """What was found, for people."""
    told = [f"checkpoint: {found.directory}", f"model_type: {found.model_type or 'none'}"]
    if found.arch is not None:
        told += _shape_lines(found.arch)
    told += _weight_lines(found)
    texts = found.texts
    if texts.tokenizer is not None:
        kind = f" ({texts.tokenizer_class})" if texts.tokenizer_class else ""
        told.append(f"tokenizer: {texts.tokenizer}{kind}")
    if texts.template is not None:
        reasoning = f"; reasoning in {_REASONING[texts.reasoning]}" if texts.reasoning else ""
        told.append(f"chat template: {texts.template}{reasoning}")
    if found.faults:
        reasons = "1 reason" if len(found.faults) == 1 else f"{len(found.faults)} reasons"
        told += [f"a run refuses it, for {reasons}:", *(f"  - {fault}" for fault in found.faults)]
    else:
        told.append("a run takes it")
    told += [f"note: {note}" for note in notes(found)]
    return told + [f"next: {each}" for each in advice(found)]


def _shape_lines(arch: ModelArch) -> list[str]:
    dense = f", {len(arch.dense_layers)} of them dense" if arch.dense_layers else ""
    windows = [
        f"{count} layers see {'all tokens' if window is None else f'the last {window} tokens'}"
        for window, count in shape_record(arch)["windows"]
    ]
    kv, int8_kv = (arch.kv_bytes_per_token(arch.dtype_bytes, compressed=compressed) for compressed in (False, True))
    of_all = " while all layers see it" if arch.windowed_share else ""
    return [
        f"layers: {arch.num_layers}{dense}; {'; '.join(windows)}",
        f"experts: {arch.num_experts} in a layer, {arch.top_k} for a token, {arch.ffn} wide; hidden size {arch.hidden}",
        f"attention: {arch.num_heads} query heads, {arch.num_kv_heads} KV heads of size {arch.head_dim}",
        f"parameters: {arch.parameters / 1e9:.2f} billion, of which a token uses {arch.active_parameters / 1e9:.2f} billion",
        f"context: {arch.max_position} tokens; KV cache: {kv} bytes a token{of_all}, {int8_kv} as int8 (--compress-cache)",
    ]


def _weight_lines(found: Inspection) -> list[str]:
    if not found.stored:
        return ["weights: none that can be read"]
    packed = found.arch.packed if found.arch is not None else None
    how = "nothing is packed" if packed is None else f"packed: {packed.describe()}, all else is not"
    files = "1 file" if found.files == 1 else f"{found.files} files"
    told = [f"weights: {in_units(total_bytes(found.stored))} in {files}; {how}"]
    for kind, each in found.stored.items():
        dtypes = ", ".join(each.dtypes) + (" (packed)" if each.packed else "")
        told.append(f"  {kind:<15} {in_units(each.nbytes):>12}  {each.tensors} tensors, {dtypes}")
    return told
