"""The flags that say how an input file is read: those of the planner's ``--prompts`` and of the run's ``-i``."""

from __future__ import annotations

import argparse

#: Where the values of the flags are kept; None where a flag is not given. Who reads the file checks them.
ROW_NAMES = (
    "input_format",
    "prompt_column",
    "prompt_template",
    "dataset_split",
    "on_invalid",
    "chat_template",
    "generation_config",
    "strict_model",
)


def add_row_flags(p: argparse.ArgumentParser, needs: str) -> None:
    """Adds the flags.

    Args:
        needs: the flag that names the file.
    """
    rows = p.add_argument_group(f"rows (with {needs})")
    rows.add_argument(
        "--input-format",
        metavar="FORMAT",
        help="auto, jsonl, text, parquet or dataset (default auto: by the input's name, else jsonl)",
    )
    rows.add_argument("--prompt-column", metavar="NAME", help="the column of a table that is the prompt")
    rows.add_argument("--prompt-template", metavar="TEXT", help="makes the prompt from columns: 'Translate: {text}'")
    rows.add_argument("--dataset-split", metavar="NAME", help="split of a dataset that has several (default train)")
    rows.add_argument(
        "--on-invalid",
        metavar="WHAT",
        help="whether an invalid line fails the job (fail, the default) or becomes an error row (record)",
    )
    rows.add_argument("--chat-template", metavar="FILE", help="replaces the tokenizer's own chat template")
    rows.add_argument(
        "--generation-config",
        metavar="DIR",
        help="sampling defaults: auto (the model's generation_config.json), none, or a directory (default auto)",
    )
    rows.add_argument("--strict-model", action="store_true", default=None, help="fail rows that name another model")
