"""The lengths of a requests file for the planner, found as the run finds them: by its reader and its preflight. No torch."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from cost_model.cli.row_arguments import ROW_NAMES
from cost_model.model.arch import ModelArch
from flexmoe.checkpoint.files import read_json_object
from flexmoe.checkpoint.generation_config import FILE, generation_config
from flexmoe.errors import DataError
from flexmoe.inputs.options import InputOptions, open_requests
from flexmoe.inputs.request_file import Rows
from flexmoe.preflight.lengths import Measured
from flexmoe.preflight.preflight import Preflight, preflight
from flexmoe.preflight.prepare_setup import PreparerSetup
from flexmoe.text.chat_template import read_template
from flexmoe.text.estimated_tokens import BYTES_PER_TOKEN, CHAT_TOKENS, EstimatedTokens
from flexmoe.text.tokenizer import Tokenizer
from policies.workload import Workload

_OF_THE_FILE = ("input_format", "prompt_column", "prompt_template", "dataset_split", "on_invalid")


def read_lengths(args: argparse.Namespace, arch: ModelArch) -> tuple[Workload, tuple[str, ...]]:
    """Lengths of the rows that can run, and sentences on how they were found.

    Args:
        args: of the planner: ``model``, ``prompts``, ``gen_len``, ``num_requests`` and `ROW_NAMES`.
        arch: of the model. Text is counted by the tokenizer of its directory; one that is known by name alone has none, and
            text is estimated.

    Raises:
        UsageError: a flag has a value that cannot be used.
        InputMissingError, StorageError: the file is missing or cannot be read.
        DataError: a line is malformed, no row can run, or the tokenizer cannot be used.
    """
    given = {name: getattr(args, name) for name in ROW_NAMES if getattr(args, name) is not None}
    options = {name.removeprefix("input_"): given[name] for name in _OF_THE_FILE if name in given}
    setup, estimate = _setup(args, arch, given), None if Path(args.model).is_dir() else EstimatedTokens()
    preparer = setup.preparer() if estimate is None else setup.preparer(_estimating(setup, estimate))
    with open_requests(args.prompts, InputOptions(**options)) as requests:
        rows = Rows(requests=requests, numbers=range(len(requests)))
        workers, prefixes = None if estimate is None else 0, estimate is None  # estimated tokens are no token ids
        with closing(
            preflight(rows, setup, preparer=preparer, bar=sys.stderr.isatty(), workers=workers, prefixes=prefixes)
        ) as found:
            measured = found.lengths.measured(arch.max_position)
            refused = _refused(found, rows)
            if not measured.rows:
                raise DataError(f"{args.prompts} has no row that could run: {refused}")
            notes = _notes(args.prompts, measured, estimate, found.rows_refused, refused)
    workload = measured.workload
    return replace(workload, num_requests=args.num_requests or workload.num_requests), notes


def _setup(args: argparse.Namespace, arch: ModelArch, given: dict[str, Any]) -> PreparerSetup:
    directory = Path(args.model) if Path(args.model).is_dir() else None
    file = None if directory is None else directory / FILE
    of_model = read_json_object(file) if file is not None and file.exists() else {}
    template = given.get("chat_template")
    return PreparerSetup.of(
        args.model,
        directory,
        vocab_size=arch.vocab_size,
        context=arch.max_position,
        default_max_tokens=args.gen_len,
        chat_template=None if template is None else read_template(template),
        generation_config=generation_config(given.get("generation_config", "auto"), of_model),
        strict_model=given.get("strict_model", False),
    )


def _estimating(setup: PreparerSetup, estimate: EstimatedTokens) -> Tokenizer:
    return Tokenizer(estimate, "the model", chat_template=setup.chat_template)


def _refused(found: Preflight, rows: Rows) -> str:
    """The first row that cannot run, and why; empty where all can."""
    row, error = min(found.refused(), key=lambda refused: refused[0], default=(0, None))
    return "" if error is None else f"line {rows.raw(row).number}: {error.message}"


def _notes(
    path: Path, measured: Measured, estimate: EstimatedTokens | None, rows_refused: int, refused: str
) -> tuple[str, ...]:
    estimated = (
        f", text estimated at {BYTES_PER_TOKEN} bytes a token and {CHAT_TOKENS} tokens more per chat message"
        if estimate is not None and estimate.texts
        else ""
    )
    notes = [f"lengths of {measured.rows} completions of {path.name}{estimated}", *measured.open_lines()]
    if rows_refused:
        notes.append(f"rows that cannot run and are left out: {rows_refused}; {refused}")
    return tuple(notes)
