"""Where measurements of this machine are kept, so that each is made once: the probe writes them, planners read them."""

from __future__ import annotations

from pathlib import Path

from cost_model.hardware.hardware import Hardware
from policies.common.directories import cache_directory
from policies.common.errors import InputMissingError
from policies.common.option_names import option

PATTERN = "machine-*.json"


def last_measured() -> tuple[Hardware, Path]:
    """The measurement of this machine that was made last, and its file. Capacities are those of that moment.

    Raises:
        InputMissingError: none was ever made.
        DataError: the file cannot be used.
    """
    found = sorted(cache_directory().glob(PATTERN), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputMissingError(
            f"{option('hardware', 'auto')} needs a measurement of this machine, and {cache_directory()} holds none; "
            f"run python -m flexmoe.probe -o machine.json and give {option('hardware', 'machine.json')}"
        )
    return Hardware.load(found[-1]), found[-1]
